#!/usr/bin/env bash
# GRPO on LIBERO-Spatial from the few-shot policy in one run (docs/LOG.md, 2026-11-30, run y): four minutes on one
# H200, and a quarter of an hour for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/grpo_gr00t.py --preset libero_spatial_nano --run-name spatial_grpo --resume auto --seed 2 \
    --save-interval 2 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
benchmarks/runs/round_and_evaluate.sh runs/spatial_grpo/checkpoints/iteration_10 runs/libero_spatial_grpo \
    libero_spatial "0 1" --num-envs 20
