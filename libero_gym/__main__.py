"""The package's command line: `python -m libero_gym export --suite SUITE ... --out FILE`.

`export` writes suites, their scenes and assets to one file that runs without `libero` and `robosuite`, see
`libero_gym.tasks.archive`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from libero_gym.outputs import check_output_file
from libero_gym.tasks.scenes import export_suites


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m libero_gym", description="LIBERO's tasks on a native runtime.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write suites to one file that runs without libero and robosuite")
    export.add_argument("--suite", nargs="+", required=True, help="suites, such as libero_spatial")
    export.add_argument("--out", type=Path, required=True, help="the archive, such as libero_spatial.tar.xz")
    chosen = parser.parse_args(arguments)
    try:
        check_output_file("out", chosen.out)
        export_suites(chosen.suite, chosen.out)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    size = chosen.out.stat().st_size / 1e6
    print(f"{chosen.out}: {size:.1f} MB. To use it: export LIBERO_GYM_SCENES={chosen.out.resolve()}")


if __name__ == "__main__":
    main()
