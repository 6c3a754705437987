#!/usr/bin/env bash
# How checkpoints/libero_goal_fewshot was made, and the first run of PPO from it, on one H200 and 16 cores: some four
# minutes, and eight.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/collect_demos.py --suite libero_goal --episodes-per-task 20 --object-shift 0.02 \
    --expert.speed-spread 0.1 --expert.noise 0.06 --expert.via-noise 0.01 --image-size 118 --storage image \
    --num-workers 8 --num-writers 7 --render-batch-size 256 --output runs/data/goal_20
python algorithms/sft_gr00t.py --preset nano --dataset runs/data/goal_20 --suite libero_goal --run-name goal_fewshot \
    --batch-size 512 --micro-batch-size 512 --learning-rate 7e-4 --num-steps 600 --save-interval 200 --keep-last 6 \
    --augmentation.brightness 0.1 --augmentation.contrast 0.1 --augmentation.saturation 0.1 --augmentation.hue 0.02 \
    --eval-episodes-per-task 0
# The policy after 400 of the 600 steps, rounded to bfloat16.
python - <<'PYTHON'
import torch
from gr00t_agent import Gr00tAgent

agent = Gr00tAgent.from_pretrained("runs/goal_fewshot/checkpoints/step_400", dtype=torch.bfloat16)
agent.save_pretrained("runs/libero_goal_fewshot")
PYTHON
python algorithms/ppo_gr00t.py --preset libero_goal_nano --physics warp --num-envs 1024 --imitation-coef 10 \
    --model runs/libero_goal_fewshot --run-name goal_first --seed 1 --num-iterations 14 --eval-interval 0 \
    --eval-episodes-per-task 0 --save-interval 0 --keep-best 0
for policy in runs/libero_goal_fewshot runs/goal_first/checkpoints/iteration_14; do
    python algorithms/eval_gr00t.py --checkpoint "$policy" --suite libero_goal --episodes-per-task 50 --seeds 0 \
        --num-envs 100 --videos-per-task 0 --output-dir "runs/eval_$(basename "$policy")"
done
