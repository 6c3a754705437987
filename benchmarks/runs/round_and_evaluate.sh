#!/usr/bin/env bash
# Rounds the policy of a checkpoint to bfloat16, as policies are shipped, and evaluates it like that, for each seed on 50
# episodes of each task: a quarter of an hour on two cores for a suite of ten, twice that for LIBERO-Long.
#
#     benchmarks/runs/round_and_evaluate.sh runs/object_ppo/checkpoints/iteration_19 runs/libero_object_rl \
#         libero_object "0 1 2" --num-envs 20
set -euo pipefail
cd "$(dirname "$0")/../.."

checkpoint=$1       # a trainer's
kept=$2             # folder for the rounded policy
suite=$3            # the suite
seeds=$4            # of evaluations
options=("${@:5}")  # of eval_gr00t.py
episodes=${EPISODES_PER_TASK:-50}

python - "$checkpoint" "$kept" <<'PYTHON'
import sys

import torch

from gr00t_agent import Gr00tAgent

source, target = sys.argv[1:]
Gr00tAgent.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
PYTHON

for seed in $seeds; do
    python algorithms/eval_gr00t.py --checkpoint "$kept" --suite "$suite" --episodes-per-task "$episodes" \
        --seeds "$seed" --videos-per-task 0 --resume --output-dir "runs/eval_$(basename "$kept")_$seed" \
        "${options[@]}"
done
