"""How fast PPO trains on several GPUs, by where its parts run: a table, then one JSON line.

    python -m benchmarks.scaling --preset libero_spatial_nano --processes 1 2
    python -m benchmarks.scaling --preset libero_spatial_nano --processes 1 2 --fsdp 2 \
        --placements "env:0 rollout:0 actor:1" "env:0-1 rollout:0-1 actor:0-1" --staleness 0 1
    python -m benchmarks.scaling --preset libero_spatial_rlinf --random-weights --processes 1 2 --num-steps 24
    python -m benchmarks.scaling --preset demo --processes 1 --placements "env:cpu rollout:cpu actor:cpu"  # no GPU

Each row is a run of its own, as a user launches it:
    * N processes: `accelerate launch --num_processes N algorithms/ppo_gr00t.py`, all parts on every GPU (DDP);
    * N processes, FSDP2: the same, weights sharded;
    * a placement of `algorithms/async_ppo_gr00t.py`, on a cluster that it makes of this machine, with each staleness.
Rows stand in the order in which they are asked for. All have the same sizes, which are global, and no evaluations; with
other sizes than the preset's, minibatches are the largest that fit and are not larger than its own. A minibatch comes
to the same in any micro-batches: those of one process are the same in all rows, as far as they fit. Iterations that
open scenes, load kernels or play with weights ahead of any update are not counted: the first one, and one more for each
iteration of staleness. Memory is the most that any GPU had in use, of all programs on it, looked at twice a second, in
10^9 bytes. Ratios are to the first row that was measured, of one run each. Interrupted (SIGINT), or if a row fails, it
tells the rows that it has, and ends with status 1; --output has each row as soon as it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from algorithms.common import placement
from algorithms.ppo_gr00t import PRESETS, Args, check_args
from benchmarks import iterations
from benchmarks.command_line import integer, launch_benchmark, make_parser, positive_number, refusals
from benchmarks.publish import Table, publish
from gr00t_agent import Gr00tAgent
from gr00t_agent.config import ModelConfig
from gr00t_agent.data_config import LiberoFrankaDataConfig, read_metadata
from gr00t_agent.loading import NANO_METADATA
from gr00t_agent.policy import preset_policy

TREE = Path(__file__).resolve().parents[1]
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: "no"
num_machines: 1
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: NO_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
# Within this time of a request to stop, a run ends by itself, and a cluster with it. Accelerate's launcher gives its
# processes 30 seconds before it ends them.
STOP_S = 60.0
PHASES = (*iterations.PHASES, "learner_idle_s", "env_idle_s", "unpack_s")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a run's parts are.

    Attributes:
        name: in the table.
        command: what launches it, without the trainer's arguments.
        micro_batch_size: over all processes that learn.
        arguments: of the trainer, beside those that all layouts share.
        uncounted: iterations at the beginning that are not counted.
    """

    name: str
    command: tuple[str, ...]
    micro_batch_size: int
    arguments: tuple[str, ...] = ()
    uncounted: int = 1


class Asked(argparse.Action):
    """Adds what an option names to `asked`, as (option, value): rows come in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Takes in the values of one option."""
        namespace.asked = [*namespace.asked, *((self.dest, value) for value in values)]


def layouts_of(options: Any, args: Args, folder: Path) -> list[Layout]:
    """Returns the layouts that the options ask for, in the order of the table.

    Raises:
        ValueError: the processes of a layout cannot have equal shares of the sizes on this machine.
    """
    launch = (sys.executable, "-m", "accelerate.commands.launch")
    collocated = str(TREE / "algorithms" / "ppo_gr00t.py")
    placed = (sys.executable, str(TREE / "algorithms" / "async_ppo_gr00t.py"))
    layouts: list[Layout] = []
    for option, value in options.asked:
        micro_batch_size = micro_batch_of(option, value, args)
        if option == "processes":
            flags = ("--num_processes", str(value)) + (("--multi_gpu",) if value > 1 else ())
            name = f"{value} process" if value == 1 else f"{value} processes"
            layouts.append(Layout(name=name, command=(*launch, *flags, collocated), micro_batch_size=micro_batch_size))
        elif option == "fsdp":
            config = folder / "fsdp2.yaml"
            config.write_text(FSDP, encoding="utf-8")
            flags = ("--config_file", str(config), "--num_processes", str(value))
            layouts.append(
                Layout(
                    name=f"{value} processes, FSDP2",
                    command=(*launch, *flags, collocated),
                    micro_batch_size=micro_batch_size,
                )
            )
        else:
            for staleness in options.staleness:
                layouts.append(
                    Layout(
                        name=f"{value}, staleness {staleness}",
                        command=placed,
                        micro_batch_size=micro_batch_size,
                        arguments=("--placement", value, "--max-staleness", str(staleness)),
                        uncounted=1 + staleness,
                    )
                )
    return layouts


def micro_batch_of(option: str, value: Any, args: Args) -> int:
    """Returns the micro-batch over all processes that learn in a layout, of which the arguments give that of one.

    Raises:
        ValueError: the processes cannot have equal shares of the sizes on this machine.
    """
    num_gpus = torch.cuda.device_count()
    if option == "placements":
        machine = placement.Node(node_id="", address="this machine", cpus=os.cpu_count() or 1, gpus=num_gpus)
        placement.check_installed()
        placed = placement.place_roles(
            [machine], placement=value, env_on_gpu=args.physics == "warp", num_stages=args.pipeline_stage_num
        )
        sized = iterations.shared(args, len(placed.actor))
        placement.check_shares(sized, placed)
        return sized.micro_batch_size
    if num_gpus and value > num_gpus:
        raise ValueError(f"{option}={value}: there are {num_gpus} GPU(s), and each process needs one")
    sized = iterations.shared(args, value)
    iterations.check_shares(sized, value)
    return sized.micro_batch_size


def write_random_weights(folder: Path) -> None:
    """Writes GR00T-N1.5 with random weights, in bfloat16, and the small tokenizer, which needs no download."""
    released, nano = ModelConfig.preset("gr00t_n1d5"), ModelConfig.preset("nano")
    eagle = released.eagle_json | {"image_token_index": nano.image_token_id}
    config = ModelConfig.from_json(released.model_json, eagle)
    data_config = LiberoFrankaDataConfig(action_horizon=config.action_head.action_horizon)
    torch.manual_seed(0)
    agent = Gr00tAgent.from_config(
        config,
        replace(preset_policy("gr00t_n1d5"), compute_dtype="bfloat16"),
        data_config=data_config,
        metadata=read_metadata(NANO_METADATA, data_config.embodiment_tag),
        tokenizer="nano",
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16,
    )
    agent.save_pretrained(folder)


class GpuMemory:
    """The most that any GPU has had in use while this is open, 10^9 bytes; None without a GPU."""

    def __init__(self) -> None:
        self.most_gb: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> GpuMemory:
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        query = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        while not self._ended.wait(0.5):
            # In a session of its own, or an interruption of this program would end it, too.
            shown = subprocess.run(query, capture_output=True, text=True, check=True, start_new_session=True).stdout
            used_gb = max(float(line) for line in shown.splitlines()) * 2**20 / 1e9
            self.most_gb = max(used_gb, self.most_gb or 0.0)


def measure(layout: Layout, shared: Sequence[str], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Trains once in `folder`, from which a row before is removed, and returns means over the counted iterations.

    Raises:
        RuntimeError: the run failed or took too long; tells the end of its output.
    """
    if folder.exists():
        shutil.rmtree(folder)  # a checkpoint of GR00T-N1.5 has 20 GB
    folder.mkdir()
    log = folder / "output.txt"
    # `accelerate launch --cpu` would start runs that know nothing of each other.
    environment = os.environ if torch.cuda.is_available() else os.environ | {"ACCELERATE_USE_CPU": "true"}
    own = ["--micro-batch-size", str(layout.micro_batch_size), *layout.arguments]
    command = [*layout.command, *shared, *own, "--output-dir", str(folder), "--run-name", "run"]
    with GpuMemory() as memory, log.open("w", encoding="utf-8") as output:
        started = subprocess.Popen(
            command, cwd=TREE, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = started.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"none within {timeout_s:g} s"
        finally:
            stop(started)
    if code != 0:
        end = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"ended with code {code}; the end of its output:\n{end}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return iterations.summarise(lines[layout.uncounted :], PHASES) | {"memory_gb": memory.most_gb}


def stop(started: subprocess.Popen[Any]) -> None:
    """Asks a run that has not ended to do so, and then ends it with what it has launched.

    The processes of a cluster, and those that Accelerate launches, are in sessions of their own, so that only the run
    itself can end them.
    """
    try:
        if started.poll() is None:
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="libero_spatial_nano")
    count = integer(at_least=1)
    parser.add_argument("--processes", action=Asked, type=count, nargs="+", help="by Accelerate, DDP")
    parser.add_argument("--fsdp", action=Asked, type=count, nargs="+", help="by Accelerate, FSDP2")
    parser.add_argument("--placements", action=Asked, nargs="+", help="by Ray")
    parser.set_defaults(asked=[])
    parser.add_argument("--staleness", type=int, choices=(0, 1, 2), nargs="+", default=[0], help="of each placement")
    parser.add_argument("--num-envs", type=count, help="default: the preset's")
    parser.add_argument("--num-steps", type=count, help="decisions of each, default: the preset's")
    parser.add_argument("--micro-batch-size", type=count, help="of a process, default: the preset's")
    parser.add_argument("--num-iterations", type=count, default=2, help="counted ones")
    parser.add_argument("--random-weights", action="store_true", help="GR00T-N1.5 with them, nothing downloaded")
    parser.add_argument("--timeout-s", type=positive_number, default=600.0, help="of a row")
    options = parser.parse_args()
    if not options.asked:
        parser.error("nothing to measure: give --processes, --fsdp or --placements")
    with refusals(parser):
        args = iterations.resized(
            replace(
                PRESETS[options.preset],
                num_iterations=options.num_iterations,
                imitation_iterations=0,  # whose updates are longer than the others
                critic_warmup_iterations=0,
                output_dir=Path(tempfile.gettempdir()),
            ),
            num_envs=options.num_envs,
            num_steps=options.num_steps,
            micro_batch_size=options.micro_batch_size,
        )
        check_args(args)
        for option, value in options.asked:
            micro_batch_of(option, value, args)
    arguments = {
        "preset": options.preset,
        "num-envs": args.num_envs,
        "num-steps": args.num_steps,
        "minibatch-size": args.minibatch_size,
        "imitation-iterations": args.imitation_iterations,
        "critic-warmup-iterations": args.critic_warmup_iterations,
        "eval-interval": 0,
        "eval-episodes-per-task": 0,
        "save-interval": 0,
        "keep-best": 0,
    }
    shared = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    shared += ["--no-eval-before", "--log-with"]

    print(f"{iterations.describe_sizes(args)} a process")
    table = Table(
        {
            "where": "<44",
            "env-steps/s": ">12.1f",
            "times first": ">12.2f",
            **iterations.COLUMNS,
            "idle s": ">8.2f",
            "GPU GB": ">8.1f",
        }
    )
    settings = {
        "num_iterations": options.num_iterations,
        "random_weights": options.random_weights,
        "micro-batch-size-of-a-process": args.micro_batch_size,
        **arguments,
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, row: dict[str, Any]) -> None:
        rows.append({"where": name, **row})
        speedup = rows[-1]["speedup"] = row["env_steps_per_s"] / rows[0]["env_steps_per_s"]
        rates = (row["env_steps_per_s"], speedup)
        table.add(name, *rates, *iterations.cells(row), row["learner_idle_s"], row["memory_gb"])
        publish("scaling", {"layouts": rows}, settings=settings, output=options.output, is_last=False)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.random_weights:
            write_random_weights(folder / "weights")
            shared += ["--model", str(folder / "weights")]
        measures: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        for layout in layouts_of(options, args, folder):
            length = ("--num-iterations", str(layout.uncounted + options.num_iterations))
            run = partial(measure, layout, [*shared, *length], folder / "row", options.timeout_s)
            measures.append((layout.name, run))
        failures = iterations.measure_rows(measures, add)

    document = publish("scaling", {"layouts": rows}, settings=settings, output=options.output)
    if failures:
        sys.exit("\n\n".join(failures))
    return document


if __name__ == "__main__":
    launch_benchmark(main)
