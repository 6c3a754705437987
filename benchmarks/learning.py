"""PPO and GRPO learn a real LIBERO task that begins near its end: success before and after, a table, one JSON line.

    python -m benchmarks.learning --seeds 1 2 3

The task is `libero_goal` task 0, "open the middle drawer of the cabinet", with LIBERO's own physics, controller and
goal. Episodes begin where a scripted expert stands some steps before success: the hand holds the handle and the drawer
is partly open; what is left is to go on pulling without letting go. The policy sees the proprioceptive state, no
images; it is a velocity network of two hidden layers under the flow sampler that the GR00T agent uses, with random
weights, so its first actions are noise. The trainers are those of `algorithms/`, unchanged.

Before: success rate in the first iteration, when the policy is untouched. After: in the last three iterations, with
exploration noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common.episodes import wilson_interval
from benchmarks.publish import Table, judge, make_parser, publish
from gr00t_agent.sampler import FlowSampler, Prediction
from libero_gym.experts import make_expert
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv

SUITE, TASK_ID = "libero_goal", 0
INIT_STATE_IDS = (0, 1, 2, 3)
STEPS_BEFORE_SUCCESS = (3, 6, 9)
HORIZON = 40
ACTION_DIM = 7
# Of the seed that fares worst, for each algorithm.
AT_LEAST = {"after": 0.9}
AT_MOST = {"before": 0.5, "cpu_minutes": 10.0}

PPO_ARGS = ppo_gr00t.Args(
    suite=SUITE,
    task_ids=(TASK_ID,),
    num_envs=16,
    num_steps=16,
    horizon=HORIZON,
    num_iterations=30,
    update_epochs=4,
    minibatch_size=64,
    micro_batch_size=64,
    learning_rate=1e-3,
    value_learning_rate=3e-3,
    vf_coef=0.5,
    gamma=0.9,
    gae_lambda=0.9,
    value_bounds=(0.0, 1.0),
    noise_level=1.0,
    final_noise=0.3,
    target_kl=0.3,
    eval_episodes_per_task=0,
    log_with=(),
)
GRPO_ARGS = grpo_gr00t.Args(
    suite=SUITE,
    task_ids=(TASK_ID,),
    num_envs=16,
    group_size=8,
    num_groups=4,
    max_rollouts=4,
    horizon=HORIZON,
    num_iterations=35,
    update_epochs=4,
    num_minibatches=8,
    learning_rate=5e-4,
    noise_level=1.4,
    final_noise=0.3,
    eval_episodes_per_task=0,
    log_with=(),
)


@cache
def starts() -> tuple[dict[str, NDArray[Any]], ...]:
    """Returns simulation states from which episodes begin, made by running the expert and looking back."""
    task = get_task(SUITE, TASK_ID)
    simulation, expert = Simulation(load_scene(task)), make_expert(task)
    found: list[dict[str, NDArray[Any]]] = []
    for init_state_id in INIT_STATE_IDS:
        simulation.reset(task, init_state_id, np.random.RandomState(0))
        expert.reset(simulation, np.random.default_rng(0))
        passed: list[dict[str, NDArray[Any]]] = []
        while not simulation.success():
            passed.append(simulation.get_state())
            simulation.step(expert.act(simulation))
        found += [passed[-steps] for steps in STEPS_BEFORE_SUCCESS]
    return tuple(found)


class NearGoalEnv(gym.vector.VectorWrapper):
    """A `LiberoVectorEnv` whose episodes begin in one of `starts()`: that with the number of its initial state."""

    def __init__(self, num_envs: int, num_action_chunks: int, horizon: int, autoreset_mode: AutoresetMode) -> None:
        self._base = LiberoVectorEnv(
            SUITE,
            num_envs,
            task_ids=[TASK_ID],
            num_action_chunks=num_action_chunks,
            observe_images=False,
            horizon=horizon,
            autoreset_mode=autoreset_mode,
        )
        super().__init__(self._base)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins episodes; see `LiberoVectorEnv`."""
        _, infos = self._base.reset(seed=seed, options=options)
        mask = np.ones(self.num_envs, dtype=bool) if options is None else options["reset_mask"]
        self._place(np.flatnonzero(mask), infos["init_state_id"])
        return self.observe(), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps; see `LiberoVectorEnv`."""
        _, rewards, terminated, truncated, infos = self._base.step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = {"states": infos["final_obs"]["states"]}
            self._place(np.flatnonzero(terminated | truncated), infos["init_state_id"])
        return self.observe(), rewards, terminated, truncated, infos

    def observe(self) -> dict[str, Any]:
        """Observes proprioception, `states` float32 [N, 8], without stepping."""
        return {"states": self._base.observe()["states"]}

    def _place(self, env_ids: NDArray[np.intp], init_state_ids: NDArray[np.int64]) -> None:
        for i in env_ids:
            now = self._base.get_state(int(i))
            start = starts()[int(init_state_ids[i]) % len(starts())]
            self._base.set_state(int(i), now | start | {"init_state_id": now["init_state_id"]})


class ChainAction(NamedTuple):
    """A denoising chain [B, N+1, C, 7], its stochastic step [B], and what the environment takes [B, C, 7]."""

    chain: Tensor
    denoise_index: Tensor
    env_action: Tensor


class StateFlowAgent(nn.Module):
    """A flow policy on proprioception: the GR00T agent's sampler over a small velocity network, and a value network.

    Untrained, its velocity draws the chain towards holding still with a closed hand.
    """

    image_size = 8
    # Position (m), axis-angle (rad) and fingers (m), brought to about unit size round where the task is done.
    state_scale = (10.0, 10.0, 10.0, 1.0, 1.0, 1.0, 50.0, 50.0)

    def __init__(self, num_action_chunks: int, sampler: FlowSampler, width: int = 64) -> None:
        super().__init__()
        self.sampler, self.chunk_shape = sampler, (num_action_chunks, ACTION_DIM)
        size, state_dim = num_action_chunks * ACTION_DIM, len(self.state_scale)
        self.velocity = nn.Sequential(
            nn.Linear(size + state_dim + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        self.value = nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(cast(nn.Linear, self.velocity[-1]).weight)
        nn.init.zeros_(cast(nn.Linear, self.velocity[-1]).bias)
        rest = torch.zeros(self.chunk_shape)
        rest[:, -1] = 1.0  # the hand closed
        self.register_buffer("rest", rest)
        self.register_buffer("scale", torch.tensor(self.state_scale))

    def encode(self, obs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the scaled state, float32 [B, 8]."""
        return dict(obs) if "state" in obs else {"state": torch.as_tensor(obs["states"]) * cast(Tensor, self.scale)}

    def forward(
        self,
        obs: Mapping[str, Any],
        action: ChainAction | None = None,
        *,
        generator: Sequence[torch.Generator] = (),
        noise_anneal: float = 1.0,
    ) -> tuple[ChainAction, Tensor, Tensor, Tensor]:
        """Samples a chunk, or scores a stored one."""
        state = self.encode(obs)["state"]
        num_steps = self.sampler.num_steps

        def velocity(x: Tensor, step: Tensor) -> Prediction:
            tau = (step / num_steps)[:, None]
            learned = self.velocity(torch.cat([x.flatten(1), state, tau], 1)).view_as(x)
            return Prediction(cast(Tensor, self.rest) - x + learned, None)

        if action is None:
            normal = torch.stack([torch.randn((2, *self.chunk_shape), generator=one) for one in generator])
            index = torch.cat([self.sampler.draw_index(1, state.device, one) for one in generator])
            noise = normal[:, 1].expand(num_steps, *normal[:, 1].shape)
            chain, scores = self.sampler.sample(
                velocity, normal[:, 0], index, step_noise=noise, noise_anneal=noise_anneal
            )
            action = ChainAction(chain, index, chain[:, -1].clamp(-1, 1))
        else:
            scores = self.sampler.evaluate(velocity, action.chain, action.denoise_index, noise_anneal=noise_anneal)
        entropy = scores.entropy.expand_as(scores.log_prob).flatten(1).sum(1)
        return action, scores.log_prob.flatten(1).sum(1), entropy, self.get_value(obs)

    def get_value(self, obs: Mapping[str, Any]) -> Tensor:
        """Returns state values [B]."""
        return self.value(self.encode(obs)["state"])[:, 0]

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Returns optimiser groups."""
        policy, value = list(self.velocity.parameters()), list(self.value.parameters())
        return [{"name": "policy", "params": policy, "lr": lr}, {"name": "value", "params": value, "lr": value_lr}]

    def save_pretrained(self, folder: Path) -> None:
        """Writes the weights."""
        save_file(dict(self.state_dict()), folder / "model.safetensors")


def make_agent(args: Any) -> StateFlowAgent:
    """Returns the policy with random weights."""
    sampler = FlowSampler(num_steps=args.denoising_steps, method=args.noise_method, noise_level=args.noise_level)
    return StateFlowAgent(args.num_action_chunks, sampler)


def train(algorithm: Literal["ppo", "grpo"], seed: int, folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Trains and returns the metrics of each iteration."""
    if algorithm == "ppo":
        trainer, args, autoreset = ppo_gr00t, PPO_ARGS, AutoresetMode.SAME_STEP
    else:
        trainer, args, autoreset = grpo_gr00t, GRPO_ARGS, AutoresetMode.DISABLED

    def make_envs(args: Any, num_envs: int, image_size: int) -> NearGoalEnv:
        return NearGoalEnv(num_envs, args.num_action_chunks, args.horizon, autoreset)

    args = replace(cast(Any, args), seed=seed, output_dir=folder, run_name="{seed}", **changes)
    trainer.main(args, make_agent, make_envs)
    lines = (folder / str(seed) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def success_of(lines: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """Returns successes and episodes of some iterations."""
    episodes = sum(line["env/num_episodes"] for line in lines)
    return round(sum(line["env/success_once"] * line["env/num_episodes"] for line in lines)), round(episodes)


def worst_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns each algorithm's targets with what its worst seed reached."""
    targets: dict[str, Any] = {}
    for algorithm in dict.fromkeys(row["algorithm"] for row in results):
        rows = [row for row in results if row["algorithm"] == algorithm]
        values = {
            "after": min(row["after"][0] / row["after"][1] for row in rows),
            "before": max(row["before"][0] / row["before"][1] for row in rows),
            "cpu_minutes": max(row["cpu_minutes"] for row in rows),
        }
        judged = judge(values, at_least=AT_LEAST, at_most=AT_MOST)
        targets |= {f"{algorithm}/{name}": target for name, target in judged.items()}
    return targets


def main() -> dict[str, Any]:
    """Trains with each algorithm and seed, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", choices=["ppo", "grpo"], default=["ppo", "grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num-iterations", type=int, help="default: 30 of PPO, 35 of GRPO")
    args = parser.parse_args()
    changes = {} if args.num_iterations is None else {"num_iterations": args.num_iterations}
    results: list[dict[str, Any]] = []
    for algorithm in args.algorithms:
        for seed in args.seeds:
            with TemporaryDirectory() as folder:
                start, cpu = time.perf_counter(), time.process_time()
                lines = train(algorithm, seed, Path(folder), **changes)
                wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
            good = (line["iteration"] for line in lines if line["env/success_once"] >= 0.9)
            results.append(
                dict(
                    algorithm=algorithm,
                    seed=seed,
                    before=success_of(lines[:1]),
                    after=success_of(lines[-3:]),
                    env_steps=lines[-1]["global_step"],
                    first_iteration_at_90_percent=next(good, None),
                    cpu_minutes=cpu_s / 60,
                    wall_minutes=wall_s / 60,
                    curve=[round(line["env/success_once"], 3) for line in lines],
                )
            )
    print()
    table = Table(
        {
            "": "<6",
            "seed": ">5",
            "before": ">18",
            "after": ">27",
            ">= 90 % at": ">12",
            "env-steps": ">11",
            "CPU min": ">9.1f",
        }
    )
    for row in results:
        (low, high), after = wilson_interval(*row["after"]), row["after"][0] / row["after"][1]
        table.add(
            row["algorithm"],
            row["seed"],
            f"{row['before'][0] / row['before'][1]:.1%} of {row['before'][1]}",
            f"{after:.1%} ({low:.1%} - {high:.1%})",
            row["first_iteration_at_90_percent"] or "never",
            row["env_steps"],
            row["cpu_minutes"],
        )
    settings = {"suite": SUITE, "task_id": TASK_ID, "steps_before_success": STEPS_BEFORE_SUCCESS, "horizon": HORIZON}
    return publish("learning", results, settings=settings, targets=worst_seeds(results), output=args.output)


if __name__ == "__main__":
    main()
