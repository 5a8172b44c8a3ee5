#!/usr/bin/env bash
# Entropy reduction [arXiv 2602.02050; PAPERS C]: sparse outcome reward R = S * m / n (C2),
# with Qwen2.5-7B-Instruct on one GPU of 24-80 GB: RL -> evaluation.
# The reward itself presses calls down (there 72.07 % fewer than the mean of the baselines).
# `--dry_run` checks flags, data and memory. Each stage goes on where it was killed. Not run here: no GPU, no weights.
#
# Deviations: LoRA r=16 on a 4-bit base; batch, G, lengths and learning rate are ours: unpublished.
OUT=${OUT:-out/entropy_sparse_7b}
source "$(dirname "$0")/common.sh"
model=(--load_in_4bit --dtype bfloat16 --lora_r 16 --lora_alpha 32)
tools=(--index "$INDEX" --max_completion_length 4096 --engine fast --rollout_batch_size 32)

# C1: segments end before the call's opening tag or the answer (our reading), margin 0, entropies of the old-policy
# pass at T = 1;
# KL to the starting adapter, k3, beta 1e-3 (unpublished: our reading); clip 0.2
run train_rl.py --model_name_or_path "$MODEL" "${model[@]}" --data "$DATA" "${tools[@]}" \
  --reward entropy_sparse --segment reasoning --delta_margin 0 \
  --beta 1e-3 --epsilon 0.2 \
  --num_generations 8 --questions_per_step 16 --temperature 1.0 --max_steps 300 --learning_rate 1e-5 \
  --gradient_checkpointing --max_tokens_per_micro_batch 8192 --output_dir "$OUT/rl"

run rollout.py --model_name_or_path "$(policy "$OUT/rl")" "${model[@]}" --data "$TEST" "${tools[@]}" \
  --num_generations 1 --temperature 0.6 --top_p 0.95 --evaluate --output "$OUT/test.jsonl"
