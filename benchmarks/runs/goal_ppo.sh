#!/usr/bin/env bash
# Three runs of PPO on LIBERO-Goal, on one H200; what came of them is in docs/LOG.md (2026-11-29). The third made
# checkpoints/libero_goal_rl. The first took six minutes, from a policy that benchmarks/runs/fewshot.sh gives with
# "libero_goal 600 400"; the others twelve, from the one with "libero_goal 600 600 --tf32", which is
# checkpoints/libero_goal_fewshot in bfloat16.
set -euo pipefail
cd "$(dirname "$0")/../.."

settings=(--preset libero_goal_nano --seed 1 --eval-interval 0 --eval-episodes-per-task 0 --save-interval 0 --keep-best 0)
short_rollouts=(--num-steps 24 --no-center-adv-by-task)

python algorithms/ppo_gr00t.py "${settings[@]}" "${short_rollouts[@]}" --model runs/goal_400 --run-name goal_first \
    --num-iterations 14 --policy-warmup-iterations 0 --task-sampling uniform --lr-schedule constant --lr-hold 0 --no-tf32

# It was stopped after the 23rd iteration.
python algorithms/ppo_gr00t.py "${settings[@]}" "${short_rollouts[@]}" --model runs/goal_600 --run-name goal_second \
    --num-iterations 32 --num-envs 2048 --critic-warmup-iterations 1

# It was stopped after the 20th iteration of 21.
python algorithms/ppo_gr00t.py "${settings[@]}" --run-name goal_third

benchmarks/runs/round_and_evaluate.sh runs/goal_third/checkpoints/iteration_21 runs/libero_goal_rl libero_goal 0
