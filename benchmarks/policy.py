"""How fast the policy decides and learns: a table, then one JSON document on the last line.

    python -m benchmarks.policy                       # released size on a GPU, nano on a CPU
    python -m benchmarks.policy --preset nano --batch-size 4

One decision is preprocessing, backbone, N denoising steps and the value, from images in host memory. It is measured
    * in the reference's order of work: prompts padded to 570 tokens (nano: to the same share), masked attention over
      them, keys and values of the cross-attention computed anew in every denoising step, no compilation;
    * plain: this package without compilation;
    * compiled: the same through torch.compile.
Ratios are of one run. Weights are random: the time does not depend on them. The rate that operations are compared
with is that of a large matrix product of the same type on the same device, measured here as well.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals
from benchmarks.publish import Table, judge, publish
from gr00t_agent import FlowAction, Gr00tAgent, PolicyConfig, preset_policy
from gr00t_agent.config import ModelConfig, PresetName
from gr00t_agent.sampler import Prediction
from gr00t_agent.transforms import IMAGE_CONTEXT, NANO_TOKENIZER
from gr00t_agent.weights import to_device

# RLinf's padding_value for LIBERO.
REFERENCE_PROMPT_LENGTH = 570
# For the released size on one H100, see `targets_apply`.
AT_LEAST = {"decision_speedup_over_reference": 2.0, "decision_share_of_matrix_rate": 0.65}
AT_MOST = {"preprocess_ms": 5.0, "update_peak_memory_gb": 80.0}
# Of torch.compile, and none.
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
INSTRUCTIONS = (
    "open the middle drawer of the cabinet",
    "pick up the black bowl on the stove and place it on the plate",
)


class StandInTokenizer(PreTrainedTokenizerFast):
    """The nano tokenizer with the image token moved to where the released network expects it.

    Qwen's tokenizer would have to be downloaded; only the number of tokens matters for speed.
    """

    def __init__(self, image_token_id: int) -> None:
        super().__init__(tokenizer_file=str(NANO_TOKENIZER))
        self._image_token_id = image_token_id

    def encode(self, text: str, **options: Any) -> list[int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return token ids."""
        own = super().convert_tokens_to_ids(IMAGE_CONTEXT)
        return [self._image_token_id if token == own else token for token in super().encode(text, **options)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token."""
        return self._image_token_id if tokens == IMAGE_CONTEXT else super().convert_tokens_to_ids(tokens)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id."""
        return IMAGE_CONTEXT if ids == self._image_token_id else super().convert_ids_to_tokens(ids, skip_special_tokens)


def make_agent(preset: PresetName, policy: PolicyConfig, device: torch.device, dtype: torch.dtype) -> Gr00tAgent:
    """Build the agent with a frozen backbone."""
    tokenizer = StandInTokenizer(ModelConfig.preset(preset).image_token_id)
    torch.manual_seed(0)
    agent = Gr00tAgent.from_preset(preset, policy=policy, tokenizer=tokenizer, device=device, dtype=dtype)
    agent.set_trainable(tune_visual=False, tune_llm=False)
    return agent.eval()


def make_observation(batch_size: int, image_size: int, seed: int = 0) -> dict[str, Any]:
    """Return a random LIBERO observation in host memory."""
    rng = np.random.default_rng(seed)
    obs: dict[str, Any] = {
        key: rng.integers(0, 255, (batch_size, image_size, image_size, 3), dtype=np.uint8)
        for key in ("video.image", "video.wrist_image")
    }
    for part in ("x", "y", "z", "roll", "pitch", "yaw"):
        obs[f"state.{part}"] = rng.uniform(-0.3, 0.3, (batch_size, 1)).astype(np.float32)
    obs["state.gripper"] = rng.uniform(-0.04, 0.04, (batch_size, 2)).astype(np.float32)
    obs["annotation.human.action.task_description"] = [INSTRUCTIONS[i % 2] for i in range(batch_size)]
    return obs


def targets_apply(preset: PresetName, device: torch.device) -> bool:
    """Return whether what was measured is what the targets speak of: the released size on a GPU."""
    return preset == "gr00t_n1d5" and device.type == "cuda"


def seconds(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Return the median wall time of `call`."""
    times: list[float] = []
    for i in range(warmup + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large matrix product in FLOP/s."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, repeats=10)


@torch.no_grad()
def decide(agent: Gr00tAgent, obs: dict[str, Any]) -> Tensor:
    """One decision of a rollout."""
    action, _, _, value = agent.get_action_and_value(obs)
    return action.env_action + value[:, None, None]


@torch.no_grad()
def decide_in_reference_order(agent: Gr00tAgent, obs: dict[str, Any]) -> Tensor:
    """One decision with the reference's order of work; `agent` pads on the right."""
    head, sampler, policy = agent.action_head, agent.sampler, agent.policy
    encoded = agent.encode(obs)
    dtype = head.vlln.weight.dtype
    context = head.prepare(encoded["backbone_features"], None, encoded["state"].to(dtype), agent.embodiment)

    def velocity(x: Tensor, step: Tensor) -> Prediction:
        fresh = context._replace(keys_values=head.model.cross_keys_values(context.vl_embs))
        bucket = step * agent.config.action_head.num_timestep_buckets // policy.denoising_steps
        return Prediction(head.velocity(fresh, x.to(dtype), bucket)[0], None)

    batch_size, config = len(context.vl_embs), agent.config.action_head
    noise = torch.randn(batch_size, config.action_horizon, config.action_dim, device=agent.device)
    index = sampler.draw_index(batch_size, agent.device)
    chain, _ = sampler.sample(velocity, noise, index)
    pooled = torch.cat([head.pooled(context), context.state_features.flatten(1)], dim=-1)
    assert head.value_head is not None
    return agent.env_action(chain[:, -1]) + head.value_head(pooled)[:, None, None]


def measure_update(agent: Gr00tAgent, obs: dict[str, Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Measure a PPO update of the head: cached features against recomputing the backbone; whole AdamW step."""
    agent.train()
    groups = agent.param_groups(5e-6, 1e-4)
    optimizer = torch.optim.AdamW(groups, foreach=False)
    encoded = agent.encode(obs)
    batch_size = len(encoded["state"])
    with torch.no_grad():
        action: FlowAction = agent.get_action_and_value(encoded)[0]

    def backward(source: Any) -> None:
        _, logprob, _, value = agent.get_action_and_value(source, action)
        (logprob.mean() + value.square().mean()).backward()

    def step() -> None:
        optimizer.zero_grad()
        backward(encoded)
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_s = seconds(step, device, repeats)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    cached_s = seconds(lambda: backward(encoded), device, repeats)
    recomputed_s = seconds(lambda: backward(obs), device, repeats)
    return {
        "update_batch_size": batch_size,
        "update_cached_samples_per_s": batch_size / cached_s,
        "update_recomputed_samples_per_s": batch_size / recomputed_s,
        "update_cached_speedup": recomputed_s / cached_s,
        "update_with_optimizer_samples_per_s": batch_size / step_s,
    } | ({"update_peak_memory_gb": peak} if device.type == "cuda" else {})


def measure_decision(
    preset: PresetName, policy: PolicyConfig, device: torch.device, batch_size: int, repeats: int, compile_mode: str
) -> dict[str, float]:
    """Measure decisions in the reference's order, plain and compiled, and their share of the matrix rate."""
    dtype = policy.torch_dtype
    results = {"matrix_tflops": matrix_rate(device, dtype) / 1e12}
    agent = make_agent(preset, policy, device, dtype)
    obs, one = make_observation(batch_size, agent.image_size), make_observation(1, agent.image_size)
    num_image_tokens, own_length = 2 * agent.config.num_image_tokens, agent.preprocessor.layout.length

    def preprocess() -> None:
        agent.preprocessor.images(obs, device)
        agent.preprocessor.state(obs, device)
        agent.preprocessor.tokens(obs, device)

    results["preprocess_ms"] = 1e3 * seconds(preprocess, device, repeats)
    with FlopCounterMode(display=False) as counter:
        decide(agent, obs)
    results["decision_tflop"] = counter.get_total_flops() / 1e12
    results["decision_plain_ms"] = 1e3 * seconds(lambda: decide(agent, obs), device, repeats)
    results["decision_batch_1_plain_ms"] = 1e3 * seconds(lambda: decide(agent, one), device, repeats)
    best = results["decision_plain_ms"]
    if compile_mode != "off":
        agent.compile_network(None if compile_mode == "default" else compile_mode)
        results["decision_compiled_ms"] = best = 1e3 * seconds(lambda: decide(agent, obs), device, repeats, 4)
        results["decision_batch_1_compiled_ms"] = 1e3 * seconds(lambda: decide(agent, one), device, repeats, 4)
    share = REFERENCE_PROMPT_LENGTH / 512
    length = max(round(num_image_tokens * share), own_length if preset == "nano" else 0)
    reference = make_agent(preset, replace(policy, padding="right", prompt_length=length), device, dtype)
    results["decision_reference_order_ms"] = 1e3 * seconds(
        lambda: decide_in_reference_order(reference, obs), device, repeats
    )
    results["decision_speedup_over_reference"] = results["decision_reference_order_ms"] / best
    results["decision_share_of_matrix_rate"] = results["decision_tflop"] / (best / 1e3) / results["matrix_tflops"]
    return results


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=["nano", "gr00t_n1d5"], help="default: by device")
    parser.add_argument(
        "--batch-size", type=integer(at_least=1), help="environments of a decision (default: 64 on a GPU, else 4)"
    )
    parser.add_argument(
        "--update-batch-size", type=integer(at_least=1), help="decisions of an update (default: 128 on a GPU, else 32)"
    )
    parser.add_argument("--repeats", type=integer(at_least=1), default=10)
    parser.add_argument(
        "--compile-mode", choices=COMPILE_MODES, default="default", help="mode of torch.compile, or `off`"
    )
    args = parser.parse_args()
    with refusals(parser):
        device = to_device(args.device)
    on_gpu = device.type == "cuda"
    preset: PresetName = args.preset or ("gr00t_n1d5" if on_gpu else "nano")
    batch_size = args.batch_size or (64 if on_gpu else 4)
    update_batch_size = args.update_batch_size or (128 if on_gpu else 32)
    policy = replace(preset_policy(preset), embodiment_id=0, compute_dtype="bfloat16" if on_gpu else "float32")
    results = measure_decision(preset, policy, device, batch_size, args.repeats, args.compile_mode)
    if on_gpu:
        torch.cuda.empty_cache()
    # float32 master weights of the trained part, arithmetic in the policy's type.
    learner = make_agent(preset, policy, device, torch.float32)
    learner.backbone.to(policy.torch_dtype)
    results |= measure_update(learner, make_observation(update_batch_size, learner.image_size), device, args.repeats)

    table = Table({"metric": "<40", "": ">13.3f"})
    for name, value in results.items():
        table.add(name, value)
    settings = {
        "preset": preset,
        "device": args.device,
        "compute_dtype": policy.compute_dtype,
        "batch_size": batch_size,
        "update_batch_size": update_batch_size,
        "repeats": args.repeats,
        "compile_mode": args.compile_mode,
        "num_threads": torch.get_num_threads(),
    }
    return publish(
        "policy",
        {name: round(value, 4) for name, value in results.items()},
        settings=settings,
        targets=judge(results, at_least=AT_LEAST, at_most=AT_MOST) if targets_apply(preset, device) else None,
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
