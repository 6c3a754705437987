#!/usr/bin/env bash
# LIBERO-PRO's variants of LIBERO-Spatial and initial states that are none of the stored ones, for both policies; two
# minutes each on an H100 with 16 cores, 10 to 25 on two cores without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

for checkpoint in libero_spatial_fewshot libero_spatial_rl; do
    for variant in swap object lan task; do
        python algorithms/eval_gr00t.py --checkpoint "checkpoints/$checkpoint" --suite "libero_spatial_$variant" \
            --episodes-per-task 50 --seeds 0 --num-envs 100 --videos-per-task 0 --resume \
            --output-dir "runs/eval_${checkpoint}_$variant"
    done
    python algorithms/eval_gr00t.py --checkpoint "checkpoints/$checkpoint" --suite libero_spatial \
        --init-states held_out --episodes-per-task 50 --seeds 0 --num-envs 100 --videos-per-task 0 --resume \
        --output-dir "runs/eval_${checkpoint}_held_out"
done
