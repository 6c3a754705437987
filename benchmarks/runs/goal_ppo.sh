#!/usr/bin/env bash
# PPO on LIBERO-Goal from the few-shot policy in one run (docs/LOG.md, 2026-11-29, the third), which made
# checkpoints/libero_goal_rl: twelve minutes on one H200, and half an hour for each evaluation on two cores. There the
# clock stopped it after the 20th iteration of 21.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/ppo_gr00t.py --preset libero_goal_nano --run-name goal_third --resume auto --seed 1 \
    --save-interval 0 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
benchmarks/runs/round_and_evaluate.sh runs/goal_third/checkpoints/iteration_21 runs/libero_goal_rl libero_goal "0 1" \
    --num-envs 20
