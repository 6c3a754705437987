#!/usr/bin/env bash
# LIBERO-Object's and -Goal's policies from initial states that are none of the stored ones, twenty of each task: ten
# minutes each on two cores. LIBERO-Spatial's are in spatial_generalisation.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

for suite in libero_object libero_goal; do
    python algorithms/eval_gr00t.py --checkpoint "checkpoints/${suite}_rl" --suite "$suite" --init-states held_out \
        --episodes-per-task 20 --seeds 0 --num-envs 20 --videos-per-task 0 --resume \
        --output-dir "runs/eval_${suite}_rl_held_out"
done
