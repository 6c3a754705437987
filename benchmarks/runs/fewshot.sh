#!/usr/bin/env bash
# How the policies in checkpoints/libero_*_fewshot were made, and how one for any suite is: collect 20 demonstrations of
# each task, fine-tune a nano policy, keep it as it was after some of the steps, rounded to bfloat16, and evaluate it.
# Some five minutes on an H100 or H200 with 16 cores.
#
#     benchmarks/runs/fewshot.sh libero_spatial 1200 400
#     benchmarks/runs/fewshot.sh libero_goal 600 600 --tf32
#     benchmarks/runs/fewshot.sh libero_object 600 400 --tf32
#     benchmarks/runs/fewshot.sh libero_10 2400 2400 --tf32 --num-action-chunks 10
set -euo pipefail
cd "$(dirname "$0")/../.."

suite=$1       # the suite
num_steps=$2   # steps of fine-tuning, over which the step size falls
kept_step=$3   # the step whose policy is kept, a multiple of 200
options=("${@:4}")  # of sft_gr00t.py
mistakes=${EXPERT_MISTAKES:-0}  # part of the demonstrations that show how a mistake is made good

name=${suite}_fewshot
[ "$mistakes" = 0 ] || name=${suite}_mistakes
data=runs/data/$name

if [ ! -f "$data/meta/collection.json" ]; then
    python algorithms/collect_demos.py --preset fewshot --suite "$suite" --expert.mistakes "$mistakes" \
        --num-workers 8 --num-writers 7 --render-batch-size 256 --output "$data"
fi

python algorithms/sft_gr00t.py --preset nano --dataset "$data" --suite "$suite" --num-steps "$num_steps" \
    --run-name "$name" --resume auto --eval-episodes-per-task 0 "${options[@]}"

benchmarks/runs/round_and_evaluate.sh "runs/$name/checkpoints/step_$kept_step" "runs/kept/$name" "$suite" 0 \
    --num-envs 100
