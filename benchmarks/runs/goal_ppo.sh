#!/usr/bin/env bash
# Two runs of PPO on LIBERO-Goal, on one H200 and 16 cores; what came of them is in docs/LOG.md (2026-11-29).
# The first took six minutes, from a policy that benchmarks/runs/fewshot.sh gives with "libero_goal 600 400"; the second
# twelve, from the one with "libero_goal 600 600 --tf32".
set -euo pipefail
cd "$(dirname "$0")/../.."

settings=(--preset libero_goal_nano --seed 1 --eval-interval 0 --eval-episodes-per-task 0 --save-interval 0 --keep-best 0)

python algorithms/ppo_gr00t.py "${settings[@]}" --model runs/goal_400 --run-name goal_first --num-iterations 14 \
    --num-envs 1024 --critic-warmup-iterations 2

# It was stopped after the 23rd iteration.
python algorithms/ppo_gr00t.py "${settings[@]}" --model runs/goal_600 --run-name goal_second --num-iterations 32 \
    --num-envs 2048 --critic-warmup-iterations 1 --policy-warmup-iterations 1 --task-sampling adaptive \
    --lr-schedule linear --lr-hold 0.6 --tf32
