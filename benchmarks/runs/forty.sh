#!/usr/bin/env bash
# One policy for the forty tasks of LIBERO-Spatial, -Object, -Goal and -Long (docs/LOG.md, 2026-11-30): 20
# demonstrations of each, half of which show how a mistake is made good, fine-tuning from random weights, which made
# checkpoints/libero_40_fewshot, and PPO from there in two runs, which made checkpoints/libero_40_rl. 50 minutes on an
# H200 with 16 cores, and up to an hour for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

export EPISODES_PER_TASK=20

EXPERT_MISTAKES=0.5 benchmarks/runs/fewshot.sh libero_40 4400 4400 --tf32

# It was stopped by the clock after 13 iterations.
python algorithms/ppo_gr00t.py --preset libero_40_nano --run-name libero_40_ppo --resume auto --seed 1 \
    --num-iterations 23 --save-interval 1 --keep-last 23 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0

# From there with the tasks of LIBERO-Long, which are the hardest, drawn four times as often.
long=$(seq -s " " 30 39)
python algorithms/ppo_gr00t.py --preset libero_40_nano --run-name libero_40_ppo_long --resume auto --seed 2 \
    --model runs/libero_40_ppo/checkpoints/iteration_13 --task-ids $(seq -s " " 0 29) $long $long $long $long \
    --imitation-iterations 0 --num-iterations 18 --save-interval 1 --keep-last 2 --keep-best 0 --eval-interval 0 \
    --eval-episodes-per-task 0

benchmarks/runs/round_and_evaluate.sh runs/libero_40_ppo_long/checkpoints/iteration_18 runs/libero_40_rl libero_40 0 \
    --num-envs 40
