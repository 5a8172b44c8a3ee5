#!/usr/bin/env bash
# Entropy reduction [arXiv 2602.02050; PAPERS C]: dense process reward S * (1 + alpha * I_k) per call (C3),
# with Qwen2.5-7B-Instruct on one GPU of 24-80 GB: RL -> evaluation.
# No pressure against calling, expect more calls (there +22.27 % performance).
# `--dry_run` checks flags, data and memory. Each stage goes on where it was killed. Not run here: no GPU, no weights.
#
# Deviations: LoRA r=16 on a 4-bit base; batch, G, lengths and learning rate are ours: unpublished.
OUT=${OUT:-out/entropy_dense_7b}
source "$(dirname "$0")/common.sh"
model=(--load_in_4bit --dtype bfloat16 --lora_r 16 --lora_alpha 32)
tools=(--index "$INDEX" --max_completion_length 4096 --engine fast --rollout_batch_size 32)

# C1: segments end before the call's opening tag or the answer (our reading), margin 0, entropies of the old-policy
# pass at T = 1;
# KL to the starting adapter, k3, beta 1e-3 (unpublished: our reading); clip 0.2
run train_rl.py --model_name_or_path "$MODEL" "${model[@]}" --data "$DATA" "${tools[@]}" \
  --reward entropy_dense --advantage entropy_dense --dense_alpha 0.5 --segment reasoning --delta_margin 0 \
  --beta 1e-3 --epsilon 0.2 \
  --num_generations 8 --questions_per_step 16 --temperature 1.0 --max_steps 300 --learning_rate 1e-5 \
  --gradient_checkpointing --max_tokens_per_micro_batch 8192 --output_dir "$OUT/rl"

run rollout.py --model_name_or_path "$(policy "$OUT/rl")" "${model[@]}" --data "$TEST" "${tools[@]}" \
  --num_generations 1 --temperature 0.6 --top_p 0.95 --evaluate --output "$OUT/test.jsonl"
