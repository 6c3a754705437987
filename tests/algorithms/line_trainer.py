"""The trainers on the line environment, in this process (`train`) or as a program of its own (`command`).

python -m tests.algorithms.line_trainer ppo '{"num_iterations": 3, "output_dir": "runs"}'
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from algorithms import dsrl_gr00t, grpo_gr00t, ppo_gr00t
from algorithms.common import processes
from examples.own_agent_in_ppo import MLPAgent
from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, read_metadata
from gr00t_agent.loading import NANO_METADATA
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.tiny_agent import tiny_agent

TRAINERS = {"ppo": ppo_gr00t, "grpo": grpo_gr00t, "dsrl": dsrl_gr00t}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": dict(
        num_iterations=2, num_envs=8, num_steps=16, num_action_chunks=2, horizon=12, minibatch_size=32,
        micro_batch_size=32, update_epochs=4, learning_rate=3e-3, value_learning_rate=3e-3, eval_episodes_per_task=0,
        log_with=(),
    ),
    "grpo": dict(
        num_iterations=2, num_envs=16, group_size=8, num_groups=4, max_rollouts=4, num_action_chunks=2,
        num_minibatches=4, update_epochs=4, learning_rate=3e-3, eval_episodes_per_task=0, log_with=(),
    ),
    "dsrl": dict(
        num_iterations=3, num_envs=8, num_steps=8, num_action_chunks=2, horizon=12, warmup_iterations=1,
        replay_capacity=160, num_updates=4, minibatch_size=32, num_critics=3, latent_dim=16, hidden_dims=(32, 32),
        noise_form="repeated", eval_episodes_per_task=0, log_with=(),
    ),
}  # fmt: skip
AUTORESET = {"ppo": AutoresetMode.SAME_STEP, "grpo": AutoresetMode.DISABLED, "dsrl": AutoresetMode.SAME_STEP}


class LineFlow(nn.Module):
    """A frozen policy of chunks of four steps whose actions are their noise, of which a sixth is added to each.

    Its features are the position and its square.
    """

    noise_shape, action_dim, value_feature_dim, image_size = (4, 8), 7, 2, 8

    def __init__(self, num_action_chunks: int) -> None:
        super().__init__()
        self.num_action_chunks = num_action_chunks
        self.sixth = nn.Parameter(torch.tensor(1 / 6))

    def encode(self, obs: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.as_tensor(obs["state.x"])}

    def value_features(self, encoded: Any) -> torch.Tensor:
        return torch.cat([encoded["x"], encoded["x"] ** 2], -1)

    def predict(self, encoded: Any, *, noise: torch.Tensor) -> torch.Tensor:
        return noise[:, : self.num_action_chunks, :7] * (1 + self.sixth)


class SlowLineEnv(LineVectorEnv):
    """Takes its time, so that a test can stop the program in the middle of a rollout."""

    def step(self, actions: Any) -> Any:
        time.sleep(0.02)
        return super().step(actions)


def make_args(algorithm: str, folder: Path, **changes: Any) -> Any:
    return TRAINERS[algorithm].Args(**(DEFAULTS[algorithm] | dict(output_dir=Path(folder)) | changes))


def make_mlp_agent(args: Any) -> MLPAgent:
    return MLPAgent(("state.x",), 1, args.num_action_chunks)


def make_line_flow(args: Any) -> LineFlow:
    return LineFlow(args.num_action_chunks)


def make_tiny_agent(args: Any) -> Gr00tAgent:
    """A GR00T of 300,000 parameters with a frozen backbone."""
    metadata = read_metadata(NANO_METADATA, LiberoFrankaDataConfig().embodiment_tag)
    names = ("num_action_chunks", "noise_method", "noise_level", "denoising_steps", "logprob_level")
    agent = tiny_agent(metadata, **{name: getattr(args, name) for name in names if hasattr(args, name)})
    train_backbone = getattr(args, "train_backbone", False)
    agent.set_trainable(
        tune_visual=train_backbone,
        tune_llm=train_backbone,
        tune_vl_self_attention=getattr(args, "train_vl_self_attention", True),
    )
    return agent


MAKE_AGENT = {"ppo": make_mlp_agent, "grpo": make_mlp_agent, "dsrl": make_line_flow}


def train(
    algorithm: str, folder: Path, *, make_agent: Any = None, env: Any = LineVectorEnv, **changes: Any
) -> dict[str, float]:
    make_agent = make_agent or MAKE_AGENT[algorithm]

    def make_envs(args: Any, num_envs: int, image_size: int, autoreset: Any = AUTORESET[algorithm]) -> Any:
        return env(num_envs, args.num_action_chunks, autoreset=autoreset, image_size=image_size)

    return TRAINERS[algorithm].main(make_args(algorithm, folder, **changes), make_agent, make_envs)


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "charts/"))}


def logged(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [without_time(json.loads(line)) for line in lines]


def shard(accelerator: Accelerator) -> Accelerator:
    """FSDP2 on CPUs, which PyTorch can do and Accelerate does not offer."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=True)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def release_process_group() -> None:
    """DTensor's caches hold the meshes, and these the group, for ever."""
    for mesh in [item for item in gc.get_objects() if isinstance(item, DeviceMesh)]:
        vars(mesh).get("_pg_registry", {}).clear()


def print_gloo_threads() -> None:
    print(f"Gloo threads: {sum('gloo' in path.read_text() for path in Path('/proc/self/task').glob('*/comm'))}")


def command(algorithm: str, **changes: Any) -> list[str]:
    """What runs `train` in a process of its own."""
    return ["-m", "tests.algorithms.line_trainer", algorithm, json.dumps(changes)]


def main() -> None:
    algorithm, text = sys.argv[1:]
    changes = json.loads(text)
    torch.set_num_threads(1)
    if is_sharded := changes.pop("sharded", False):
        make_accelerator = processes.make_accelerator
        processes.make_accelerator = lambda *inputs: shard(make_accelerator(*inputs))
    agents = {"default": MAKE_AGENT[algorithm], "tiny": make_tiny_agent}
    envs = {"fast": LineVectorEnv, "slow": SlowLineEnv}
    folder = Path(changes.pop("output_dir"))
    if changes.get("resume") not in (None, "auto"):
        changes["resume"] = Path(changes["resume"])
    make_agent, env = agents[changes.pop("agent", "default")], envs[changes.pop("env", "fast")]
    train(algorithm, folder, make_agent=make_agent, env=env, **changes)
    if is_sharded:
        release_process_group()


if __name__ == "__main__":
    atexit.register(print_gloo_threads)  # the last to run
    main()
