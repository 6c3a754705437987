#!/usr/bin/env bash
# GRPO on LIBERO-Object from the few-shot policy (docs/LOG.md, 2026-11-30): three minutes on one H200, and a quarter of
# an hour for an evaluation on two cores. The run there was stopped after six iterations and resumed as one of eight,
# which --resume allows: its step size fell for ten at first.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/grpo_gr00t.py --preset libero_object_nano --run-name object_grpo --resume auto --seed 1 \
    --num-iterations 8 --save-interval 2 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
benchmarks/runs/round_and_evaluate.sh runs/object_grpo/checkpoints/iteration_8 runs/libero_object_grpo \
    libero_object 0 --num-envs 20
