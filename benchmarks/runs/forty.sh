#!/usr/bin/env bash
# One policy for the forty tasks of LIBERO-Spatial, -Object, -Goal and -Long (docs/LOG.md, 2026-11-30): 20
# demonstrations of each, half of which show how a mistake is made good; fine-tuning from random weights; PPO on all.
# Some twenty minutes on an H200 with 16 cores, and as long for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

EXPERT_MISTAKES=0.5 benchmarks/runs/fewshot.sh libero_40 4400 4400 --tf32

# A rollout is a horizon of LIBERO-Long, and two of the others.
python algorithms/ppo_gr00t.py --preset libero_spatial_nano --suite libero_40 \
    --model runs/libero_40_fewshot/checkpoints/step_4400 --num-steps 96 --num-iterations 60 --run-name libero_40_ppo \
    --save-interval 2 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
