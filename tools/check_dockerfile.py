"""Builds the Dockerfile's images where no container engine runs, and runs their health checks.

    apt-get install buildah debootstrap
    python -m tools.check_dockerfile                          # as root: both images, some 15 GB on the way
    python -m tools.check_dockerfile --targets env --folder /var/tmp/images      # a second call goes on from its layers
    python -m tools.check_dockerfile -- --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=...

Buildah reads the Dockerfile and executes each step, in a chroot whose root debootstrap made. An instruction that this
Dockerfile does not use so far is refused before anything is built. What follows `--` goes to `buildah build`.

The base images that the Dockerfile names are not used: a Debian of the same packages' names stands in for them. Nor is
there a GPU or a network of its own, and nothing is limited. The last lines say what was run and what was not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "Dockerfile"
TARGETS = ("env", "train")
STAND_IN = "localhost/clean-root"
NEEDED = ("buildah", "debootstrap")
INSTRUCTIONS = ("ARG", "FROM", "ENV", "COPY", "RUN", "WORKDIR", "USER", "HEALTHCHECK", "CMD")
NOT_RUN = (
    "the base images that the Dockerfile names (their packages' versions, their Python, CUDA's driver check)",
    "a container engine: its network, limits, volumes, and the schedule of health checks",
    "GPUs: `docker run --gpus all`, EGL on the driver, CUDA",
)


class Step(NamedTuple):
    """One instruction of a Dockerfile.

    Attributes:
        stage: that it belongs to; empty before the first.
        instruction: such as RUN.
        value: what follows it, on one line.
    """

    stage: str
    instruction: str
    value: str


class Base(NamedTuple):
    """An argument of the Dockerfile that names a base image, and the image."""

    argument: str
    image: str


def read_steps(dockerfile: str) -> list[Step]:
    """Returns the steps of a Dockerfile, in order.

    Raises:
        ValueError: an instruction is none of `INSTRUCTIONS`, or a stage has no name.
    """
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    steps: list[Step] = []
    stage = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, value = line.partition(" ")
        if instruction not in INSTRUCTIONS:
            raise ValueError(
                f"the Dockerfile's {line!r} begins with no instruction that is used here ({', '.join(INSTRUCTIONS)}); "
                "if it is right, add it to tools/check_dockerfile.py"
            )
        if instruction == "FROM":
            _, separator, stage = value.partition(" AS ")
            if not separator:
                raise ValueError(f"the Dockerfile's stage FROM {value} has no name; write FROM {value} AS name")
        steps.append(Step(stage, instruction, value))
    return steps


def base_images(steps: Sequence[Step]) -> list[Base]:
    """Returns the images that stages begin from, as arguments before the first stage name them.

    Raises:
        ValueError: a stage begins from what is neither such an argument nor an earlier stage, or an image has no tag of
            its own.
    """
    known = dict(step.value.split("=", 1) for step in steps if step.instruction == "ARG" and not step.stage)
    stages: set[str] = set()
    used: dict[str, Base] = {}
    for step in steps:
        if step.instruction != "FROM":
            continue
        source, _, stage = step.value.partition(" AS ")
        argument = source.removeprefix("${").removesuffix("}")
        if source == f"${{{argument}}}" and argument in known:
            used[argument] = Base(argument, known[argument])
        elif source not in stages:
            raise ValueError(
                f"the Dockerfile's stage {stage!r} begins from {source!r}, which is none of the arguments "
                f"{sorted(known)} and no earlier stage; name the image by an ARG before the first FROM"
            )
        stages.add(stage)
    for base in used.values():
        name, _, tag = base.image.rpartition(":")
        if not name or "/" in tag or tag == "latest":
            raise ValueError(f"{base.argument}={base.image} has no tag that stays what it is; give one")
    return list(used.values())


def check_machine() -> None:
    """Raises OSError if this machine cannot build images in a chroot."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise OSError(f"{' and '.join(missing)} not found; on Debian: apt-get install {' '.join(NEEDED)}")
    if os.geteuid() != 0:
        raise OSError("chroot and mounts need root; run this as root, in a machine that may be thrown away")


class Builder:
    """Buildah, with all that it keeps below one folder."""

    def __init__(self, folder: Path) -> None:
        self._command = ["buildah", "--root", f"{folder}/storage", "--runroot", f"{folder}/run"]
        self._command += ["--storage-driver", "overlay"]

    def run(self, *arguments: str) -> None:
        """Runs a command of Buildah's, its output shown."""
        subprocess.run([*self._command, *arguments], check=True)

    def read(self, *arguments: str) -> str:
        """Returns what a command of Buildah's prints."""
        command = [*self._command, *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def make_stand_in(self, folder: Path, *, suite: str, mirror: str) -> None:
        """Makes the image that stands in for the bases, if it is not there: Debian's essential packages and apt."""
        if STAND_IN in self.read("images", "--format", "{{.Name}}").split():
            return
        root = folder / "root"
        subprocess.run(["debootstrap", "--variant=minbase", suite, root, mirror], check=True)
        container = self.read("from", "scratch")
        self.run("add", "--quiet", container, f"{root}/", "/")
        self.run("commit", "--quiet", "--rm", container, STAND_IN)
        shutil.rmtree(root)

    def build(self, target: str, bases: Sequence[Base], options: Sequence[str]) -> str:
        """Builds a target of the Dockerfile and returns the image's name."""
        image = f"localhost/libero-gr00t:{target}"
        replaced = [f"--build-arg={base.argument}={STAND_IN}" for base in bases]
        # Docker's format, since that of OCI knows no health check.
        self.run(
            "build", "--layers", "--isolation", "chroot", "--format", "docker", "--pull-never", "--target", target,
            "--tag", image, "--file", str(DOCKERFILE), *replaced, *options, str(ROOT),
        )  # fmt: skip
        return image

    def check_health(self, image: str) -> list[str]:
        """Runs the health check of an image as its user, and returns its command.

        Raises:
            ValueError: the image has none, or its user is root.
            CalledProcessError: it failed.
        """
        config: dict[str, Any] = json.loads(self.read("inspect", "--type", "image", image))["Docker"]["config"]
        if config.get("User") in (None, "", "root", "0"):
            raise ValueError(f"{image} runs as root; end its stage with USER")
        kind, *command = (config.get("Healthcheck") or {}).get("Test") or ["NONE"]
        if kind != "CMD":
            raise ValueError(f"{image} has no health check of the form CMD [...] (but {kind})")
        container = self.read("from", "--pull-never", image)
        self.run("run", "--isolation", "chroot", container, "--", *command)
        self.run("rm", container)
        return command


def check(targets: Sequence[str], *, suite: str, mirror: str, folder: Path | None, options: Sequence[str]) -> None:
    """Builds images and runs their health checks.

    Args:
        targets: stages of the Dockerfile.
        suite: release of Debian that stands in for the base images.
        mirror: where its packages are.
        folder: where images and their layers are kept, for the next call too; None deletes them.
        options: of `buildah build`.

    Raises:
        OSError: this machine cannot build images.
        CalledProcessError: a step failed; Buildah has said which.
    """
    bases = base_images(read_steps(DOCKERFILE.read_text(encoding="utf-8")))
    check_machine()
    done: list[str] = []
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="check-dockerfile-")))
        builder = Builder(folder)
        builder.make_stand_in(folder, suite=suite, mirror=mirror)
        for target in targets:
            image = builder.build(target, bases, options)
            command = builder.check_health(image)
            done.append(f"all steps of {target}, and its health check: {' '.join(command)}")
    stood_in = ", ".join(base.image for base in bases)
    print("\nRun, with Debian", suite, "in place of", stood_in)
    for line in done:
        print(f"  - {line}")
    print("Not run:")
    for line in NOT_RUN:
        print(f"  - {line}")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="stages to build")
    parser.add_argument("--suite", default="bookworm", help="release of Debian that stands in for the base images")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where its packages are")
    parser.add_argument("--folder", type=Path, help="where layers are kept for the next call; deleted if not given")
    parser.add_argument("options", nargs="*", help="of `buildah build`, after --")
    args = parser.parse_args(arguments)
    try:
        check(args.targets, suite=args.suite, mirror=args.mirror, folder=args.folder, options=args.options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(map(str, error.cmd))}` ended with status {error.returncode}")


if __name__ == "__main__":
    main()
