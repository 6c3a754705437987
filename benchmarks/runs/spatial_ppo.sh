#!/usr/bin/env bash
# Run e of docs/LOG.md: PPO from the few-shot policy, on one H100 and 16 cores; some six minutes, and one to evaluate.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/ppo_gr00t.py --preset libero_spatial_nano --run-name spatial_ppo --num-iterations 11 \
    --eval-interval 0 --eval-episodes-per-task 0
python algorithms/eval_gr00t.py --checkpoint runs/spatial_ppo/checkpoints/iteration_11 --suite libero_spatial \
    --episodes-per-task 50 --seeds 0 --num-envs 100 --videos-per-task 0 --output-dir runs/eval_spatial_ppo
