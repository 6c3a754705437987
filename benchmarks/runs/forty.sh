#!/usr/bin/env bash
# One policy for the forty tasks of LIBERO-Spatial, -Object, -Goal and -Long (docs/LOG.md, 2026-11-30): 20
# demonstrations of each, half of which show how a mistake is made good; fine-tuning from random weights; PPO on all.
# Some twenty minutes on an H200 with 16 cores, and as long for each evaluation on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/collect_demos.py --suite libero_40 --episodes-per-task 20 --object-shift 0.02 \
    --expert.speed-spread 0.1 --expert.noise 0.06 --expert.via-noise 0.01 --expert.mistakes 0.5 --image-size 118 \
    --storage image --num-workers 11 --num-writers 9 --render-batch-size 256 --output runs/data/libero_40_20

python algorithms/sft_gr00t.py --preset nano --dataset runs/data/libero_40_20 --suite libero_40 \
    --run-name libero_40_fewshot --batch-size 512 --micro-batch-size 512 --learning-rate 7e-4 --num-steps 4400 \
    --augmentation.brightness 0.1 --augmentation.contrast 0.1 --augmentation.saturation 0.1 --augmentation.hue 0.02 \
    --eval-episodes-per-task 0 --tf32

# A rollout is a horizon of LIBERO-Long, and two of the others.
python algorithms/ppo_gr00t.py --preset libero_spatial_nano --suite libero_40 \
    --model runs/libero_40_fewshot/checkpoints/step_4400 --num-steps 96 --num-iterations 60 --run-name libero_40_ppo \
    --save-interval 2 --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0
