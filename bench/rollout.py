"""Benchmark of the sampling engines: trajectories and tokens per second, and prefill tokens saved, in one run.

    python -m bench.rollout --output results/rollout_cpu --threads 2
    python -m bench.rollout --random_init Qwen2.5-7B --load_in_4bit --slots 64 --output results/rollout_7b

A small model with random weights samples scripted trajectories: the noise of the Gumbel trick leaves it no choice, so
every engine runs the whole model and produces the same ids (checked), whatever the weights. Loads:

    short   prompts of 30 tokens, 5-25 sampled tokens per turn, results of 20 tokens, tools that answer at once
    long    prompts of 400 tokens, 20-200 sampled tokens per turn, results of 800 tokens, tool latency 0.2-1.0 s

G = 8 trajectories per prompt. Median of --repeats runs after one short run of each engine that is not counted. Prefill
tokens: those that are read without sampling after them, counted per trajectory.
"""

import json
import random
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rollout
from bench.random_model import random_base, shape_config
from core.args import arg, cli
from core.conversation import Draft, encode, result_text
from core.model import ModelArgs, causal_lm, device, with_adapter
from core.run import environment, table, write_text
from core.trajectory import DataError, Question
from engines import fast
from engines.toolbox import ToolBox
from rollout import RolloutArgs
from tools.sandbox import ToolResult

COMPLETE = {"hf": rollout.complete, "fast": fast.complete}
LOADS = {  # prompt tokens, sampled tokens per turn, result tokens, tool latency in seconds
    "short": (30, (5, 25), 20, (0.0, 0.0)),
    "long": (400, (20, 200), 800, (0.2, 1.0)),
}
GROUP = 8


@dataclass
class Args:
    """Flags of the benchmark."""

    output: str = arg("", "prefix of the table (.md) and the records (.json) (required)")
    loads: list[str] = arg(["short", "long"], f"loads to run: {', '.join(LOADS)}")
    engines: list[str] = arg(["hf", "fast"], f"engines to run: {', '.join(COMPLETE)}; the first is the baseline")
    slots: list[int] = arg([16, 64], "trajectories decoded at once")
    turns: list[int] = arg([0, 4], "tool calls per trajectory")
    waves: float = arg(2.0, "trajectories per slot")
    repeats: int = arg(3, "runs per line, of which the median counts")
    hidden: int = arg(128, "width of the model")
    layers: int = arg(4, "layers of the model")
    heads: int = arg(4, "attention heads")
    kv_heads: int = arg(4, "key and value heads")
    vocab: int = arg(700, "words of the tokenizer, and vocabulary of the model but for --random_init")
    random_init: str = arg("", "a known architecture, or a folder with a config.json, instead of these sizes")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = arg(
        "auto", "--random_init: auto is bfloat16 on a GPU, float32 on a CPU"
    )
    load_in_4bit: bool = arg(False, "--random_init: Linears in 4-bit NF4 (bitsandbytes)")
    threads: int = arg(2, "CPU threads")

    def __post_init__(self):
        if not self.output:
            raise ValueError("--output is required")
        for flag, known in (("loads", LOADS), ("engines", COMPLETE)):
            if unknown := [name for name in getattr(self, flag) if name not in known]:
                raise ValueError(f"--{flag} {unknown[0]}: not one of {', '.join(known)}")
        if self.load_in_4bit and not self.random_init:
            raise ValueError("--load_in_4bit needs --random_init")


# ---------------------------------------------------------------------------------------------------- a load


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word and per tag; words are w0, w1, …"""
    special = ["<pad>", "<eos>", "<unk>", "<python>", "</python>", "<result>", "</result>", "<answer>", "</answer>"]
    words = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(vocab - len(special))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def random_model(args: Args, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """The shape of the shipped base by default, in float32, with random weights; --random_init with an adapter."""
    if args.random_init:
        flags, config = ModelArgs(args.random_init, args.dtype, args.load_in_4bit), shape_config(args.random_init)
        if config.vocab_size < len(tokenizer):
            raise DataError(f"--vocab {args.vocab}: {args.random_init} has a vocabulary of {config.vocab_size}")
        model = with_adapter(random_base(config, flags), flags)
        causal_lm(model).generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        return model.to(device()).eval()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads, tie_word_embeddings=True, max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(device()).eval()


def scripted_noise(scripts: dict[int, list[int]]):
    """A stand-in for rollout.gumbel_noise under which the row of a seed samples the script's token at every position.

    scripts: draft seed -> response ids by position, tool results included.
    """

    def noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
        chosen = []
        for seed, at in zip(seeds.tolist(), positions.tolist()):
            script = scripts[seed]
            chosen.append(script[at] if at < len(script) else 0)  # generate also asks for rows that have ended
        out = torch.zeros(len(seeds), vocab, device=seeds.device)
        return out.scatter_(1, torch.tensor(chosen, device=seeds.device)[:, None], 1e9)

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
    args = RolloutArgs(
        max_completion_length=max(map(len, scripts.values())) + 1,
        max_tool_calling_iterations=max(turns, 1),
        max_tool_seconds=float("inf"),
        rollout_batch_size=slots,
        tool_workers=slots,
    )
    noise = scripted_noise(scripts)
    with patch.object(rollout, "gumbel_noise", noise), patch.object(engine, "gumbel_noise", noise):
        begin = time.perf_counter()
        counts = COMPLETE[name](model, tokenizer, drafts, args, toolbox)
        seconds = time.perf_counter() - begin
    wrong = [d.seed for d in drafts if d.ids[d.prompt_len :] != scripts[d.seed]]
    if wrong:
        raise ValueError(f"engine {name}: draft {wrong[0]} is not its script")
    contexts = sum(start for d in drafts for who, start, _, _ in d.segments if who == "model")
    return {
        "seconds": seconds,
        "sampled": sum(sum(d.mask) for d in drafts),
        "contexts": contexts,  # tokens before every turn: what a sampler without a lasting cache reads
        "read": contexts if counts is None else counts["prefilled"] + counts["fed"],
        "tool_seconds": sum(c.seconds for d in drafts for c in d.calls),
        "counts": counts,
    }


def report(header: dict, args: Args, rows: list[dict]) -> str:
    """The markdown table, with what it was measured on."""
    cells = [
        [
            r["load"], r["turns"], r["slots"], r["engine"], r["trajectories"] / r["seconds"],
            round(r["sampled"] / r["seconds"]), round(r["read"] / r["trajectories"]),
            f"{100 * (1 - r['read'] / r['contexts']):.0f} %", f"{r['speedup']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    names = ["load", "tool turns", "slots", "engine", "trajectories/s", "sampled tokens/s", "prefill tokens each",
             "prefill saved", "speed-up"]  # fmt: skip
    return (
        f"{table(names, cells)}\n\n"
        f"{header['cpu']}, {args.threads} threads of {header['cores']} cores, GPU: {header['gpu'] or 'none'}; torch "
        f"{header['packages']['torch']}, transformers {header['packages']['transformers']}; commit {header['commit']}; "
        f"median of {args.repeats}; speed-up over `{args.engines[0]}` on the same load in the same run.\n"
        f"Random model: {shape_text(args)}.\n\n    {header['command']}\n"
    )


def shape_text(args: Args) -> str:
    """The model in words."""
    if args.random_init:
        four_bit = ", Linears in 4-bit NF4" * args.load_in_4bit
        return f"{args.random_init}, --dtype {args.dtype}{four_bit}, LoRA r=16"
    heads = f"{args.heads} heads ({args.kv_heads} for keys)"
    return f"{args.layers} layers of {args.hidden}, {heads}, vocabulary {args.vocab}, float32"


def main(args: Args) -> list[dict]:
    """Run every line, check that all engines produced the same ids, and write table and records after each line."""
    torch.set_num_threads(args.threads)
    tokenizer = word_tokenizer(args.vocab)
    model = random_model(args, tokenizer)
    header = {"command": f"python -m bench.rollout {shlex.join(sys.argv[1:])}", **environment(args.threads)}
    for name in args.engines:
        run_once(name, model, tokenizer, 16, 1, make_load("short", 1, 16, tokenizer))
    lines = [
        (load, turns, slots, name)
        for load in args.loads
        for turns in args.turns
        for slots in args.slots
        for name in args.engines
    ]
    rows: list[dict] = []
    for load, turns, slots, name in tqdm(lines, desc="benchmark", unit="line"):
        count = int(slots * args.waves)
        runs = [
            run_once(name, model, tokenizer, slots, turns, make_load(load, turns, count, tokenizer))
            for _ in range(args.repeats)
        ]
        seconds = statistics.median(r["seconds"] for r in runs)
        baseline = next((r for r in rows if (r["load"], r["turns"], r["slots"]) == (load, turns, slots)), None)
        row = {"load": load, "turns": turns, "slots": slots, "engine": name, "trajectories": count, **runs[-1]}
        row |= {"seconds": seconds, "all_seconds": [r["seconds"] for r in runs]}
        row["speedup"] = baseline["seconds"] / seconds if baseline else 1.0
        rows.append(row)
        records = {**header, "args": asdict(args), "rows": rows}
        write_text(Path(args.output + ".json"), json.dumps(records, indent=1) + "\n")
        write_text(Path(args.output + ".md"), report(header, args, rows))
    print(report(header, args, rows))
    return rows


if __name__ == "__main__":
    cli(main, Args)
