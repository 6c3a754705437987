#!/usr/bin/env bash
# How checkpoints/libero_spatial_rl was made: runs e, h and l of docs/LOG.md, PPO from the few-shot policy in three stages
# with tasks weighted by hand, on one H100. Some 33 minutes with start-up, and one or two more for each evaluation. One
# run of ten minutes does almost as well since: benchmarks/runs/spatial_ppo.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

# What was the preset then.
settings=(--preset libero_spatial_nano --resume auto --num-steps 24 --task-sampling uniform
    --no-center-adv-by-task --no-tf32 --lr-schedule constant --lr-hold 0 --policy-warmup-iterations 0 --imitation-coef 0 --imitation-iterations 0
    --adam-eps 1e-5 --save-interval 0 --eval-interval 0 --eval-episodes-per-task 0)
hard_tasks_more_often=(--task-ids 0 1 2 2 3 3 4 4 4 5 6 6 6 7 7 8 8 8 8 9 9 9 9)

# Run e: all tasks alike.
python algorithms/ppo_gr00t.py "${settings[@]}" --run-name spatial_ppo_e --num-iterations 11 --critic-warmup-iterations 2
# Run h: tasks that fail are drawn up to four times as often. The critic begins anew.
python algorithms/ppo_gr00t.py "${settings[@]}" "${hard_tasks_more_often[@]}" --run-name spatial_ppo_h \
    --num-iterations 25 --save-interval 10 --keep-last 3 --critic-warmup-iterations 1 \
    --model runs/spatial_ppo_e/checkpoints/iteration_11
# Run l: the same with step sizes that fall to 0.
python algorithms/ppo_gr00t.py "${settings[@]}" "${hard_tasks_more_often[@]}" --run-name spatial_ppo_l \
    --num-iterations 34 --seed 3 --save-interval 12 --keep-last 3 --critic-warmup-iterations 1 --lr-schedule linear \
    --model runs/spatial_ppo_h/checkpoints/iteration_25
benchmarks/runs/round_and_evaluate.sh runs/spatial_ppo_l/checkpoints/iteration_34 runs/libero_spatial_rl \
    libero_spatial "0 1 2" --num-envs 100
# The check in LIBERO's own environment, drawn by OpenGL: five minutes with 20 processes.
python algorithms/eval_gr00t.py --checkpoint runs/libero_spatial_rl --suite libero_spatial --episodes-per-task 20 \
    --seeds 0 --num-envs 20 --videos-per-task 0 --resume --reference-env --renderer egl \
    --output-dir runs/eval_spatial_rl_reference
