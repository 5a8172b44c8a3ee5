"""How fast are the two sampling engines? Trajectories and tokens per second of `generate` and of engines/fast.py.

    python -m bench.rollout --output results/rollout_cpu
    python -m bench.rollout --random_init Qwen2.5-7B --load_in_4bit --slots 64 --output results/rollout_7b

A model of a real shape with random weights samples scripted trajectories: noise on top of its own leaves it no choice.
Every engine so runs the whole model and must produce the same ids (checked), whatever the weights. Loads:

    short   prompts of 30 tokens, 5-25 sampled tokens per turn, results of 20 tokens, tools that answer at once
    long    prompts of 400 tokens, 20-200 sampled tokens per turn, results of 800 tokens, tool latency 0.2-1.0 s

Eight trajectories share a prompt. A line is the median of --repeats runs, after one short run of each engine that is
not counted. Prefill tokens are those that are read without sampling after them, per trajectory. A line that runs out of
memory says so, and the next one starts.
"""

import random
import statistics
import time
from dataclasses import dataclass
from itertools import product
from typing import Literal
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bench import report
from bench.random_model import random_base, shape_config
from core.args import arg, check_numbers, cli, require_positive
from core.conversation import Draft, encode, result_text
from core.model import ModelArgs, causal_lm, device, with_adapter
from core.trajectory import Question
from engines import fast, hf
from engines.args import SamplingArgs
from engines.toolbox import ToolBox
from engines.turns import gumbel_noise
from tools.sandbox import ToolResult

ENGINES = {"fast": fast.complete, "hf": hf.complete}
LOADS = {  # prompt tokens, sampled tokens per turn, result tokens, tool latency in seconds
    "short": (30, (5, 25), 20, (0.0, 0.0)),
    "long": (400, (20, 200), 800, (0.2, 1.0)),
}
GROUP = 8
WORDS = 700  # of the tokenizer
COLUMNS = ["load", "tool turns", "slots", "engine", "trajectories/s", "sampled tokens/s", "prefill tokens each",
           "prefill saved", "times hf"]  # fmt: skip


@dataclass
class Args:
    """Flags of the benchmark."""

    output: str = arg("", "prefix of the table (.md) and the records (.json) (required)")
    random_init: str = arg("data/tiny", "a known architecture, or a folder with a config.json")
    layers: int = arg(0, "layers of the shape, 0 = all")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = arg("auto", "bfloat16 on a GPU, float32 on a CPU")
    load_in_4bit: bool = arg(False, "Linears in 4-bit NF4 (bitsandbytes)")
    loads: list[str] = arg(list(LOADS), "loads to run")
    engines: list[str] = arg(list(ENGINES), "engines to run")
    slots: list[int] = arg([16, 64], "trajectories decoded at once")
    turns: list[int] = arg([0, 4], "tool calls per trajectory")
    waves: float = arg(2.0, "trajectories per slot")
    repeats: int = arg(3, "runs per line, of which the median counts")
    threads: int = arg(2, "CPU threads")

    def __post_init__(self):
        if not self.output:
            raise ValueError("--output is required")
        check_numbers(self)
        require_positive(self, "repeats", "threads")
        for flag, known in (("loads", LOADS), ("engines", ENGINES)):
            if unknown := [name for name in getattr(self, flag) if name not in known]:
                raise ValueError(f"--{flag} {unknown[0]}: not one of {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------- a load


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word and per tag; words are w0, w1, …"""
    special = ["<pad>", "<eos>", "<unk>", "<python>", "</python>", "<result>", "</result>", "<answer>", "</answer>"]
    words = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(vocab - len(special))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def random_policy(args: Args, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """The shape with random weights and an adapter; its vocabulary holds the tokenizer's words."""
    flags = ModelArgs(args.random_init, args.dtype, args.load_in_4bit)
    config = shape_config(args.random_init, args.layers)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.max_position_embeddings = max(config.max_position_embeddings, 32768)
    model = with_adapter(random_base(config, flags), flags)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    causal_lm(model).generation_config = GenerationConfig(**ends)
    return model.to(device()).eval()


def scripted_noise(scripts: dict[int, list[int]]):
    """A stand-in for turns.gumbel_noise, at its cost, under which the row of a seed samples its script's tokens.

    scripts: draft seed -> response ids by position, tool results included.
    """

    def noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
        places = zip(seeds.tolist(), positions.tolist())  # generate also asks for rows that have ended
        chosen = [scripts[seed][at] if at < len(scripts[seed]) else 0 for seed, at in places]
        own = gumbel_noise(seeds, positions, vocab)  # (B, V)
        return own.scatter_(1, torch.tensor(chosen, device=seeds.device)[:, None], 1e9)

    return noise


def make_load(
    load: str, turns: int, count: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[Draft], dict[int, list[int]], ToolBox]:
    """Drafts of `count` trajectories, what each samples, and the tool they call; the same for every engine."""
    prompt_length, sampled, result_length, latency = LOADS[load]
    rng = random.Random(0)
    text = " ".join(f"w{i % 300}" for i in range(result_length - 2))

    def tool(code: str) -> ToolResult:
        seconds = random.Random(code).uniform(*latency)  # a function of the call: the same wait under every engine
        time.sleep(seconds)
        return ToolResult(text, True, None, seconds)

    between = encode(tokenizer, result_text([text], tokenizer, "tags"))
    drafts, scripts = [], {}
    for i in range(count):
        if i % GROUP == 0:
            prompt = [rng.randrange(9, len(tokenizer)) for _ in range(prompt_length)]
        script: list[int] = []
        for turn in range(turns + 1):
            opening, closing = ("<answer>", "</answer>") if turn == turns else ("<python>", "</python>")
            words = [f"w{rng.randrange(600)}" for _ in range(rng.randint(*sampled) - 2)]
            script += encode(tokenizer, " ".join([opening, *words, closing])) + (between if turn < turns else [])
        drafts.append(Draft(Question(str(i // GROUP), "", "", "qa"), i % GROUP, "tags", i, list(prompt), prompt_length))
        scripts[i] = script
    return drafts, scripts, {"python": tool}


# ---------------------------------------------------------------------------------------------------- measuring


def run_once(name: str, model, tokenizer, slots: int, turns: int, load) -> dict:
    """Seconds and token counts of one run; ValueError if the engine did not produce the script."""
    drafts, scripts, toolbox = load
    args = SamplingArgs(
        max_completion_length=max(map(len, scripts.values())) + 1,
        max_tool_calling_iterations=max(turns, 1),
        max_tool_seconds=float("inf"),
        rollout_batch_size=slots,
        tool_workers=slots,
    )
    noise = scripted_noise(scripts)
    with patch.object(hf, "gumbel_noise", noise), patch.object(fast, "gumbel_noise", noise):
        begin = time.perf_counter()
        counts = ENGINES[name](model, tokenizer, drafts, args, toolbox)
        seconds = time.perf_counter() - begin
    if wrong := [d.seed for d in drafts if d.ids[d.prompt_len :] != scripts[d.seed]]:
        raise ValueError(f"engine {name}: draft {wrong[0]} is not its script")
    contexts = sum(start for d in drafts for who, start, _, _ in d.segments if who == "model")
    return {
        "seconds": seconds,
        "sampled": sum(sum(d.mask) for d in drafts),
        "contexts": contexts,  # tokens before every turn: what a sampler without a lasting cache reads
        "read": contexts if counts is None else counts["prefilled"] + counts["fed"],
        "counts": counts,
    }


def line(name: str, model, tokenizer, slots: int, turns: int, load: str, args: Args) -> dict:
    """Median seconds and the counts of one line; {"failed": why} if memory was too small."""
    count = int(slots * args.waves)
    row = {"load": load, "turns": turns, "slots": slots, "engine": name, "trajectories": count}
    try:
        runs = [
            run_once(name, model, tokenizer, slots, turns, make_load(load, turns, count, tokenizer))
            for _ in range(args.repeats)
        ]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"failed": "out of memory"}
    seconds = [run["seconds"] for run in runs]
    return row | runs[-1] | {"seconds": statistics.median(seconds), "all_seconds": seconds}


def cells(rows: list[dict]) -> list[list]:
    """The lines of the table; the last column is how many times faster than `hf` on the same load."""
    result, plain = [], {(r["load"], r["turns"], r["slots"]): r.get("seconds") for r in rows if r["engine"] == "hf"}
    for r in rows:
        what = r["load"], r["turns"], r["slots"]
        if "failed" in r:
            result.append([*what, r["engine"], r["failed"], *["-"] * 4])
            continue
        rates = r["trajectories"] / r["seconds"], round(r["sampled"] / r["seconds"])
        prefill = round(r["read"] / r["trajectories"]), f"{100 * (1 - r['read'] / r['contexts']):.0f} %"
        slow = plain.get(what)
        result.append([*what, r["engine"], *rates, *prefill, f"{slow / r['seconds']:.2f}" if slow else "-"])
    return result


def main(args: Args) -> list[dict]:
    """Run every line, check that all engines produced the same ids, and write table and records after each line."""
    torch.set_num_threads(args.threads)
    tokenizer = word_tokenizer(WORDS)
    model = random_policy(args, tokenizer)
    result = report.start("bench.rollout", args)
    for name in args.engines:
        run_once(name, model, tokenizer, 16, 1, make_load("short", 1, 16, tokenizer))
    lines = list(product(args.loads, args.turns, args.slots, args.engines))
    notes = f"{args.random_init} with random weights in {next(model.parameters()).dtype}"
    notes += f"{', Linears in 4-bit NF4' if args.load_in_4bit else ''}, LoRA r=16; median of {args.repeats}."
    for load, turns, slots, name in tqdm(lines, desc="benchmark", unit="line"):
        result["rows"].append(line(name, model, tokenizer, slots, turns, load, args))
        text = report.write(result, COLUMNS, cells(result["rows"]), notes)
    print(text)
    return result["rows"]


if __name__ == "__main__":
    cli(main, Args)
