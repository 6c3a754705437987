#!/usr/bin/env bash
# Runs j and k of docs/LOG.md: GRPO, and PPO with reinflow's noise, for as many environment steps as run e of
# spatial_ppo.sh, on one H100 and 16 cores. Some seven minutes each, and one to evaluate.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/grpo_gr00t.py --preset libero_spatial_nano --run-name spatial_grpo --num-iterations 8 \
    --eval-interval 0 --eval-episodes-per-task 0
python algorithms/ppo_gr00t.py --preset libero_spatial_nano --run-name spatial_reinflow --num-iterations 11 \
    --noise-method reinflow --eval-interval 0 --eval-episodes-per-task 0
for run in spatial_grpo/checkpoints/iteration_8 spatial_reinflow/checkpoints/iteration_11; do
    python algorithms/eval_gr00t.py --checkpoint "runs/$run" --suite libero_spatial --episodes-per-task 50 --seeds 0 \
        --num-envs 100 --videos-per-task 0 --output-dir "runs/eval_${run%%/*}"
done
