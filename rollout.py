"""Rollout: sample multi-turn trajectories with tools, by the engine that `--engine` names. Library and command line.

    python rollout.py --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --output T.jsonl

1. Render each question with the chat template, tokenise it once, make G drafts of it.
2. The engine samples each draft until it closes a tool call or its answer, ends, or spends its budget.
3. Sampled ids are kept verbatim (loss_mask 1); tool calls run beside the sampling.
4. Each tool's result is appended as ids (loss_mask 0), and the draft goes on with 2.

On the command line, flags that shape a conversation and are not given are those that the adapter was trained with.
Nothing that was sampled is decoded and tokenised again. A draft's randomness is a pure function of (run seed, step,
question id, sample index, position), so a resumed run needs no replay.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.args import arg, cli, require_positive
from core.conversation import Draft, show_prompt, to_trajectory
from core.model import ModelArgs, adapter_of, device, load_policy
from core.run import drop_torn_line, keep_date, other_setting, write_text
from core.trajectory import DataError, Question, Trajectory, load_trajectories, save_trajectories
from data.questions import load_questions
from engines import fast, hf, openai
from engines.args import SamplingArgs, is_url
from engines.branching import complete_groups, start_groups
from engines.toolbox import ToolBox, check_index, open_tools
from engines.turns import check_prompts
from eval.evaluate import write_metrics

ENGINES = {"hf": hf.complete, "fast": fast.complete, "openai": openai.complete}


@dataclass
class RolloutArgs(SamplingArgs):
    """Flags of every script that samples outside of training."""

    engine: Literal[tuple(ENGINES)] = arg(
        "hf", "sampler: hf = generate, the reference; fast = engines/fast.py; openai = a server"
    )
    base_url: str = arg("", "engine openai: the server, such as http://localhost:8000/v1; key in OPENAI_API_KEY")
    served_model_name: str = arg("", "engine openai: the model's name there; default: --model_name_or_path")
    top_p: float = arg(1.0, "nucleus sampling")
    top_k: int = arg(0, "top-k sampling, 0 = off")
    repetition_penalty: float = arg(1.0, "repetition penalty")

    def __post_init__(self):
        SamplingArgs.__post_init__(self)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be in (0, 1], not {self.top_p}")
        if (self.engine == "openai") != is_url(self.base_url):
            raise ValueError(f"--engine {self.engine} does not go with --base_url {self.base_url!r}")
        if self.engine == "fast" and self.repetition_penalty != 1.0:
            raise ValueError(f"--repetition_penalty {self.repetition_penalty} needs --engine hf")
        if self.engine == "openai" and self.branching != "none":
            raise ValueError(f"--branching {self.branching} needs --engine hf or fast, which know the entropies")


def rollout(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    args: SamplingArgs,
    toolbox: ToolBox,
    run: tuple,
) -> list[Trajectory]:
    """G trajectories of each question, in order (question by question, sample by sample).

    run: what seeds the sampling besides question and sample, e.g. (seed, step).
    """
    groups = start_groups(questions, tokenizer, args, run)
    complete_groups(complete, model, tokenizer, groups, args, toolbox, run)
    return [to_trajectory(d, tokenizer) for group in groups for d in group]


def complete(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, drafts: list[Draft], args: SamplingArgs, *more):
    """Sample every draft to its end by `--engine`; what else an engine takes: engines/hf.py."""
    return ENGINES[args.engine](model, tokenizer, drafts, args, *more)


def load_sampler(args: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """(policy on its device, or the server of `--engine openai`; tokenizer): what `complete` samples from."""
    if args.engine == "openai":
        return openai.connect(args)
    model, tokenizer = load_policy(args, trainable=False)
    model.to(device())
    fast.check_engine(model, tokenizer, args)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------- command line

SHAPING = (  # flags that shape a conversation, in which a policy is measured as it was trained; noise is the world's
    "temperature", "mode", "dialect", "max_completion_length", "max_tool_calling_iterations", "max_calls_per_tool",
    "max_tool_seconds", "max_turn_length", "format", "search_top_k", "search_max_chars", "python_timeout",
)  # fmt: skip


def trained_flags(path: str) -> tuple[str, dict]:
    """(config.json, its SHAPING flags) of the run that trained an adapter or has it as checkpoint; ("", {}) without."""
    folder = Path(adapter_of(path))
    for file in (folder / "config.json", folder.parent / "config.json"):
        if (folder / "adapter_config.json").is_file() and file.is_file():
            config = json.loads(file.read_text())
            if "output_dir" in config:  # a run's, not a model's
                return str(file), {name: config[name] for name in SHAPING if name in config}
    return "", {}


@dataclass
class Args(RolloutArgs, ModelArgs):
    """Flags of the command line."""

    data: str = arg("", "questions: jsonl, verl parquet or dataset id (required)")
    output: str = arg("", "trajectory file to write (required); an unfinished one is continued")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    limit: int = arg(0, "first N questions only, 0 = all")
    split: str = arg("train", "split, if --data is a dataset id")
    seed: int = arg(0, "sampling seed")
    threads: int = arg(2, "CPU threads")
    overwrite: bool = arg(False, "replace an existing output file")
    evaluate: bool = arg(False, "grade what was sampled: print the metrics, write them to OUTPUT.metrics.json")

    def __post_init__(self):
        ModelArgs.__post_init__(self)
        RolloutArgs.__post_init__(self)
        if not self.data or not self.output:
            raise ValueError("--data and --output are required")
        require_positive(self, "threads")


def main(args: Args) -> list[Trajectory]:
    """Sample a trajectory file, and evaluate it if asked; returns the trajectories."""
    trajectories = sample(args)
    if args.evaluate:
        write_metrics(trajectories, Path(args.output + ".metrics.json"), format=args.format)
    return trajectories


def sample(args: Args) -> list[Trajectory]:
    """Roll out a question file into a trajectory file, group by group; a killed run goes on where it stopped."""
    torch.set_num_threads(args.threads)
    output, config = Path(args.output), Path(args.output + ".config.json")
    done: list[Trajectory] = []
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; name the file to write")
    check_index(args.index)
    goes_on = output.exists() and not args.overwrite
    keep_date(args, config if goes_on else None)
    if goes_on:
        if not config.exists():
            raise DataError(f"--output {output} exists without a {config.name}; choose another file or --overwrite")
        if other := other_setting(json.loads(config.read_text()), args):
            raise DataError(f"--output {output} was written with {other}; choose another file or --overwrite")
        drop_torn_line(output)
        done = load_trajectories(output)
    questions = load_questions(args.data, args.task, args.limit, args.split)
    asked = {q.id: (q.question, q.gold) for q in questions}
    if changed := next((t for t in done if asked.get(t.question_id) != (t.question, t.gold)), None):
        raise DataError(f"--data {args.data}: question {changed.question_id!r} is another one than in --output {output}")
    complete_ids = {t.question_id for t in done if t.sample_idx == args.num_generations - 1}
    done = [t for t in done if t.question_id in complete_ids]
    todo = [q for q in questions if q.id not in complete_ids]
    if not todo:
        return done
    model, tokenizer = load_sampler(args)
    check_prompts(questions, tokenizer, args, model)
    show_prompt(questions[0], tokenizer, args.dialect)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, json.dumps(asdict(args), indent=1) + "\n")
    waves = 1 if args.engine == "hf" else 4  # more drafts than slots at a time, so that free slots are refilled
    per_batch = max(waves * args.rollout_batch_size // args.num_generations, 1)
    save_trajectories(output, done)
    with open_tools(args) as toolbox, open(output, "a", encoding="utf-8") as out:
        bar = tqdm(total=len(questions), initial=len(questions) - len(todo), desc="rollout", unit="question")
        for at in range(0, len(todo), per_batch):
            chunk = todo[at : at + per_batch]
            groups = start_groups(chunk, tokenizer, args, (args.seed,))
            try:
                complete_groups(complete, model, tokenizer, groups, args, toolbox, (args.seed,))
            finally:  # a server that went away leaves whole groups, which are kept
                whole = [g for g in groups if len(g) == args.num_generations and all(d.finish for d in g)]
                group = [to_trajectory(d, tokenizer) for g in whole for d in g]
                out.writelines(t.to_json() + "\n" for t in group)
                out.flush()
            done += group
            calls = sum(t.n_calls for t in done) / len(done)
            bar.set_postfix(calls=f"{calls:.2f}", tokens=f"{sum(t.completion_tokens for t in done) / len(done):.0f}")
            bar.update(len(chunk))
        bar.close()
    print(f"{output}: {len(done)} trajectories of {len(questions)} questions")
    return done


if __name__ == "__main__":
    cli(main, Args, trained_flags)
