#!/usr/bin/env bash
# GRPO on LIBERO-Long from a policy that is fine-tuned on demonstrations half of which show how a mistake is made good
# (docs/LOG.md, 2026-11-30): twenty minutes on one H200 with 16 cores, and half an hour for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

EXPERT_MISTAKES=0.5 benchmarks/runs/fewshot.sh libero_10 2800 2800 --tf32 --num-action-chunks 10

python algorithms/grpo_gr00t.py --preset libero_10_nano --run-name long_grpo --resume auto \
    --model runs/libero_10_mistakes/checkpoints/step_2800 --num-iterations 13 --noise-level 0.25 --update-epochs 3 \
    --save-interval 3 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0

EPISODES_PER_TASK=20 benchmarks/runs/round_and_evaluate.sh runs/long_grpo/checkpoints/iteration_13 \
    runs/libero_10_grpo libero_10 0 --num-envs 20
