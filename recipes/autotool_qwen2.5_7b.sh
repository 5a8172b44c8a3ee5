#!/usr/bin/env bash
# AutoTool [arXiv 2603.13348; PAPERS B] with Qwen2.5-7B-Instruct on one GPU of 24-80 GB:
# warm-up labels -> SFT -> probe run -> data refinement -> RL with the decoupled entropy constraint -> evaluation.
# DATA and TEST: questions of task function (they bring their functions and the expected call). `--dry_run` checks
# flags, data and memory. Each stage goes on where it was killed. Not run here: no GPU, no weights.
#
# Deviations: LoRA r=16 on a 4-bit base; the think samples come from the same model (there: Qwen3-32B), one name in
# THINK_MODEL changes that; variance across the epochs of a short probe run (our reading of sec. on data refinement);
# batch, G, lengths and learning rates are ours: unpublished.
OUT=${OUT:-out/autotool_7b}
source "$(dirname "$0")/common.sh"
model=(--load_in_4bit --dtype bfloat16 --lora_r 16 --lora_alpha 32)
sampling=(--max_completion_length 2048 --engine fast --rollout_batch_size 64)
memory=(--gradient_checkpointing --max_tokens_per_micro_batch 8192)
rl=(--reward autotool --num_generations 8 --questions_per_step 16 --temperature 1.0 --learning_rate 1e-5
  --entropy_regulariser decoupled --beta_short 0 --beta_long 1e-2 --target_short 0.1 --target_long 0.2 --beta_lr 2e-2)
# B4: best cell there H_s = 0.1, H_l = 0.2, beta_s = 0, beta_l(0) = 1e-2; beta_lr is our reading

# B1: 8 answers in each mode; no-think solves it -> short label, else long (8.2k rows there)
run -m methods.warmup --model_name_or_path "$MODEL" "${model[@]}" --data "$DATA" "${sampling[@]}" --num_generations 8 \
  --temperature 1.0 --label_rule any ${THINK_MODEL:+--think_model_name_or_path "$THINK_MODEL"} --output "$OUT/warmup"
run train_sft.py --model_name_or_path "$MODEL" "${model[@]}" --data "$OUT/warmup/sft.jsonl" --max_length 4096 \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 32 "${memory[@]}" --num_train_epochs 3 \
  --learning_rate 1e-4 --output_dir "$OUT/sft"

# B2: rewards across training, from a short probe run: half of the always and of the never solved questions go, then the
# 7k of lowest variance stay (there 21k -> 7k)
run train_rl.py --model_name_or_path "$(policy "$OUT/sft")" "${model[@]}" --data "$DATA" "${sampling[@]}" "${rl[@]}" \
  "${memory[@]}" --max_steps 90 --save_steps 30 --save_total_limit 0 --output_dir "$OUT/probe"
probes=()
for step in 30 60 90; do
  run rollout.py --model_name_or_path "$(policy "$OUT/probe/checkpoint-$step")" "${model[@]}" --data "$DATA" \
    "${sampling[@]}" --num_generations 8 --output "$OUT/probe-$step.jsonl"
  probes+=("$OUT/probe-$step.jsonl")
done
run -m methods.refine --trajectories "${probes[@]}" --data "$DATA" --refine epochs_low --num_questions 7000 --overwrite \
  --output "$OUT/refined.jsonl"

# B3, B4: asymmetric reward and the decoupled adaptive entropy constraint; one pass over 7k questions
run train_rl.py --model_name_or_path "$(policy "$OUT/sft")" "${model[@]}" --data "$OUT/refined.jsonl" "${sampling[@]}" \
  "${rl[@]}" "${memory[@]}" --max_steps 437 --output_dir "$OUT/rl"

# B5: the model chooses its mode; always and never thinking beside it
for mode in auto think no_think; do
  run rollout.py --model_name_or_path "$(policy "$OUT/rl")" "${model[@]}" --data "$TEST" "${sampling[@]}" \
    --num_generations 1 --temperature 0 --mode "$mode" --evaluate --output "$OUT/test_$mode.jsonl"
done
