"""A trainer's command line, without PyTorch: a mistake in it is told in less time than PyTorch takes to import.

    ARGS = parse_args(Args, __doc__, PRESETS, check_args) if __name__ == "__main__" else None

    import torch  # and what else the trainer needs
    ...
    if ARGS is not None:
        launch(main, ARGS)

What a user can mend ends the program with one message: exit status 2 if the command line tells it, 1 if only the run
does. It is an error that the project itself raises, with what was given and what to do: any ValueError or OSError, and
of errors that are mostly faults those that it raises by name, such as RuntimeError and RendererUnavailableError. Any
other has its traceback, and `python -X dev` shows it for these too. Of the processes on a host the first one speaks.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import gc
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_type_hints

import tyro

ArgsT = TypeVar("ArgsT")

# Of an argument in a preset: it has no default there either.
REQUIRED: Any = tyro.MISSING
# What the project raises where a user gave something that cannot be.
_USER_ERRORS = (ValueError, OSError)
# What it raises where an outcome, a library or an entry of a file is not there; in other hands mostly faults.
_NAMED_ERRORS = (RuntimeError, LookupError, ImportError)
_NAMED = re.compile(
    r"raise (RuntimeError|RendererUnavailableError|LookupError|KeyError|(Import|ModuleNotFound|Overwritten)Error)\("
)
# Longer than a launcher takes to end the other processes when the first has ended.
_GRACE_S = 10.0
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r" *# --- (.+) ---")
_WIDTH = 100


def parse_args(
    args_class: type[ArgsT],
    description: str | None,
    presets: Mapping[str, ArgsT] | None = None,
    *checks: Callable[[ArgsT], None],
) -> ArgsT:
    """Parses the command line into `args_class`; a mistake ends the program with a message and status 2.

    Args:
        args_class: a dataclass; `# --- title ---` among its fields begins a block of `--help`, and the text after a
            field is its help.
        description: of the program.
        presets: defaults by the name that `--preset` gives.
        checks: raise ValueError or OSError for arguments that cannot be.
    """
    with _told(status=2):
        groups = _groups(args_class, presets or {})
        is_first = _local_rank() == 0
        if is_first and {"-h", "--help"} & set(sys.argv[1:]):
            print(_wrapped(description or ""), end="\n\n")  # tyro would not wrap it
        try:
            given = tyro.cli(groups, description="", console_outputs=is_first)
        except SystemExit as end:
            if is_first or not end.code:
                raise
            _let_the_first_speak()
            given = tyro.cli(groups, description="")
        args = args_class(**{name: value for group in vars(given).values() for name, value in vars(group).items()})
        for check in checks:
            check(args)
        return args


def launch(main: Callable[[ArgsT], Any], args: ArgsT) -> None:
    """Calls `main`; what the user can mend ends the program with a message and status 1.

    What imports have made stays, so the garbage collector need not look through it: that takes longer than to write a
    video, after which ImageIO calls the collector.
    """
    gc.freeze()
    with _told(status=1):
        main(args)


# --- help ---


def _groups(args_class: type[Any], presets: Mapping[str, Any]) -> type[Any]:
    """Returns a dataclass of dataclasses, one for each block of `args_class`, with the values of the chosen preset."""
    hints = get_type_hints(args_class, include_extras=True)
    chosen = _chosen(presets)
    documented = _documented_fields(args_class)
    blocks: dict[str, list[Any]] = {}
    for item in dataclasses.fields(args_class):
        title, text = documented[item.name]
        settings: dict[str, Any] = dict(prefix_name=False, help=text)
        if item.name == "preset" and presets:
            hints[item.name] = cast(Any, Literal)[tuple(presets)] | None
            settings |= dict(metavar="NAME", help=f"{text} Names: {', '.join(presets)}.")
        hint = Annotated[hints[item.name], tyro.conf.arg(**settings)]
        default: dict[str, Any] = dict(default=item.default, default_factory=item.default_factory)
        if chosen is not None and getattr(chosen, item.name) is not REQUIRED:
            default = dict(default_factory=partial(getattr, chosen, item.name))
        blocks.setdefault(title, []).append((item.name, hint, field(**default)))
    groups: list[Any] = []
    for i, (title, fields) in enumerate(blocks.items()):
        block = make_dataclass(f"Block{i}", fields, kw_only=True)
        groups.append((f"block_{i}", Annotated[block, tyro.conf.arg(name=title, help="")]))
    return make_dataclass(args_class.__name__, groups)


def _chosen(presets: Mapping[str, ArgsT]) -> ArgsT | None:
    """Returns the preset that the command line names, or None; raises ValueError where there is none of this name."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    name = parser.parse_known_args()[0].preset
    if not presets or name is None:
        return None
    if name not in presets:
        nearest = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"preset={name!r} is unknown{hint} (valid: {', '.join(presets)})")
    return presets[name]


def _documented_fields(args_class: type[Any]) -> dict[str, tuple[str, str]]:
    """Returns the title of its block and the text after it for each field, of a base class where it has none itself."""
    fields: dict[str, tuple[str, str]] = {}
    for cls in reversed([c for c in args_class.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(cls))
        lines = source.splitlines()
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise([*definition.body, ast.Pass()]):
            if isinstance(statement, ast.AnnAssign):
                name = ast.unparse(statement.target)
                inherited_title, inherited_text = fields.get(name, ("", ""))
                titles = [match[1] for line in lines[: statement.lineno] if (match := _BLOCK.fullmatch(line))]
                text = following.value if isinstance(following, ast.Expr) else None
                help_text = " ".join(str(text.value).split()) if isinstance(text, ast.Constant) else inherited_text
                fields[name] = (titles[-1] if titles else inherited_title, help_text)
    return fields


def _wrapped(text: str) -> str:
    """Returns prose filled to the terminal, and indented lines as they are."""
    width = min(shutil.get_terminal_size().columns, _WIDTH)
    parts: list[str] = []
    for is_prose, group in itertools.groupby(text.strip().splitlines(), lambda line: line[:1].strip() != ""):
        lines = list(group)
        parts.append(textwrap.fill(" ".join(lines), width) if is_prose else "\n".join(lines))
    return "\n".join(parts)


# --- errors ---


@contextmanager
def _told(status: int) -> Generator[None]:
    try:
        yield
    except BrokenPipeError:  # by `--help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        raise SystemExit(status) from None
    except (*_USER_ERRORS, *_NAMED_ERRORS) as error:
        if not _is_ours(error) or sys.flags.dev_mode:
            raise
        _let_the_first_speak()
        text = error.args[0] if isinstance(error, KeyError) else error  # Python would put it in quotes
        notes: list[str] = getattr(error, "__notes__", [])
        _end("\n".join([f"{Path(sys.argv[0]).name}: error: {text}", *notes]), status)


def _is_ours(error: BaseException) -> bool:
    """Returns whether a `raise` statement of the project raised it: then it says what to do."""
    *_, raised = traceback.extract_tb(error.__traceback__)
    line = raised.line or ""
    is_raise = line.startswith("raise ")
    if not isinstance(error, _USER_ERRORS):
        is_named = _NAMED.match(line) is not None or raised.name == "from_main"  # there the main process's is passed on
        is_raise = is_named and any(isinstance(part, str) for part in error.args[:1])
    return is_raise and any(Path(raised.filename).is_relative_to(folder) for folder in _folders())


def _folders() -> list[Path]:
    specs = [find_spec(name) for name in ("algorithms", "gr00t_agent", "libero_gym")]
    folders = [Path(folder) for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()]
    return [*folders, *(_ROOT / name for name in ("benchmarks", "examples", "tools"))]  # these are programs


def _local_rank() -> int:
    return next((int(os.environ[name]) for name in _LOCAL_RANKS if name in os.environ), 0)


def _let_the_first_speak() -> None:
    """Waits, unless this process is the first on its host: its launcher then ends this one; if not, this one speaks."""
    if _local_rank() > 0:
        time.sleep(_GRACE_S)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)
