"""Rules of the repository itself: who imports whom, what is installed, what the scripts say."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libero_gym", "gr00t_agent")
SCRIPTS = sorted(p for p in (ROOT / "algorithms").glob("*.py") if '__name__ == "__main__"' in p.read_text())


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_neither_each_other_nor_the_scripts(package: str):
    forbidden = {*PACKAGES, "algorithms", "benchmarks", "tests"} - {package}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & forbidden, f"{file} imports {imported_packages(file) & forbidden}"


def import_graph(package: str) -> dict[str, set[str]]:
    """Map each module of a package to those it imports, also in functions and for type checkers alone."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ROOT / package).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
        graph[module] = names & set(files) - {module}
    return graph


@pytest.mark.parametrize("package", [*PACKAGES, "algorithms"])
def test_no_modules_import_each_other_in_a_circle(package: str):
    graph = import_graph(package)
    assert any(graph.values())
    list(TopologicalSorter(graph).static_order())  # a CycleError names the circle


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_libero_gym_imports_no_heavy_package():
    code = (
        "import sys, libero_gym; heavy = {'torch', 'mujoco', 'robosuite', 'libero', 'numba', 'warp', 'mujoco_warp'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", ["libero_gym:libero_gym/libero_spatial-v0", "libero_gym/libero_spatial-v0"])
def test_environments_are_made_by_id(name: str):
    imported = "" if ":" in name else "import libero_gym; "
    code = (
        f"import gymnasium; {imported}env = gymnasium.make({name!r}, task_id=3, observe_images=False); "
        "print(env.spec.id, env.reset(seed=0)[1]['task_id'])"
    )
    assert run_python(code) == "libero_gym/libero_spatial-v0 3"


def test_no_module_of_the_environment_imports_torch():
    code = (
        "import sys, importlib, pkgutil, libero_gym; "
        "names = [m.name for m in pkgutil.walk_packages(libero_gym.__path__, 'libero_gym.')]; "
        "[importlib.import_module(name) for name in names]; "
        "print('libero_gym.physics.warp_worlds' in sys.modules, 'torch' in sys.modules)"
    )
    assert run_python(code) == "True False"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_documents_every_argument(script: Path):
    result = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown = re.sub(r"[│\s]+", " ", result.stdout)
    tree = ast.parse(script.read_text())
    (args_class,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = [node for node in args_class.body if isinstance(node, ast.AnnAssign)]
    assert fields
    for field in fields:
        name = ast.unparse(field.target).replace("_", "-")
        assert f"--{name}" in shown, name
        following = args_class.body[args_class.body.index(field) + 1]
        assert isinstance(following, ast.Expr), f"{name} has no help text"
        help_text = re.sub(r"\s+", " ", str(ast.literal_eval(following.value)))
        assert help_text.split(".")[0].split("`")[0][:40].strip() in shown, name


@pytest.mark.slow
def test_wheel_holds_the_two_packages_with_their_data_and_nothing_else(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert top == {*PACKAGES, f"libero_gr00t-{version}.dist-info"}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= set(names)


def test_readme_names_only_make_targets_and_scripts_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"`?\bmake ([a-z]+)\b(?= *[`\n#])", readme))
    assert {"demo", "test"} <= mentioned <= targets
    for path in re.findall(r"(?<![\w/])(?:algorithms|benchmarks|docs|tests)/[\w/]+\.(?:py|md)\b", readme):
        assert (ROOT / path).is_file(), path
