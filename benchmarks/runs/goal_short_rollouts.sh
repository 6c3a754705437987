#!/usr/bin/env bash
# The two runs of PPO on LIBERO-Goal before goal_ppo.sh's, whose rollouts are shorter than a horizon and lose two tasks
# (docs/LOG.md, 2026-11-29): six and twelve minutes on one H200. There the clock stopped the second after the 23rd
# iteration of 32. The first began with a policy of 400 steps of fine-tuning.
set -euo pipefail
cd "$(dirname "$0")/../.."

benchmarks/runs/fewshot.sh libero_goal 600 400

settings=(--preset libero_goal_nano --resume auto --seed 1 --num-steps 24 --no-center-adv-by-task
    --eval-interval 0 --eval-episodes-per-task 0 --save-interval 0 --keep-best 0)

python algorithms/ppo_gr00t.py "${settings[@]}" --run-name goal_first --model runs/kept/libero_goal_fewshot \
    --num-iterations 14 --policy-warmup-iterations 0 --task-sampling uniform --lr-schedule constant --lr-hold 0 \
    --no-tf32
python algorithms/ppo_gr00t.py "${settings[@]}" --run-name goal_second --num-iterations 32 --num-envs 2048 \
    --critic-warmup-iterations 1
