"""What a run will do and need, before any weights are loaded: steps, tokens, memory, and whether it fits.

`--dry_run` on train_rl.py, train_sft.py and flywheel.py prints it for the longest trajectories that the flags allow
(bench/memory.py has the formulas), checks the data that is there, and ends with exit code 2 if the run cannot fit. For any
script, `python -m bench.plan [--gb N] SCRIPT FLAGS…` reads its flags and plans what they ask for:

    python -m bench.plan --gb 24 train_rl.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit …
    python -m bench.plan --gb 24 -m eval.evaluate --model_name_or_path …
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from bench.memory import CONTEXT, Parts, decoder_of, read_config, rollout, training
from core.args import arg, cli
from core.model import load_tokenizer
from core.run import table
from core.trajectory import DataError
from data.questions import load_questions
from engines.toolbox import has_index
from engines.turns import start_draft

GiB = 2**30
CARDS = (16, 24, 80)  # GB
USABLE = 0.95  # of a card's GiB: the driver and error correction keep the rest
TIGHT = 0.8  # of a card; a plan above it may not fit after all


@dataclass
class PlanArgs:
    """Flags of the plan."""

    dry_run: bool = arg(False, "print steps, tokens and memory, check what can be checked without weights, and stop")
    dry_run_gb: int = arg(0, "dry run: plan for a GPU of so many GB instead of the device that is here")


class Need(NamedTuple):
    """Memory of a run: `training` and `rollout` are None where the run has no such phase."""

    training: Callable[[int], Parts] | None  # tokens of a micro-batch -> parts
    rollout: Callable[[int], Parts] | None  # trajectories at once -> parts
    tokens: int  # of the longest micro-batch that the flags allow
    longest: int  # of one trajectory
    rows: int  # trajectories at once


def need_of(args: Any, on: torch.device, prompt: int, trajectories: int) -> Need:
    """The plan's functions for these flags; prompt: longest prompt in tokens; trajectories: of one step."""
    d = decoder_of(read_config(args.model_name_or_path))
    trains, rolls = hasattr(args, "per_device_train_batch_size"), hasattr(args, "engine")
    longest = prompt + args.max_completion_length if rolls else args.max_length
    tokens = rows = 0
    if trains:
        tokens = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * longest
    if rolls:
        rows = min(args.rollout_batch_size, trajectories)

    def of_tokens(n: int) -> Parts:  # two rows need more than one: they are padded
        rows = max(n // longest, 2 if n > longest else 1)
        return training(d, args, on, rows, max(n // rows, 1))

    def of_rows(n: int) -> Parts:
        return rollout(d, args, on, n, prompt, trains)

    at_server = rolls and args.engine == "openai"
    return Need(of_tokens if trains else None, None if at_server or not rolls else of_rows, tokens, longest, rows)


def most(fits: Callable[[int], bool], above: int = 1) -> int:
    """The largest n >= above with fits(n), to 3 %; 0 if there is none; fits must not come back once it is gone."""
    if not fits(above):
        return 0
    low, high = above, 2 * above
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def capacity(gb: int) -> tuple[int, str]:
    """(bytes, name) of the device to plan for: `--dry_run_gb`, else the GPU's free memory, else the machine's RAM."""
    if gb:
        return int(gb * GiB * USABLE), f"a GPU of {gb} GB"
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + CONTEXT, torch.cuda.get_device_name()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's RAM"


def advice(args: Any, need: Need, size: int) -> str:
    """Flags that would make the plan smaller, the cheapest first."""
    flags = []
    if need.training and total(need.training(need.tokens)) > size:
        n = most(lambda n: total(need.training(n)) <= size, need.longest)
        flags += [f"--max_tokens_per_micro_batch {n}"] if n else []
        flags += ["--gradient_checkpointing"] * (not args.gradient_checkpointing)
        flags += ["--optimizer adamw_8bit"] * (args.optimizer == "adamw")
    if need.rollout and total(need.rollout(need.rows)) > size:
        flags += ["--engine fast"] * (args.engine == "hf")
        n = most(lambda n: total(need.rollout(n)) <= size)
        flags += [f"--rollout_batch_size {n}"] if n else []
    flags += ["--load_in_4bit"] * (not args.load_in_4bit)
    flags += ["a shorter --max_completion_length" if need.rows else "a shorter --max_length"]
    return ", ".join(flags)


def total(parts: Parts) -> int:
    """Sum of all parts in bytes."""
    return sum(parts.values())


def show(need: Need, size: int, name: str) -> tuple[int, dict[int, bool]]:
    """Print memory by part and phase, and what fits on common cards; returns (peak in bytes, {GB: fits})."""
    phases = {}
    if need.rollout:
        phases[f"rollout of {need.rows}"] = need.rollout(need.rows)
    if need.training:
        phases[f"training on {need.tokens:,} tokens"] = need.training(need.tokens)
    names = list(dict.fromkeys(part for parts in phases.values() for part in parts if parts[part]))
    rows = [[part, *(parts.get(part, 0) / GiB for parts in phases.values())] for part in names]
    print(table(["GiB", *phases], [*rows, ["sum", *(total(parts) / GiB for parts in phases.values())]]))
    peak = max(map(total, phases.values()), default=0)
    print(f"\npeak {peak / GiB:.2f} GiB; {name} has {size / GiB:.1f} GiB; not yet measured on a GPU, so leave a fifth free\n")
    fits, rows = {}, []
    for gb in CARDS:
        limit = int(gb * GiB * USABLE)
        fits[gb] = peak <= limit
        tokens = need.training and most(lambda n: total(need.training(n)) <= limit, need.longest)
        at_once = need.rollout and most(lambda n: total(need.rollout(n)) <= limit)
        limits = ["-" if n is None else n or "not one" for n in (tokens, at_once)]
        word = "does not fit" if not fits[gb] else "tight" if peak > TIGHT * limit else "fits"
        rows.append([f"{gb} GB", word, *limits])
    print(table(["card", "this plan", "most tokens per micro-batch", "most trajectories at once"], rows))
    return peak, fits


def dry_run(args: Any, work: dict[str, Any], prompt: int = 0, trajectories: int = 0) -> dict:
    """Print the plan; DataError that names flags to change if it does not fit. Returns {"peak": bytes, "fits": …}.

    work: what the run will do, printed as it is; prompt, trajectories: as in `need_of`.
    """
    on = torch.device("cuda" if args.dry_run_gb or torch.cuda.is_available() else "cpu")
    need = need_of(args, on, prompt, trajectories)
    print(f"{'model':32} {args.model_name_or_path}, {args.dtype}{', Linears in 4-bit NF4' * args.load_in_4bit}")
    for what, value in work.items():
        print(f"{what:32} {value:,}" if isinstance(value, int) else f"{what:32} {value}")
    size, name = capacity(args.dry_run_gb)
    peak, fits = show(need, size, name)
    if peak > size:
        raise DataError(
            f"the run needs {peak / GiB:.1f} GiB, {name} has {size / GiB:.1f}; flags that help: "
            + advice(args, need, size)
        )
    return {"peak": peak, "fits": fits}


# ---------------------------------------------------------------------------------------------------- data


def local_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or of the hub's cache; None if it would have to be downloaded."""
    try:
        here = Path(path).is_dir() or isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str)
    except ValueError:  # a folder that is not there yet is no valid name on the hub
        return None
    return load_tokenizer(path) if here else None


def check_questions(args: Any) -> tuple[int, int, str]:
    """(number of questions, longest prompt in tokens, what was checked) of `--data`, as far as it is on this machine.

    0 questions if the file is not there; without a tokenizer the longest prompt is what the flags allow. DataError as
    in the run itself.
    """
    tokenizer = local_tokenizer(args.model_name_or_path)
    if not Path(args.data).is_file():
        return 0, args.max_prompt_length, f"{args.data} is not here: not checked"
    index = "" if has_index(args) else f"; {args.index} is not here"
    questions = load_questions(args.data, args.task, args.limit, args.split)
    if tokenizer is None:
        return len(questions), args.max_prompt_length, f"questions read; no tokenizer here: prompts not checked{index}"
    longest = max(start_draft(q, 0, tokenizer, args, ()).prompt_len for q in questions)
    return len(questions), longest, f"questions read, prompts of up to {longest} tokens{index}"


# ---------------------------------------------------------------------------------------------------- command line


def usage(problem: str) -> NoReturn:
    """One line and exit code 2."""
    print(f"bench/plan.py: error: {problem}; usage: bench/plan.py [--gb N] [-m] SCRIPT FLAGS…", file=sys.stderr)
    sys.exit(2)


def plan_command(argv: list[str]) -> None:
    """Read the flags of another script as it would; plan the run if it has a model, say so if it has none."""
    gb = 0
    if argv[:1] == ["--gb"] and argv[1:] and argv[1].isdigit():
        gb, argv = int(argv[1]), argv[2:]
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    argv = argv[1:] if argv[:1] == ["-m"] else argv
    name = (argv or [""])[0].removesuffix(".py").replace("/", ".")
    if not (Path(__file__).parent / f"{name.replace('.', '/')}.py").is_file():
        usage(f"{name!r} is no script")
    module = importlib.import_module(name)
    if not hasattr(module, "Args"):
        usage(f"{name} has no flags that can be read without running it")
    sys.argv = argv

    def plan(args: Any) -> None:
        if hasattr(args, "dry_run"):
            args.dry_run, args.dry_run_gb = True, gb
            module.main(args)
        elif getattr(args, "engine", None) and args.data:
            args.dry_run_gb = gb
            questions, prompt, checked = check_questions(args)
            work = {"data": checked, "trajectories per question": args.num_generations}
            dry_run(args, work, prompt, questions * args.num_generations or args.rollout_batch_size)
        else:
            print(f"{name}: flags are fine; it needs no model")

    cli(plan, module.Args)


if __name__ == "__main__":
    plan_command(sys.argv[1:])
