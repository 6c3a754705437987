#!/usr/bin/env bash
# One policy for the forty tasks of LIBERO-Spatial, -Object, -Goal and -Long (docs/LOG.md, 2026-11-30): 20
# demonstrations of each, half of which show how a mistake is made good, fine-tuning from random weights, which made
# checkpoints/libero_40_fewshot, and PPO from there, which made checkpoints/libero_40_rl. Forty minutes on an H200 with
# 16 cores, of which the shipped policy took 25, and up to an hour for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

export EPISODES_PER_TASK=20

EXPERT_MISTAKES=0.5 benchmarks/runs/fewshot.sh libero_40 4400 4400 --tf32

# It was stopped by the clock after 13 iterations, and what it had become by then is shipped.
python algorithms/ppo_gr00t.py --preset libero_40_nano --run-name libero_40_ppo --resume auto --seed 1 \
    --num-iterations 23 --save-interval 1 --keep-last 23 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0

benchmarks/runs/round_and_evaluate.sh runs/libero_40_ppo/checkpoints/iteration_13 runs/libero_40_rl libero_40 0 \
    --num-envs 40
