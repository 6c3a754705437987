#!/usr/bin/env bash
# PPO on LIBERO-Object from the few-shot policy in one run (docs/LOG.md, 2026-11-29), which made
# checkpoints/libero_object_rl: eight minutes on one H200, and three times ten for the evaluations on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/ppo_gr00t.py --preset libero_object_nano --run-name object_ppo --resume auto --seed 1 \
    --save-interval 4 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0

benchmarks/runs/round_and_evaluate.sh runs/object_ppo/checkpoints/iteration_19 runs/libero_object_rl \
    libero_object "0 1 2" --num-envs 20
