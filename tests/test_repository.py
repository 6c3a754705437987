"""Rules of the repository itself: who imports whom, what is installed, what the scripts say."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import runpy
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libero_gym", "gr00t_agent")
SCRIPT_FOLDERS = ("algorithms", "examples", "tools")
SCRIPTS = sorted(p for d in SCRIPT_FOLDERS for p in (ROOT / d).glob("*.py") if "\nclass Args" in p.read_text())


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
    forbidden = {*PACKAGES, "algorithms", "benchmarks", "examples", "tools", "tests"} - {package}
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


def test_importing_gr00t_agent_imports_no_heavy_package_and_offers_every_name():
    code = (
        "import sys, gr00t_agent; heavy = {'torch', 'transformers', 'diffusers', 'huggingface_hub.hf_api'}; "
        "light = sorted(heavy & set(sys.modules)); "
        "names = [getattr(gr00t_agent, name) for name in gr00t_agent.__all__]; "
        "print(light, len(names) > 10, 'torch' in sys.modules)"
    )
    assert run_python(code) == "[] True True"


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


def help_texts(args_class: type) -> dict[str, str]:
    """Returns the text after each field in the source of the class that declares it, or of a base class if none is."""
    texts: dict[str, str] = {}
    for cls in reversed([c for c in args_class.__mro__ if dataclasses.is_dataclass(c)]):
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
        for statement, following in itertools.pairwise([*body, ast.Pass()]):
            if isinstance(statement, ast.AnnAssign):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                name = ast.unparse(statement.target)
                texts[name] = str(following.value.value) if is_text else texts.get(name, "")
    assert set(texts) == {field.name for field in dataclasses.fields(args_class)}
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_help_documents_every_argument(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    module = importlib.import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
    for name, text in help_texts(module.Args).items():
        assert f"--{name.replace('_', '-')}" in shown
        assert text, f"{name} has no help text"
        assert re.sub(r"\s+", " ", text) in shown, name


def test_readme_names_only_make_targets_and_scripts_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"`?\bmake ([a-z0-9-]+)\b(?= *[`\n#])", readme))
    assert {"demo", "test"} <= mentioned <= targets
    for path in re.findall(
        r"(?<![\w/])(?:algorithms|benchmarks|docs|examples|tests|tools)/[\w/]+\.(?:py|md)\b", readme
    ):
        assert (ROOT / path).is_file(), path
