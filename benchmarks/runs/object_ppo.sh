#!/usr/bin/env bash
# PPO on LIBERO-Object from the few-shot policy in one run (docs/LOG.md, 2026-11-29), which made
# checkpoints/libero_object_rl: eight minutes on one H200, and three times ten for the evaluations on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

python algorithms/ppo_gr00t.py --preset libero_object_nano --run-name object_ppo --seed 1 --save-interval 4 \
    --keep-last 9 --keep-best 0 --eval-interval 0 --eval-episodes-per-task 0

# Rounded to bfloat16, and evaluated like that.
python - <<'PYTHON'
import torch
from gr00t_agent import Gr00tAgent

agent = Gr00tAgent.from_pretrained("runs/object_ppo/checkpoints/iteration_19", dtype=torch.bfloat16)
agent.save_pretrained("runs/libero_object_rl")
PYTHON
for seed in 0 1 2; do
    python algorithms/eval_gr00t.py --checkpoint runs/libero_object_rl --suite libero_object --episodes-per-task 50 \
        --seeds "$seed" --num-envs 20 --videos-per-task 0 --output-dir "runs/eval_object_rl_$seed"
done
