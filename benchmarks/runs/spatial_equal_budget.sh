#!/usr/bin/env bash
# Runs j and k of docs/LOG.md: GRPO, and PPO with reinflow's noise, for as many environment steps as run e of
# spatial_three_runs.sh, on one H100 and 16 cores. Five to seven minutes each, and one to evaluate.
set -euo pipefail
cd "$(dirname "$0")/../.."

# What the presets were then.
settings=(--preset libero_spatial_nano --resume auto --no-tf32 --adam-eps 1e-5 --imitation-coef 0
    --imitation-iterations 0 --task-sampling uniform --lr-hold 0 --save-interval 0 --eval-interval 0
    --eval-episodes-per-task 0)
ppo_settings=("${settings[@]}" --num-steps 24 --no-center-adv-by-task --critic-warmup-iterations 2
    --policy-warmup-iterations 0)
grpo_settings=("${settings[@]}" --update-epochs 3 --baseline group --lr-schedule constant)

python algorithms/grpo_gr00t.py "${grpo_settings[@]}" --run-name spatial_plain_grpo --num-iterations 8
python algorithms/ppo_gr00t.py "${ppo_settings[@]}" --run-name spatial_reinflow --num-iterations 11 \
    --lr-schedule constant --noise-method reinflow
# Run m: PPO in one go from the few-shot policy, with steps that fall from the start; 16 minutes.
python algorithms/ppo_gr00t.py "${ppo_settings[@]}" --run-name spatial_falling --num-iterations 34 --seed 4 \
    --learning-rate 5e-5 --lr-schedule linear
for run in spatial_plain_grpo/checkpoints/iteration_8 spatial_reinflow/checkpoints/iteration_11 \
    spatial_falling/checkpoints/iteration_34; do
    python algorithms/eval_gr00t.py --checkpoint "runs/$run" --suite libero_spatial --episodes-per-task 50 --seeds 0 \
        --num-envs 100 --videos-per-task 0 --resume --output-dir "runs/eval_${run%%/*}"
done
