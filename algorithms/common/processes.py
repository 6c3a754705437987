"""What the trainers need of several processes: typed reductions, sharded weights, work that one process does for all.

Accelerate runs the trainers on one process, under DistributedDataParallel, or sharded by FSDP2 (`fsdp_version: 2` in
an `accelerate config`); everything here is the same call in all three. Under FSDP2 every forward pass is a collective
operation: all processes must make the same number of them. The agent is sharded as one unit (`fsdp_auto_wrap_policy:
NO_WRAP`), because its action head uses parts of its blocks outside their forward passes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")

# One process evaluates or saves while the others wait; NCCL's ten minutes would end the run.
_COLLECTIVE_TIMEOUT = timedelta(hours=12)
# What a trainer calls on an agent besides `forward`.
_AGENT_METHODS = ("get_action_and_value", "get_value", "encode", "predict")


def make_accelerator(log_with: Sequence[str], output_dir: Path) -> Accelerator:
    """Returns the accelerator of this process, with its trackers logging below `output_dir`.

    Raises:
        ValueError: a tracker is not installed, or the launch asks for FSDP1, DeepSpeed, or FSDP2 in mixed precision.
    """
    usable = [str(name.value) for name in get_available_trackers()]
    missing = [name for name in log_with if name not in usable]
    if missing:  # Accelerate would leave them out without a word
        raise ValueError(
            f"log_with={missing} cannot be used (installed here: {', '.join(usable)}); install it with pip, or check "
            "the name"
        )
    timeout = InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)
    accelerator = Accelerator(
        log_with=cast(Any, list(log_with) or None), project_dir=str(output_dir), kwargs_handlers=[timeout]
    )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"distributed_type={kind.value} is not supported (supported: one process, DDP, FSDP with fsdp_version: 2); "
            "change it with `accelerate config`"
        )
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision} with FSDP2 rounds what the agent returns, "
            "log-probabilities too; launch with --mixed_precision no and give --compute-dtype bfloat16"
        )
    return accelerator


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
    """Returns `work(folder, *inputs)`, done by the main process while the others wait.

    Sharded weights need every process: then all do the same, the others with a folder that is thrown away.
    """
    if accelerator.is_main_process:
        result = [work(folder, *inputs)]
    elif accelerator.is_fsdp2:
        with tempfile.TemporaryDirectory() as scratch:
            result = [work(Path(scratch), *inputs)]
    else:
        result = [0.0]
    return broadcast_object_list(result)[0]
