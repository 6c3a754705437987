#!/usr/bin/env bash
# Run w of docs/LOG.md: PPO on LIBERO-Spatial from the few-shot policy in one run, ten minutes on one H200 with sixteen
# cores, and one for each evaluation on its way. Then runs w2 and w3, which are the same with other training seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/ppo_gr00t.py --preset libero_spatial_nano --run-name spatial_ppo --resume auto --seed 1 \
    --save-interval 2 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
for iteration in 4 6 12 19; do
    python algorithms/eval_gr00t.py --checkpoint "runs/spatial_ppo/checkpoints/iteration_$iteration" \
        --suite libero_spatial --episodes-per-task 50 --seeds 0 --num-envs 100 --videos-per-task 0 --resume \
        --output-dir "runs/eval_spatial_ppo_$iteration"
done
benchmarks/runs/round_and_evaluate.sh runs/spatial_ppo/checkpoints/iteration_19 runs/libero_spatial_one_run \
    libero_spatial "0 1 2"

for seed in 2 3; do
    python algorithms/ppo_gr00t.py --preset libero_spatial_nano --run-name "spatial_ppo_$seed" --resume auto \
        --seed "$seed" --save-interval 1 --keep-last 2 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
    benchmarks/runs/round_and_evaluate.sh "runs/spatial_ppo_$seed/checkpoints/iteration_19" \
        "runs/libero_spatial_one_run_$seed" libero_spatial "0 1 2" --num-envs 100
done
