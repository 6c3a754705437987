#!/usr/bin/env bash
# How checkpoints/libero_spatial_fewshot was made, on one H100 and 16 cores; some seven minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/collect_demos.py --suite libero_spatial --episodes-per-task 20 --object-shift 0.02 \
    --expert.speed-spread 0.1 --expert.noise 0.06 --expert.via-noise 0.01 --image-size 118 --storage image \
    --num-workers 16 --num-writers 12 --render-batch-size 256 --output runs/data/spatial_20
python algorithms/sft_gr00t.py --preset nano --dataset runs/data/spatial_20 --run-name spatial_fewshot \
    --batch-size 512 --micro-batch-size 512 --learning-rate 7e-4 --num-steps 1200 --save-interval 200 --keep-last 6 \
    --augmentation.brightness 0.1 --augmentation.contrast 0.1 --augmentation.saturation 0.1 --augmentation.hue 0.02 \
    --eval-episodes-per-task 0
# The policy after 400 of the 1,200 steps, rounded to bfloat16.
python - <<'PYTHON'
import torch
from gr00t_agent import Gr00tAgent

agent = Gr00tAgent.from_pretrained("runs/spatial_fewshot/checkpoints/step_400", dtype=torch.bfloat16)
agent.save_pretrained("runs/libero_spatial_fewshot")
PYTHON
python algorithms/eval_gr00t.py --checkpoint runs/libero_spatial_fewshot --suite libero_spatial \
    --episodes-per-task 50 --seeds 0 --num-envs 100 --videos-per-task 0 --output-dir runs/eval_spatial_fewshot
