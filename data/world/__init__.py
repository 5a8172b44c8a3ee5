"""The calibration world: made-up facts and questions of which we know how many tool calls each needs.

Every step of the three methods by hand, on a CPU:

    export B="--model_name_or_path data/tiny" W="--index out/index --search_top_k 1 --engine fast"
    python -m data.world --index out/index
    python -m data.world --questions 300 --seed 1 --output Q.jsonl
    python -m data.world --questions 300 --seed 10000 --output test.jsonl
    python -m data.world --questions 1600 --seed 1 --families running_sum --output S.jsonl
    # ET-Agent: edit and keep, fine-tune, then rounds of sampling, selection and RL
    python flywheel.py $B $W --data Q.jsonl --critic rule --output_dir out/flywheel
    python train_sft.py $B --data out/flywheel/rft.jsonl --max_steps 60 --output_dir out/rft
    python -m methods.curriculum --model_name_or_path out/rft $W --data Q.jsonl --num_questions 60 --max_steps 30 \\
        --sigma_tool 0.5 --output_dir out/curriculum
    python rollout.py --model_name_or_path out/curriculum $W --data test.jsonl --evaluate --output out/test.jsonl
    # AutoTool: a warm-up on short and long answers, then RL with its entropy constraint
    python -m methods.warmup $B --data S.jsonl --engine fast --label_rule majority --output out/warmup
    python train_sft.py $B --data out/warmup/sft.jsonl --max_steps 400 --learning_rate 2e-3 --output_dir out/warm
    python train_rl.py --model_name_or_path out/warm --data S.jsonl --engine fast --reward autotool --learning_rate 5e-4 \\
        --entropy_regulariser decoupled --entropy_target relative --output_dir out/autotool
    # entropy reduction: what calls change in a sampled file, then the sparse reward
    python rollout.py $B $W --data Q.jsonl --output T.jsonl
    python -m experiments.entropy_pilot --trajectories T.jsonl $B --output out/pilot
    python train_rl.py $B $W --data Q.jsonl --reward entropy_sparse --beta 1e-3 --output_dir out/sparse
"""
