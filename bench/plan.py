"""Does a run fit, how long is it, and is its data read as you meant? Answered before any weights are loaded.

    python train_rl.py FLAGS… --dry_run            for this machine
    python train_rl.py FLAGS… --dry_run 24         for a GPU of 24 GB, which need not be here

Every script hands such a command line to this module, which reads the flags as the script would. It prints what the
data holds, one rendered prompt, the steps, the memory by part (formulas: bench/memory.py) and what fits on common
cards. It ends with exit code 2, and with flags that help, if a flag or the data is wrong or the run cannot fit. Data
and tokenizer that are not on this machine are not fetched: the plan then takes the lengths that the flags allow.
"""

import importlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

import train_sft
from bench.memory import CONTEXT, LIKE_LLAMA, Decoder, Parts, Setup, decoder_of, read_config, rollout, training
from core.args import cli
from core.conversation import decode
from core.model import ModelArgs, load_tokenizer
from core.run import table
from core.trajectory import DataError
from data.questions import load_questions
from engines.toolbox import has_index
from engines.turns import check_prompts, start_draft

ROOT = Path(__file__).resolve().parent.parent
GiB = 2**30
CARDS = (16, 24, 80)  # GB
USABLE = 0.95  # of a card's GiB: the driver and error correction keep the rest
TIGHT = 0.8  # of a card; a plan above it may not fit after all
SHOWN = 500  # characters of the prompt that is printed, half of them from its end


class Plan(NamedTuple):
    """What one script will do; a phase that it does not have is 0."""

    setup: Setup
    work: dict[str, Any]  # printed as it is
    at_once: int = 0  # trajectories that are sampled at once
    longest: int = 0  # tokens of the longest row that is trained on
    tokens: int = 0  # of the largest micro-batch, padding included


# ---------------------------------------------------------------------------------------------------- the data


def local_tokenizer(args: ModelArgs) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer from its folder or the hub's cache; None if it would have to be downloaded."""
    path = args.model_name_or_path
    try:
        here = Path(path).is_dir() or isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str)
    except ValueError:  # a folder that is not there yet is no valid name on the hub
        return None
    return load_tokenizer(path, date=args.date) if here else None


def by_task(rows: list[Any]) -> str:
    """The number of rows, and of each task."""
    return f"{len(rows)} ({', '.join(f'{task} {n}' for task, n in sorted(Counter(r.task for r in rows).items()))})"


def shortened(text: str) -> str:
    """The text's beginning and end, each line indented."""
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
    return "\n" + indent(text.rstrip("\n"), "    ")


def read_questions(args: Any) -> tuple[int, int, dict[str, Any]]:
    """(number of questions, longest prompt in tokens, what to print) of `--data`, as far as it is on this machine.

    0 questions if the file is not there; without a tokenizer the longest prompt is what the flags allow. DataError as
    in the run itself.
    """
    if not Path(args.data).is_file():
        return 0, args.max_prompt_length, {"questions": f"{args.data} is not here: not checked"}
    questions = load_questions(args.data, args.task, args.limit, args.split)
    work = {"questions": by_task(questions)}
    if not has_index(args.index):
        work["index"] = f"{args.index} is not here: not checked"
    tokenizer = local_tokenizer(args)
    if tokenizer is None:
        return len(questions), args.max_prompt_length, work | {"prompts": "no tokenizer here: not checked"}
    served = args.engine == "openai"  # then nobody here knows the model's positions
    model = None if served else SimpleNamespace(config=read_config(args.model_name_or_path))
    longest = check_prompts(questions, tokenizer, args, model)
    prompt = decode(tokenizer, start_draft(questions[0], 0, tokenizer, args, ()).ids)  # and how the response opens
    work |= {"longest prompt, tokens": longest, "a prompt": shortened(prompt)}
    return len(questions), longest, work


# ---------------------------------------------------------------------------------------------------- the scripts


def base_of(args: ModelArgs, on: torch.device) -> Setup:
    """The model that the flags name; an adapter folder has the rank and the targets that it was made with."""
    r, targets = args.lora_r, args.lora_target_modules
    adapter = Path(args.model_name_or_path, "adapter_config.json")
    if adapter.is_file():
        config = json.loads(adapter.read_text())
        r, targets = config["r"], config["target_modules"]
    return Setup(on, args.dtype, args.load_in_4bit, r, targets, adapter.is_file())


def rl_setup(args: Any, on: torch.device, prompt: int) -> Setup:
    """What train_rl.py keeps in memory; prompt: the longest, in tokens."""
    return base_of(args, on)._replace(
        optimizer=args.optimizer,
        checkpointing=args.gradient_checkpointing,
        reference=args.beta > 0 or args.indicator == "reference",
        sampling_copy="" if args.rollout_dtype == "policy" else args.rollout_dtype,
        engine=args.engine,
        prompt=prompt,
        completion=args.max_completion_length,
    )


def plan_rl(args: Any, on: torch.device) -> Plan:
    """train_rl.py: samples a step's trajectories, then trains on them in micro-batches."""
    n, prompt, work = read_questions(args)
    if 0 < n < args.questions_per_step:
        raise DataError(
            f"--data {args.data} holds {n} questions, fewer than --questions_per_step {args.questions_per_step}"
        )
    per_step, longest = args.questions_per_step * args.num_generations, prompt + args.max_completion_length
    work |= {
        "steps": args.max_steps,
        "optimizer steps": args.max_steps * args.num_iterations * args.updates_per_batch,
        "trajectories per step": per_step,
        "trajectories": args.max_steps * per_step,
        "tokens per step, at most": per_step * longest,
    }
    budget = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * longest
    tokens = min(budget, per_step // args.updates_per_batch * longest)
    return Plan(rl_setup(args, on, prompt), work, min(args.rollout_batch_size, per_step), longest, tokens)


def plan_sft(args: Any, on: torch.device) -> Plan:
    """train_sft.py: trains on examples as long as they are, or as --max_length allows where they cannot be read."""
    per_step, longest = args.per_device_train_batch_size * args.gradient_accumulation_steps, args.max_length
    tokenizer = local_tokenizer(args)
    work = {"examples": f"{args.data} is not here, or no tokenizer: not checked"}
    if tokenizer and Path(args.data).is_file():
        vocabulary = read_config(args.model_name_or_path).get_text_config().vocab_size
        examples = train_sft.load_examples(args.data, tokenizer, args, vocabulary)
        longest, first = max(len(t.token_ids) for t in examples), examples[0]
        work = {"examples": by_task(examples), "longest example, tokens": longest}
        work["a prompt"] = shortened(tokenizer.decode(first.token_ids[: first.prompt_len]))
        work["steps"] = args.max_steps or math.ceil(args.num_train_epochs * math.ceil(len(examples) / per_step))
    work |= {"examples per step": per_step, "tokens per step, at most": per_step * longest}
    budget = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * longest
    setup = base_of(args, on)._replace(optimizer=args.optimizer, checkpointing=args.gradient_checkpointing)
    return Plan(setup, work, 0, longest, max(longest, min(budget, per_step * longest)))


def plan_rollout(args: Any, on: torch.device) -> Plan:
    """rollout.py: samples; with --engine openai at a server, which needs no memory here."""
    n, prompt, work = read_questions(args)
    work["trajectories per question"] = args.num_generations
    setup = base_of(args, on)
    if args.engine == "openai":
        return Plan(setup, work | {"sampled": f"at {args.base_url}: needs no memory here"})
    at_once = min(args.rollout_batch_size, n * args.num_generations or args.rollout_batch_size)
    setup = setup._replace(engine=args.engine, prompt=prompt, completion=args.max_completion_length)
    return Plan(setup, work, at_once)


def plan_flywheel(args: Any, on: torch.device) -> Plan:
    """flywheel.py: samples round after round; the passes of its critic are not planned."""
    plan = plan_rollout(args, on)
    most = args.num_generations + 3 * args.rounds if args.per_round == "best" else args.max_per_question
    plan.work["trajectories per question"] = f"at most {most}; without the critic's own passes"
    return plan._replace(at_once=args.rollout_batch_size if plan.at_once else 0)


def plan_warmup(args: Any, on: torch.device) -> Plan:
    """methods.warmup: samples every question in both modes, maybe with two models one after the other."""
    if args.think_model_name_or_path and args.engine != "openai":
        models = args.model_name_or_path, args.think_model_name_or_path
        args.model_name_or_path = max(models, key=lambda path: decoder_of(read_config(path)).parameters)
    plan = plan_rollout(args, on)
    plan.work["trajectories per question"] = f"{args.num_generations} in each of two modes"
    return plan


def plan_curriculum(args: Any, on: torch.device) -> Plan:
    """methods.curriculum: rounds of sampling and RL. Its sampling is planned as if the trainer were there too."""
    plan = plan_rl(args, on)
    rounds = f"{args.rounds}, each samples {args.select_generations} answers per question, then trains:"
    return plan._replace(work={"rounds": rounds} | plan.work, at_once=args.rollout_batch_size)


PLANS: dict[str, Callable[[Any, torch.device], Plan] | None] = {  # None: the script loads no model
    "train_rl": plan_rl,
    "train_sft": plan_sft,
    "rollout": plan_rollout,
    "flywheel": plan_flywheel,
    "methods.warmup": plan_warmup,
    "methods.curriculum": plan_curriculum,
    "methods.selection": None,
    "methods.refine": None,
    "eval.evaluate": None,
    "data.prepare_gsm8k": None,
    "data.prepare_multihop": None,
}


# ---------------------------------------------------------------------------------------------------- does it fit


def phases_of(plan: Plan, d: Decoder) -> tuple[Callable[[int], Parts] | None, Callable[[int], Parts] | None]:
    """(tokens of a micro-batch -> parts, trajectories at once -> parts); None for a phase that the script lacks."""

    def of_tokens(n: int) -> Parts:  # two rows need more memory than one: they are padded
        rows = max(n // plan.longest, 2 if n > plan.longest else 1)
        return training(d, plan.setup, rows, max(n // rows, 1))

    return of_tokens if plan.tokens else None, partial(rollout, d, plan.setup) if plan.at_once else None


def total(parts: Parts) -> int:
    """Sum of all parts in bytes."""
    return sum(parts.values())


def most(parts_of: Callable[[int], Parts] | None, size: int, above: int = 1) -> int | None:
    """Binary search for the largest n whose parts fit in `size` bytes, to within 3 %; larger n need more.

    0 if even `above` does not fit, None if there are no parts.
    """
    if parts_of is None:
        return None
    if total(parts_of(above)) > size:
        return 0
    low, high = above, 2 * above
    while total(parts_of(high)) <= size and high < 2**24:
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if total(parts_of(middle)) <= size else (low, middle)
    return low


def capacity(gb: int) -> tuple[int, str]:
    """(bytes, name) of the device to plan for: a GPU of so many GB, else the GPU's free memory, else the RAM."""
    if gb:
        return int(gb * GiB * USABLE), f"a GPU of {gb} GB"
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + CONTEXT, torch.cuda.get_device_name()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's RAM"


def advice(plan: Plan, tokens: int | None, at_once: int | None) -> str:
    """Flags that would make the plan smaller, the cheapest first; tokens, at_once: the most that fit."""
    flags = []
    if tokens is not None and tokens < plan.tokens:
        flags += [f"--max_tokens_per_micro_batch {tokens}"] if tokens else []
        flags += ["--gradient_checkpointing"] if not plan.setup.checkpointing else []
        flags += ["--optimizer adamw_8bit"] if plan.setup.optimizer == "adamw" else []
    if at_once is not None and at_once < plan.at_once:
        flags += ["--engine fast"] if plan.setup.engine == "hf" else []
        flags += [f"--rollout_batch_size {at_once}"] if at_once else []
    flags += ["--load_in_4bit"] if not plan.setup.four_bit else []
    return ", ".join([*flags, "a shorter --max_length" if at_once is None else "a shorter --max_completion_length"])


def show(plan: Plan, d: Decoder, gb: int) -> int:
    """Print memory by part and phase, and what fits on common cards; returns the peak in bytes.

    gb: as in `capacity`. DataError that names flags to change if the peak is more than that device has.
    """
    of_tokens, of_rows = phases_of(plan, d)
    phases = {}
    if of_rows:
        phases[f"rollout of {plan.at_once}"] = of_rows(plan.at_once)
    if of_tokens:
        phases[f"training on {plan.tokens:,} tokens"] = of_tokens(plan.tokens)
    names = list(dict.fromkeys(part for parts in phases.values() for part in parts))
    rows = [[part, *(parts.get(part, 0) / GiB for parts in phases.values())] for part in names]
    print(table(["GiB", *phases], [*rows, ["sum", *(total(parts) / GiB for parts in phases.values())]]))
    peak, (size, device) = max(map(total, phases.values())), capacity(gb)
    print(f"\npeak {peak / GiB:.2f} GiB; {device} has {size / GiB:.1f} GiB")
    if plan.setup.on.type == "cuda":
        print("not yet measured on a GPU, so leave a fifth free")
    else:
        print("on a CPU the process keeps more: runs were measured at 1.4 to 1.7 times their plan")
    if d.kind not in LIKE_LLAMA:
        print(f"activations are estimated by the formulas for Llama-like layers: model_type {d.kind!r} may differ")
    rows = []
    for card in CARDS:
        limit, name = int(card * GiB * USABLE), f"{card} GB"
        word = "does not fit" if peak > limit else "tight" if peak > TIGHT * limit else "fits"
        limits = most(of_tokens, limit, plan.longest), most(of_rows, limit)
        rows.append([name, word, *("-" if n is None else n or "not one" for n in limits)])
    print("\n" + table(["card", "this plan", "most tokens per micro-batch", "most trajectories at once"], rows))
    if peak > size:
        flags = advice(plan, most(of_tokens, size, plan.longest), most(of_rows, size))
        raise DataError(f"the run needs {peak / GiB:.1f} GiB, {device} has {size / GiB:.1f}; flags that help: {flags}")
    return peak


def dry_run(name: str, args: Any, gb: int = 0) -> int:
    """Print the plan of a script; DataError if the data is wrong or the run cannot fit.

    gb: plan for a GPU of so many GB, 0: for this machine. Returns the peak in bytes, 0 where no model is loaded here.
    """
    if PLANS[name] is None:
        print(f"{name}: the flags are fine; it loads no model")
        return 0
    plan = PLANS[name](args, torch.device("cuda" if gb or torch.cuda.is_available() else "cpu"))
    four_bit = ", Linears in 4-bit NF4" if args.load_in_4bit else ""
    for what, value in ({"model": f"{args.model_name_or_path}, {args.dtype}{four_bit}"} | plan.work).items():
        print(f"{what:32} {value:,}" if isinstance(value, int) else f"{what:32} {value}")
    return show(plan, decoder_of(read_config(args.model_name_or_path)), gb) if plan.at_once or plan.tokens else 0


# ---------------------------------------------------------------------------------------------------- command line


def taken_out(words: list[str]) -> tuple[list[str], int]:
    """(the words without `--dry_run` and a number behind it, that number or 0)."""
    if "--dry_run" not in words:
        return words, 0
    at = words.index("--dry_run")
    number = next(iter(words[at + 1 :]), "")
    if number.isdigit() and int(number):
        return words[:at] + words[at + 2 :], int(number)
    return words[:at] + words[at + 1 :], 0


def for_a_gpu(cls: type) -> type:
    """The flags of a script that loads a model, with `--dtype auto` as it is where there is a GPU."""

    class Planned(cls):
        def __post_init__(self):
            if self.dtype == "auto":
                self.dtype = "bfloat16"
            super().__post_init__()

    return Planned


def main(words: list[str]) -> None:
    """Plan the command line `SCRIPT FLAGS… --dry_run [GB]`; the script is a path, as Python puts it into sys.argv."""
    if not words or words[0] in ("--help", "-h"):
        print(__doc__)
        return
    words, gb = taken_out(words)
    path = Path(words[0]).resolve().with_suffix("")
    name = ".".join(path.relative_to(ROOT).parts) if path.is_relative_to(ROOT) else str(path)
    if name not in PLANS:
        print(f"bench.plan: error: {name} has no plan; these have one: {', '.join(PLANS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(name)
    cls, trained = module.Args, getattr(module, "trained_flags", None)
    sys.argv = words
    cli(lambda args: dry_run(name, args, gb), for_a_gpu(cls) if gb and PLANS[name] else cls, trained)


if __name__ == "__main__":
    main(sys.argv[1:])
