"""What the trainers need of several processes: typed reductions, sharded weights, work that one process does for all.

Accelerate runs the trainers on one process, under DistributedDataParallel, or sharded by FSDP2 (`fsdp_version: 2` in
an `accelerate config`); everything here is the same call in all three. Under FSDP2 every forward pass is a collective
operation: all processes must make the same number of them. The agent is sharded as one unit (`fsdp_auto_wrap_policy:
NO_WRAP`), because its action head uses parts of its blocks outside their forward passes.

A process that is stopped, cut off or gone does not hold the others for long: they notice its silence
(`algorithms.common.watch`), collective operations have a time-out, and a process ends with its launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from algorithms.common.args import launched_processes
from algorithms.common.watch import Watch
from gr00t_agent.files import json_ready

T = TypeVar("T")

# Longer than any two processes are apart, except where one works and the others wait patiently.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# What a trainer calls on an agent besides `forward`.
_AGENT_METHODS = ("get_action_and_value", "get_value", "encode", "predict")
# What a launcher's command line names.
_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_PR_SET_PDEATHSIG = 1
# Names of places, which may differ from host to host.
_PLACES = {"cache_dir"}


def make_accelerator(log_with: Sequence[str], output_dir: Path, *, cpu: bool = False) -> Accelerator:
    """Returns the accelerator of this process, with its trackers logging below `output_dir`.

    Args:
        log_with: names of the trackers.
        output_dir: where they log.
        cpu: this process computes nothing, and leaves GPUs to others.

    Raises:
        ValueError: a tracker is not installed, or the launch asks for what the trainers do not do or would do wrongly:
            FSDP1, DeepSpeed, FSDP2 in mixed precision, fp16, gradient accumulation, compilation by Accelerate, or
            several processes that know nothing of each other.
    """
    usable = [str(name.value) for name in get_available_trackers()]
    missing = [name for name in log_with if name not in usable]
    if missing:  # Accelerate would leave them out without a word
        raise ValueError(
            f"log_with={missing} cannot be used (installed here: {', '.join(usable)}); install it with pip, or check "
            "the name"
        )
    _end_with_launcher()
    timeout = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    accelerator = Accelerator(
        cpu=cpu, log_with=cast(Any, list(log_with) or None), project_dir=str(output_dir), kwargs_handlers=[timeout]
    )
    _check_launch(accelerator)
    if accelerator.is_main_process and not cpu:
        print(f"processes    {accelerator.num_processes}", flush=True)
    if accelerator.num_processes > 1:
        Watch.start(accelerator)
    return accelerator


def check_alone() -> None:
    """Raises ValueError if a launcher started several processes of a program that is one."""
    launched = launched_processes()
    if launched > 1:
        raise ValueError(
            f"{launched} processes were launched, and each would do all of the work: start this program by python, "
            "without accelerate, torchrun or mpirun"
        )


def refuse_sharding() -> None:
    """Raises ValueError if this process was started for FSDP, by a program that keeps weights whole."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "FSDP is not supported here (ACCELERATE_USE_FSDP is set): learners hold whole weights, which they hand on; "
            "unset it, and start the program by python without `accelerate launch`"
        )


def _check_launch(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    is_data_parallel = kind == DistributedType.NO or kind.value.startswith("MULTI_")
    if not (is_data_parallel or (kind == DistributedType.FSDP and accelerator.is_fsdp2)):
        raise ValueError(
            f"distributed_type={kind.value} is not supported (supported: one process, DDP, FSDP with fsdp_version: 2); "
            "change it with `accelerate config`"
        )
    precision = accelerator.mixed_precision
    if accelerator.is_fsdp2 and precision != "no":
        raise ValueError(
            f"mixed_precision={precision} with FSDP2 rounds what the agent returns, "
            "log-probabilities too; launch with --mixed_precision no and give --compute-dtype bfloat16"
        )
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={precision} is not supported (supported: no, bf16): it would scale the gradients that "
            "are clipped and checked; launch with --mixed_precision bf16"
        )
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"gradient_accumulation_steps={steps} would divide every gradient by {steps}; unset "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or set it to 1 with `accelerate config`, and give a smaller "
            "--micro-batch-size instead"
        )
    if (backend := cast(Any, accelerator.state).dynamo_plugin.backend) != DynamoBackend.NO:
        raise ValueError(
            f"dynamo_backend={backend.value} would compile the model that is trained and not the one that acts; unset "
            "ACCELERATE_DYNAMO_BACKEND, or change it with `accelerate config`, and give --compile instead"
        )
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "a parallelism_config is not supported (supported: one process, DDP, FSDP with fsdp_version: 2); unset "
            "ACCELERATE_USE_PARALLELISM_CONFIG, or change it with `accelerate config`"
        )
    launched = launched_processes()
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate runs {accelerator.num_processes} here: each would "
            "make the whole run by itself. On a CPU set ACCELERATE_USE_CPU=true; with GPUs see that PyTorch finds them"
        )


def _end_with_launcher() -> None:
    """Has this process asked to stop when its launcher dies, which could not pass on a request itself."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_text("utf-8", "replace").split("\0")
    except OSError:  # it belongs to somebody else, or is gone
        return
    if not any(part in _LAUNCHERS or Path(part).name in _LAUNCHERS for part in command):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != launcher:  # it died in between
        raise SystemExit("the launcher has ended")


def wait_for_main(accelerator: Accelerator) -> None:
    """Has all processes wait until the main one comes here, however long it works before; collective."""
    if (watch := Watch.current) is not None and accelerator.num_processes > 1:
        if accelerator.is_main_process:
            watch.say_done()
        else:
            watch.wait()


def leave(*, farewell: bool) -> None:
    """Says that this process takes part in no further collective operation.

    Args:
        farewell: the run is over, and the others may go on without this process; otherwise they end when it has.
    """
    if Watch.current is not None:
        Watch.current.leave(farewell=farewell)


@contextmanager
def main_first(accelerator: Accelerator) -> Generator[None]:
    """Has the main process do something before the others do, however long it takes; collective."""
    if not accelerator.is_main_process:
        wait_for_main(accelerator)
    yield
    if accelerator.is_main_process:
        wait_for_main(accelerator)


def check_same_args(accelerator: Accelerator, args: Any) -> None:
    """Raises ValueError on all processes if one has other arguments than the main one; collective."""
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([json_ready(args)])
    for rank, other in enumerate(others, 1):
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        differing = [f"{n}={other.get(n)!r} (process 0: {first.get(n)!r})" for n in names if n not in _PLACES]
        if differing:
            raise ValueError(
                f"process {rank} has other arguments than process 0: {', '.join(differing)}; launch all with the same"
            )


def same_cuda_device() -> Callable[[], None]:
    """Returns what a new thread calls to use the CUDA device of this one; by itself it would use the first."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def prepare(accelerator: Accelerator, agent: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Returns the model to call for gradients and the optimiser; `agent` itself stays the one to call without."""
    if accelerator.is_fsdp2:
        # Every process has built the whole agent, and loading it from one does not work for a module with buffers.
        cast(Any, accelerator.state).fsdp_plugin.cpu_ram_efficient_loading = False
    model, prepared = accelerator.prepare(agent, optimizer)
    for name in _AGENT_METHODS:
        if accelerator.is_fsdp2 and hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model, prepared


def over_processes(accelerator: Accelerator, value: Tensor, how: Literal["sum", "mean", "max"]) -> Tensor:
    """Returns `value` combined element by element over all processes; the same on each."""
    if how == "max":
        return cast(Tensor, accelerator.gather(value[None])).amax(dim=0)
    return cast(Tensor, accelerator.reduce(value, how))


def mean_and_variance(accelerator: Accelerator, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and population variance of the elements of all processes' `values`, float64 scalars."""
    values = values.double()
    count = values.new_tensor(float(values.numel()))
    total = over_processes(accelerator, torch.stack([values.sum(), count]), "sum")
    mean = total[0] / total[1]
    return mean, over_processes(accelerator, (values - mean).square().sum(), "sum") / total[1]


def group_means(accelerator: Accelerator, values: Tensor, groups: Tensor) -> Tensor:
    """Returns for each element the mean over all processes' elements of its group, shaped as `values`.

    Args:
        accelerator: Of the run.
        values: Any shape.
        groups: int64 like `values`, numbers from 0.
    """
    num_groups = int(over_processes(accelerator, groups.max(), "max")) + 1
    sums = torch.zeros((2, num_groups), dtype=torch.float64, device=values.device)  # of values, and how many
    sums[0].index_add_(0, groups.flatten(), values.double().flatten())
    sums[1].index_add_(0, groups.flatten(), sums.new_ones(groups.numel()))
    totals, counts = over_processes(accelerator, sums, "sum")
    return (totals / counts)[groups].to(values.dtype)


def explained_variance(accelerator: Accelerator, values: Tensor, returns: Tensor) -> float:
    """Returns 1 - Var[returns - values] / Var[returns] over all processes; NaN or -inf where returns do not vary."""
    residual, total = (mean_and_variance(accelerator, x)[1] for x in (returns - values, returns))
    return (1 - residual / total).item()


def clip_grad_norm(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradients' joint norm and returns what it was before, float32 scalar."""
    norm = cast(Tensor, accelerator.clip_grad_norm_(list(parameters), max_norm))
    return whole(norm).float()


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be sharded over processes as a whole; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Returns what `work` returns, or raises what it raises, on all processes; the main one alone does it."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except Exception as error:  # the others would wait for ever
            outcome = [None, error]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def for_all(accelerator: Accelerator, work: Callable[..., float], folder: Path, *inputs: Any) -> float:
    """Returns `work(folder, *inputs)`, done by the main process while the others wait, however long it takes.

    Sharded weights need every process: then all do the same, the others with a folder that is thrown away.

    Args:
        accelerator: of this process.
        work: what is done.
        folder: where it writes.
        inputs: further ones for `work`.

    Raises:
        SystemExit: on all processes, if a request to stop has ended the work.
    """
    result, status = 0.0, cast(Any, None)
    try:
        if accelerator.is_main_process:
            result = work(folder, *inputs)
        elif accelerator.is_fsdp2:
            with tempfile.TemporaryDirectory() as scratch:
                result = work(Path(scratch), *inputs)
    except SystemExit as stop:  # the others wait, and would for ever
        status = stop.code
    wait_for_main(accelerator)
    result, status = cast(Any, broadcast_object_list([result, status]))
    if status is not None:
        raise SystemExit(status)
    return result
