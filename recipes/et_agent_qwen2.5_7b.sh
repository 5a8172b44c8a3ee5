#!/usr/bin/env bash
# ET-Agent [arXiv 2601.06860; PAPERS A] with Qwen2.5-7B-Instruct on one GPU of 24-80 GB:
# flywheel -> RFT -> three rounds of Pareto sampling and RL -> evaluation. `--dry_run` checks flags, data and memory.
# Each stage can be killed and goes on with the same command. Not run here: no GPU, no weights; no numbers to expect.
#
# Deviations: LoRA r=16 on a 4-bit base (there: full parameters, 4 GPUs), so larger learning rates; 16 questions per
# step (there: 64) in mini-batches of 4 as there; no repetition penalty in the flywheel: --engine fast does not have it
# (there: 1.1); the model is its own critic (there: a 72B one for finding steps and rewording); the samples for the
# Pareto selection have the limits of RL; QA correctness is SQuAD F1; retrieval over the passages of INDEX.
OUT=${OUT:-out/et_agent_7b}
source "$(dirname "$0")/common.sh"
model=(--load_in_4bit --dtype bfloat16 --lora_r 16 --lora_alpha 32)
# top-4 passages of 1200 characters, about 1200 tokens a search (A1, A4)
tools=(--index "$INDEX" --search_top_k 4 --search_max_chars 1200 --engine fast)
# flywheel and evaluation: 4096 tokens per generation, at most 6 python and 6 search calls (A1); 14336 in all is our
# room for 6 searches and 7000 tokens of text, code and output
long=(--max_turn_length 4096 --max_completion_length 14336 --max_tool_calling_iterations 12 --max_calls_per_tool 6
  --rollout_batch_size 16)
# RL: 4096 tokens in all, results included, at most 6 calls in all, as in the released code (A4)
short=(--max_completion_length 4096 --max_tool_calling_iterations 6 --max_calls_per_tool 6 --rollout_batch_size 32)
memory=(--gradient_checkpointing --max_tokens_per_micro_batch 8192)

# sec. 4.1: temperature 1.0, top-p 0.95, top-k 20; 3 rounds, +4 calls while evolving
run flywheel.py --model_name_or_path "$MODEL" "${model[@]}" --data "$DATA" "${tools[@]}" "${long[@]}" \
  --temperature 1.0 --top_p 0.95 --top_k 20 --rounds 3 --per_round best --extra_calls 4 --critic model \
  --output_dir "$OUT/flywheel"

# sec. 4.2.1 RFT on all right, clean trajectories: batch 32, 3 epochs (there lr 5e-6, cosine with 10 % warm-up, 10.5k
# trajectories cut at 10000 tokens; longer ones are left out here)
run train_sft.py --model_name_or_path "$MODEL" "${model[@]}" --data "$OUT/flywheel/rft.jsonl" --max_length 10000 \
  --drop_long --per_device_train_batch_size 1 --gradient_accumulation_steps 32 "${memory[@]}" \
  --max_tokens_per_micro_batch 10240 --num_train_epochs 3 --learning_rate 1e-4 --warmup_ratio 0.1 \
  --output_dir "$OUT/rft"

# sec. 4.2.2, 4.2.3: K = 16 samples per question, Pareto; G = 16, N0 = 8 (ARPO); sigma 0.1, halved per round (our
# reading); g = 1; KL 0; clip 0.2; lr 1e-6 there; 3 epochs: 189 steps of 16 of the 1008 questions (N is unpublished)
run -m methods.curriculum --model_name_or_path "$(policy "$OUT/rft")" "${model[@]}" --data "$DATA" \
  "${tools[@]}" "${short[@]}" \
  --rounds 3 --selector pareto --select_generations 16 --num_questions 1008 \
  --reward et_agent --sigma_tool 0.1 --sigma_length 0.1 --sigma_schedule round --behaviour_gain 1 \
  --num_generations 16 --branching arpo --initial_rollouts 8 --temperature 1.0 --beta 0 --epsilon 0.2 \
  --questions_per_step 16 --updates_per_batch 4 --max_steps 189 --learning_rate 1e-5 "${memory[@]}" \
  --output_dir "$OUT/curriculum"

# sec. 5: temperature 0.6, top-p 0.95, top-k 20 (there also repetition penalty 1.1)
run rollout.py --model_name_or_path "$(policy "$OUT/curriculum/round-3/rl")" "${model[@]}" --data "$TEST" \
  "${tools[@]}" "${long[@]}" --num_generations 1 --temperature 0.6 --top_p 0.95 --top_k 20 \
  --evaluate --output "$OUT/test.jsonl"
