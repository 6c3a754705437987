"""The Dockerfile and what runs its images: they name what exists, in versions that are asked for.

Nothing is built here; `python -m tools.check_dockerfile` does that.
"""

import json
import re
import shlex
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from algorithms import async_ppo_gr00t, dsrl_gr00t, grpo_gr00t, ppo_gr00t
from algorithms.common.command_line import parse_args
from algorithms.common.placement import Node, Placement, check_shares, place_roles
from tests.preloaded import run_environments
from tools import smoke
from tools.check_dockerfile import TARGETS, Step, base_images, check_machine, read_steps

ROOT = Path(__file__).resolve().parents[1]
STEPS = read_steps((ROOT / "Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = (ROOT / "compose.yaml").read_text()
SCRIPTS = {
    "algorithms/ppo_gr00t.py": ppo_gr00t,
    "algorithms/grpo_gr00t.py": grpo_gr00t,
    "algorithms/dsrl_gr00t.py": dsrl_gr00t,
    "algorithms/async_ppo_gr00t.py": async_ppo_gr00t,
}


def values(instruction: str, stage: str) -> list[str]:
    return [step.value for step in STEPS if (step.instruction, step.stage) == (instruction, stage)]


def defaults() -> dict[str, str]:
    arguments = [step.value for step in STEPS if step.instruction == "ARG" and "=" in step.value]
    return dict(argument.split("=", 1) for argument in arguments)


# --- the Dockerfile ---


def test_base_images_have_tags_that_stay():
    assert [base.argument for base in base_images(STEPS)] == ["ENV_IMAGE", "TRAIN_IMAGE"]


@pytest.mark.parametrize("image", ["ubuntu", "ubuntu:latest", "localhost:5000/ubuntu"])
def test_a_base_image_without_a_tag_of_its_own_is_refused(image: str):
    with pytest.raises(ValueError, match=re.escape(f"BASE={image}")):
        base_images(read_steps(f"ARG BASE={image}\nFROM ${{BASE}} AS env\n"))


def test_an_image_that_no_argument_names_is_refused():
    with pytest.raises(ValueError, match=r"'debian:13\.1-slim'.*'BASE'"):
        base_images(read_steps("ARG BASE=ubuntu:24.04\nFROM debian:13.1-slim AS env\n"))


@pytest.mark.parametrize("line", ["ENTRYPOINT ['bash']", "run true", "RUNN true"])
def test_an_instruction_that_is_not_known_is_refused(line: str):
    with pytest.raises(ValueError, match=re.escape(line.split()[0])):
        read_steps(f"FROM ubuntu:24.04 AS env\n{line}\n")


def test_steps_go_on_over_lines_and_comments():
    text = "FROM ubuntu:24.04 AS env\nRUN one \\\n    # why\n    && two\nUSER me\n"
    assert read_steps(text)[1:] == [Step("env", "RUN", "one && two"), Step("env", "USER", "me")]


def test_a_machine_that_cannot_build_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "buildah" else f"/usr/bin/{name}")
    with pytest.raises(OSError, match="buildah not found; on Debian: apt-get install buildah debootstrap"):
        check_machine()


@pytest.mark.parametrize("target", TARGETS)
def test_images_end_as_a_user_without_rights_and_with_a_health_check(target: str):
    (user,) = values("USER", target)
    assert f"useradd --create-home --uid 10001 {user}" in " ".join(values("RUN", target))
    (check,) = values("HEALTHCHECK", target)
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "tools/smoke.py"]
    assert f"{' '.join(command)}" in values("RUN", target)[-1], "the build ends with the health check"
    assert "graphics" in " ".join(values("ENV", target))
    names = [step.instruction for step in STEPS if step.stage == target]
    assert names.index("USER") < len(names) - 1 - names[::-1].index("RUN")


def ignored(path: str) -> bool:
    is_ignored = False
    for pattern in (ROOT / ".dockerignore").read_text().split("\n"):
        name = pattern.removeprefix("!")
        if pattern and not pattern.startswith("#") and (fnmatch(path, name) or path.startswith(f"{name}/")):
            is_ignored = not pattern.startswith("!")
    return is_ignored


def test_what_is_copied_is_there_and_reaches_the_build():
    copied = [step.value.split()[:-1] for step in STEPS if step.instruction == "COPY"]
    paths = [path for sources in copied for path in sources]
    assert {"libero_gym", "gr00t_agent", "algorithms", "tools/smoke.py"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    for path in (".git", "runs", ".venv", "tests", "docs", "libero_gym/__pycache__"):
        assert ignored(path), path


def test_extras_and_versions_are_those_of_pyproject():
    extras = PROJECT["optional-dependencies"]
    assert set(defaults()["EXTRAS"].split(",")) <= set(extras)
    asked = {Requirement(line).name: Requirement(line) for lines in extras.values() for line in lines}
    for argument in ("TORCH", "RAY"):
        given = Requirement(defaults()[argument])
        (pin,) = given.specifier
        assert pin.operator == "=="
        assert pin.version in asked[given.name].specifier


def test_the_trainers_are_found_where_they_are_copied_to():
    (folder,) = values("WORKDIR", "train")
    assert f"PYTHONPATH={folder}" in values("ENV", "train")
    assert "algorithms algorithms" in values("COPY", "train")


# --- the smoke run ---


def test_the_smoke_run_plays_without_pytorch():
    code = "import sys; from tools import smoke; smoke.main(['--renderer', 'warp']); print('torch' in sys.modules)"
    told, has_torch = run_environments(code).splitlines()[-2:]
    assert json.loads(told).items() >= {"renderer": "warp", "policy": None, "env_steps": 20}.items()
    assert has_torch == "False"


def test_the_smoke_run_lets_the_nano_policy_decide(capsys: pytest.CaptureFixture[str]):
    policy = str(ROOT / "checkpoints" / "libero_spatial_fewshot")
    smoke.main(["--policy", policy, "--renderer", "warp"])
    assert json.loads(capsys.readouterr().out).items() >= {"policy": policy, "device": "cpu"}.items()


@pytest.mark.parametrize("fault", ["blank", "same"])
def test_the_smoke_run_sees_pictures_that_show_nothing(fault: str):
    rng = np.random.default_rng(0)
    before, after = ({"video.image": rng.integers(0, 256, (2, 8, 8, 3), np.uint8)} for _ in range(2))
    smoke.check_pictures(before, after)
    after["video.image"] = before["video.image"] if fault == "same" else np.zeros_like(after["video.image"])
    with pytest.raises(RuntimeError, match=fault):
        smoke.check_pictures(before, after)


# --- two nodes ---


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the arguments of a command of a trainer, as the trainer itself reads them."""
    words = shlex.split(command)
    (at,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    (name,) = [name for name in SCRIPTS if words[at].endswith(name)]
    monkeypatch.setattr(sys, "argv", words[at:])
    return parse_args(SCRIPTS[name].Args, None, SCRIPTS[name].PRESETS)


def placed(args: Any, nodes: list[Node]) -> Placement:
    placement = place_roles(nodes, placement=args.placement, env_on_gpu=args.physics == "warp")
    check_shares(args, placement)
    return placement


def commands_in_comments(text: str) -> list[str]:
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [line for line in joined.splitlines() if "algorithms/" in line]


def test_compose_runs_two_nodes_of_one_image():
    services = yaml.safe_load(COMPOSE)["services"]
    assert set(services) == {"head", "worker"}
    assert services["head"]["build"] == {"context": ".", "target": "train"}
    assert len({service["image"] for service in services.values()}) == 1
    for service in services.values():
        assert service["command"].startswith("ray start ")
        assert service["volumes"] == ["runs:/workspace/runs"]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--address head:6379" in services["worker"]["command"]
    assert "--head --port 6379" in services["head"]["command"]
    given = yaml.safe_load((ROOT / "docker" / "compose.gpus.yaml").read_text())["services"]
    assert set(given) == set(services)
    gpus = [service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for service in given.values()]
    assert gpus == [["0"], ["1"]]


def test_composes_commands_are_those_of_the_trainer(monkeypatch: pytest.MonkeyPatch):
    on_cpus, on_gpus = [parsed(command, monkeypatch) for command in commands_in_comments(COMPOSE)]
    for num_gpus, args in ((0, on_cpus), (1, on_gpus)):
        assert args.ray_address == "127.0.0.1:6379"
        nodes = [Node(node_id=name, address=name, cpus=8, gpus=num_gpus) for name in ("head", "worker")]
        placement = placed(args, nodes)
        assert {place.node for role in (placement.env, placement.actor) for place in role} == {0, 1}


def test_kuberays_job_is_placed_on_the_cluster_that_it_asks_for(monkeypatch: pytest.MonkeyPatch):
    claim, job = yaml.safe_load_all((ROOT / "docker" / "ray-job.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert defaults()["RAY"].endswith(f"=={cluster['rayVersion']}")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    nodes: list[Node] = []
    for group in groups:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert container["image"].endswith(f":{PROJECT['version']}")
        assert spec["securityContext"]["runAsUser"] == 10001
        (volume,) = spec["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        limits = container["resources"]["limits"]
        for _ in range(group.get("replicas", 1)):
            cpus, gpus = int(limits["cpu"]), int(limits["nvidia.com/gpu"])
            nodes.append(Node(node_id=str(len(nodes)), address="", cpus=cpus, gpus=gpus))

    args = parsed(job["spec"]["entrypoint"], monkeypatch)
    assert args.preset == "libero_spatial_nano"
    (mount,) = container["volumeMounts"]
    assert str(args.output_dir) == mount["mountPath"]
    placement = placed(args, nodes)
    assert [place.node for place in (*placement.env, *placement.rollout, *placement.actor)] == [0, 0, 1]


# --- docs/machines.md ---


def test_the_page_of_machines_names_commands_that_exist(monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "machines.md").read_text()
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    trainers = [text for text in re.findall(r"`([^`\n]+)`", prose) if "algorithms/" in text]
    trainers += re.findall(r"^ +(accelerate launch .+)$", page, re.MULTILINE)
    trainers = [text for text in trainers if "--preset" in text]
    assert len(trainers) >= 8
    for command in trainers:
        assert parsed(command, monkeypatch).preset
    for module in re.findall(r"python -m ((?:benchmarks|tools)\.\w+)", page):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in re.findall(r"\]\(\.\./([\w./]+)\)", page):
        assert (ROOT / path).exists(), path
