"""Settings of whole runs: RLinf's published ones for the same models and suites, and ours for one GPU.

What a preset does not name is a trainer's default. RLinf's are those of its repository (0.3-0.4), where 64 environments
play 8 horizons an iteration, 512 episodes: PPO's for GR00T-N1.5, and GRPO's for pi0, applied here to GR00T-N1.5.
docs/training.md says where a run with them differs from RLinf's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Nano policies fine-tuned on 20 demonstrations of each task of a suite, which ship with the repository.
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
SPATIAL_START = str(CHECKPOINTS / "libero_spatial_fewshot")
OBJECT_START = str(CHECKPOINTS / "libero_object_fewshot")
GOAL_START = str(CHECKPOINTS / "libero_goal_fewshot")
LONG_START = str(CHECKPOINTS / "libero_10_fewshot")
FORTY_START = str(CHECKPOINTS / "libero_40_fewshot")  # on all four suites

# What is left of "open the middle drawer of the cabinet" when the hand holds the handle and the drawer is partly open:
# a small network on the robot's state learns it in minutes on a CPU (`python -m benchmarks.learning`).
NEAR_GOAL: dict[str, Any] = dict(
    suite="libero_goal",
    task_ids=(0,),
    steps_before_success=(3, 6, 9),
    num_near_goal_states=4,
    horizon=40,
    model="state",
    num_envs=16,
    update_epochs=4,
    final_noise=0.3,
    eval_before=True,
    eval_episodes_per_task=24,
    eval_videos_per_task=4,
)
SPATIAL_NEAR_GOAL: dict[str, Any] = dict(
    suite="libero_spatial",
    task_ids=None,
    steps_before_success=(4, 8, 12),
    num_near_goal_states=1,
    eval_episodes_per_task=3,
    eval_videos_per_task=1,
)
NEAR_GOAL_PPO: dict[str, Any] = dict(
    num_iterations=18,
    num_steps=16,
    minibatch_size=64,
    micro_batch_size=64,
    learning_rate=1e-3,
    value_learning_rate=3e-3,
    vf_coef=0.5,
    gamma=0.9,
    gae_lambda=0.9,
    value_bounds=(0.0, 1.0),
    noise_level=1.0,
    ignore_last=True,  # with which it learns faster (docs/LOG.md)
    target_kl=0.3,
)
NEAR_GOAL_GRPO: dict[str, Any] = dict(
    num_iterations=22,
    group_size=8,
    num_groups=4,
    max_rollouts=4,
    num_minibatches=8,
    learning_rate=5e-4,
    noise_level=1.4,
)

# Nano policies on one GPU, which simulates too.
NANO: dict[str, Any] = dict(
    num_envs=1024,
    physics="warp",
    task_sampling="adaptive",
    tf32=True,
    logprob_level="action",
    learning_rate=4e-5,
    lr_schedule="linear",
    lr_hold=0.6,
    update_epochs=3,
    micro_batch_size=4096,
    dual_clip=3.0,
    imitation_coef=10.0,
)
# At first by imitation alone.
IMITATION_FIRST: dict[str, Any] = dict(imitation_iterations=2, imitation_learning_rate=2e-4, imitation_epochs=10)
NANO_PPO: dict[str, Any] = NANO | dict(
    num_iterations=19,
    reward="relative",
    num_steps=48,
    truncation="failure",
    value_bounds=(0.0, 1.0),
    center_adv_by_task=True,
    value_learning_rate=1e-3,
    policy_warmup_iterations=1,
    minibatch_size=4096,
    save_interval=6,
    eval_interval=6,
)
NANO_GRPO: dict[str, Any] = (
    NANO
    | IMITATION_FIRST
    | dict(
        num_iterations=10,
        update_epochs=4,
        group_size=8,
        num_groups=64,
        max_rollouts=1,  # 128 groups at most
        baseline="alive",
        num_minibatches=6,
        save_interval=3,
        eval_interval=3,
    )
)

PPO: dict[str, dict[str, Any]] = {
    # A first look: two minutes on a CPU, from random weights to a drawer that is opened.
    "demo": NEAR_GOAL | NEAR_GOAL_PPO | dict(run_name="demo"),
    # Ten minutes on two cores: all tasks of the suite, from where the bowl is over the plate.
    "libero_spatial_laptop": NEAR_GOAL | SPATIAL_NEAR_GOAL | NEAR_GOAL_PPO,
    # RLinf: examples/embodiment/config/libero_spatial_ppo_gr00t.yaml
    "libero_spatial_rlinf": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=400,  # to the published score
        num_action_chunks=5,
        reward="relative",
        compute_dtype="bfloat16",
        num_steps=384,  # 8 horizons of 240 steps in 48 chunks
        truncation="failure",  # RLinf never bootstraps
        learning_rate=5e-6,
        value_learning_rate=1e-4,
        update_epochs=4,
        minibatch_size=1024,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, one GPU: ten minutes (docs/LOG.md). A rollout is a whole horizon, since nothing is imitated of an episode
    # that ends in a later rollout.
    "libero_spatial_nano": NANO_PPO
    | IMITATION_FIRST
    | dict(suite="libero_spatial", model=SPATIAL_START, num_action_chunks=5),
    # GR00T-N1.5 on a GPU of 24 GB: adapters in the DiT and the VL self-attention. Of 2.4 billion weights 0.33 billion
    # are trained (5 GB with moments), and the others are bfloat16 (4 GB). Run with random weights (docs/machines.md).
    "libero_spatial_24gb": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=400,
        num_envs=16,
        num_action_chunks=5,
        reward="relative",
        compute_dtype="bfloat16",
        lora_rank=32,
        lora_alpha=32.0,
        num_steps=48,  # a horizon
        feature_memory_gb=2.0,  # of 1.8 GB
        truncation="failure",
        value_bounds=(0.0, 1.0),
        learning_rate=2e-5,
        value_learning_rate=1e-4,
        critic_warmup_iterations=2,
        update_epochs=2,
        minibatch_size=256,
        micro_batch_size=16,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # The same on a GPU of 80 GB, the whole action head trained: 1.07 billion weights (17 GB with moments). Run with
    # random weights (docs/machines.md).
    "libero_spatial_80gb": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=400,
        num_envs=64,
        num_action_chunks=5,
        reward="relative",
        compute_dtype="bfloat16",
        num_steps=48,  # a horizon
        feature_memory_gb=8.0,  # of 7.3 GB
        truncation="failure",
        value_bounds=(0.0, 1.0),
        learning_rate=5e-6,
        value_learning_rate=1e-4,
        critic_warmup_iterations=2,
        update_epochs=2,
        minibatch_size=1024,
        micro_batch_size=64,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # RLinf: examples/embodiment/config/libero_object_ppo_gr00t.yaml
    "libero_object_rlinf": dict(
        suite="libero_object",
        model="RLinf/RLinf-Gr00t-SFT-Object",
        num_iterations=400,  # to the published score
        num_action_chunks=5,
        reward="relative",
        compute_dtype="bfloat16",
        num_steps=384,  # 8 horizons of 240 steps in 48 chunks
        truncation="failure",  # RLinf never bootstraps
        learning_rate=2e-5,
        value_learning_rate=2e-5,
        update_epochs=1,
        minibatch_size=1024,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, one GPU, as libero_spatial_nano: eight minutes (docs/LOG.md).
    "libero_object_nano": NANO_PPO
    | IMITATION_FIRST
    | dict(suite="libero_object", model=OBJECT_START, num_action_chunks=5),
    # RLinf: examples/embodiment/config/libero_goal_ppo_gr00t.yaml
    "libero_goal_rlinf": dict(
        suite="libero_goal",
        model="RLinf/RLinf-Gr00t-SFT-Goal",
        num_iterations=500,  # to the published score
        num_action_chunks=5,
        reward="relative",
        compute_dtype="bfloat16",
        num_steps=512,  # 8 horizons of 320 steps in 64 chunks
        truncation="failure",  # RLinf never bootstraps
        learning_rate=2e-5,
        value_learning_rate=2e-5,
        update_epochs=1,
        minibatch_size=1024,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, one GPU (docs/LOG.md). A rollout is a whole horizon: two tasks take 260 steps and more, and nothing is
    # imitated of an episode that ends in a later rollout.
    "libero_goal_nano": NANO_PPO
    | dict(
        suite="libero_goal",
        model=GOAL_START,
        num_iterations=21,
        num_action_chunks=5,
        num_steps=64,
        critic_warmup_iterations=2,
        save_interval=7,
        eval_interval=7,
    ),
    # RLinf: examples/embodiment/config/libero_10_ppo_gr00t.yaml
    "libero_10_rlinf": dict(
        suite="libero_10",
        model="RLinf/RLinf-Gr00t-SFT-10",
        num_iterations=300,  # to the published score
        num_action_chunks=10,
        reward="relative",
        compute_dtype="bfloat16",
        num_steps=384,  # 8 horizons of 480 steps in 48 chunks
        truncation="failure",  # RLinf never bootstraps
        learning_rate=2e-5,
        value_learning_rate=2e-5,
        update_epochs=1,
        minibatch_size=1024,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, one GPU, after libero_spatial_nano; 16 iterations came to 60 % (docs/LOG.md).
    "libero_10_nano": NANO_PPO | IMITATION_FIRST | dict(suite="libero_10", model=LONG_START, num_action_chunks=10),
    # One policy for the forty tasks, one GPU; 13 iterations came to 89 % (docs/LOG.md). A rollout is a horizon of
    # LIBERO-Long, and two of the others.
    "libero_40_nano": NANO_PPO
    | IMITATION_FIRST
    | dict(
        suite="libero_40",
        model=FORTY_START,
        num_iterations=24,
        num_action_chunks=5,
        num_steps=96,
        save_interval=8,
        eval_interval=8,
        eval_episodes_per_task=20,
    ),
}

# The same over a cluster, in run folders of its own.
ASYNC_PPO: dict[str, dict[str, Any]] = PPO | {"demo": PPO["demo"] | dict(run_name="demo_async")}

# Ours; settings of the paper's code for pi0 that they keep are the trainer's defaults.
DSRL: dict[str, dict[str, Any]] = {
    # A first look: minutes on a CPU.
    "demo": dict(
        run_name="demo_dsrl",
        model=SPATIAL_START,
        num_iterations=3,
        num_envs=4,
        num_steps=24,
        warmup_iterations=1,
        num_updates=100,
        minibatch_size=64,
        eval_episodes_per_task=1,
    ),
    # One GPU; 131,072 decisions, at most 0.66 million environment steps. A longer run got worse again (docs/LOG.md,
    # 2026-11-30).
    "libero_spatial_nano": dict(
        suite="libero_spatial",
        model=SPATIAL_START,
        num_iterations=32,
        num_envs=1024,
        physics="warp",
        num_action_chunks=5,
        num_steps=4,
        warmup_iterations=12,  # a horizon
        replay_capacity=150_000,  # all of the run
        truncation="failure",
        value_bounds=(0.0, 1.0),
        learning_rate=3e-4,
        num_updates=800,
        minibatch_size=1024,
        save_interval=16,
        eval_interval=0,
    ),
    # GR00T-N1.5 on a GPU of 24 GB: 6 GB of weights, 1.5 GB of replay. Not run yet.
    "libero_spatial_gr00t_24gb": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=500,
        num_envs=16,
        num_action_chunks=5,
        compute_dtype="bfloat16",
        latent_dim=32,  # of 3,584 features
        num_steps=12,
        warmup_iterations=8,  # two horizons
        replay_capacity=100_000,
        truncation="failure",
        value_bounds=(0.0, 1.0),
        num_updates=200,
        minibatch_size=256,
        save_interval=25,
        eval_interval=100,
    ),
}

GRPO: dict[str, dict[str, Any]] = {
    # A first look: three minutes on a CPU, see PPO's.
    "demo": NEAR_GOAL | NEAR_GOAL_GRPO | dict(run_name="demo_grpo"),
    # Four minutes on two cores, see PPO's.
    "libero_spatial_laptop": NEAR_GOAL | SPATIAL_NEAR_GOAL | NEAR_GOAL_GRPO,
    # RLinf: examples/embodiment/config/libero_spatial_grpo_openpi.yaml (pi0)
    "libero_spatial_rlinf": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_action_chunks=5,
        compute_dtype="bfloat16",
        group_size=8,
        num_groups=64,
        max_rollouts=8,  # 512 episodes
        learning_rate=5e-6,
        update_epochs=2,
        num_minibatches=12,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        clip_coef_high=0.2,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, one H200: four minutes (docs/LOG.md).
    "libero_spatial_nano": NANO_GRPO | dict(suite="libero_spatial", model=SPATIAL_START, num_action_chunks=5),
    # GR00T-N1.5 on GPUs of 24 and 80 GB, see PPO's. Not run yet.
    "libero_spatial_24gb": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=400,
        num_envs=16,
        num_action_chunks=5,
        compute_dtype="bfloat16",
        lora_rank=32,
        lora_alpha=32.0,
        feature_memory_gb=2.0,
        group_size=8,
        num_groups=4,
        max_rollouts=4,  # 64 episodes
        learning_rate=2e-5,
        update_epochs=2,
        num_minibatches=6,
        micro_batch_size=16,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    "libero_spatial_80gb": dict(
        suite="libero_spatial",
        model="RLinf/RLinf-Gr00t-SFT-Spatial",
        num_iterations=400,
        num_envs=64,
        num_action_chunks=5,
        compute_dtype="bfloat16",
        feature_memory_gb=8.0,
        group_size=8,
        num_groups=16,
        max_rollouts=4,  # 256 episodes
        learning_rate=5e-6,
        update_epochs=2,
        num_minibatches=6,
        micro_batch_size=64,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # RLinf: examples/embodiment/config/libero_object_grpo_openpi.yaml (pi0)
    "libero_object_rlinf": dict(
        suite="libero_object",
        model="RLinf/RLinf-Gr00t-SFT-Object",
        num_action_chunks=5,
        compute_dtype="bfloat16",
        group_size=8,
        num_groups=64,
        max_rollouts=8,  # 512 episodes
        learning_rate=5e-6,
        update_epochs=2,
        num_minibatches=12,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        clip_coef_high=0.2,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, after libero_spatial_nano.
    "libero_object_nano": NANO_GRPO | dict(suite="libero_object", model=OBJECT_START, num_action_chunks=5),
    # RLinf: examples/embodiment/config/libero_goal_grpo_openpi.yaml (pi0)
    "libero_goal_rlinf": dict(
        suite="libero_goal",
        model="RLinf/RLinf-Gr00t-SFT-Goal",
        num_action_chunks=5,
        compute_dtype="bfloat16",
        group_size=8,
        num_groups=64,
        max_rollouts=8,  # 512 episodes
        learning_rate=5e-6,
        update_epochs=2,
        num_minibatches=12,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        clip_coef_high=0.2,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, after libero_spatial_nano; not run yet.
    "libero_goal_nano": NANO_GRPO | dict(suite="libero_goal", model=GOAL_START, num_action_chunks=5),
    # RLinf: examples/embodiment/config/libero_10_grpo_openpi.yaml (pi0)
    "libero_10_rlinf": dict(
        suite="libero_10",
        model="RLinf/RLinf-Gr00t-SFT-10",
        num_action_chunks=10,
        compute_dtype="bfloat16",
        group_size=8,
        num_groups=64,
        max_rollouts=8,  # 512 episodes
        learning_rate=5e-6,
        update_epochs=2,
        num_minibatches=12,
        micro_batch_size=64,  # RLinf: 128; 64 fit a GPU of 80 GB and make the same minibatch
        loss_weighting="trajectory",
        clip_coef_high=0.2,
        dual_clip=3.0,
        save_interval=25,
        eval_interval=50,
    ),
    # Ours, after libero_spatial_nano; not run yet as it is.
    "libero_10_nano": NANO_GRPO | dict(suite="libero_10", model=LONG_START, num_action_chunks=10),
}
