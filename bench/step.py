"""Benchmark of one GRPO step, score and update as train_rl.py does them: tokens per second and peak memory by shape.

    python -m bench.step --random_init Qwen2.5-7B --load_in_4bit --gradient_checkpointing --output results/step
    python -m bench.step --random_init data/tiny Qwen2.5-0.5B --layers 0 2 --output results/step_cpu …

Models have random weights (random_model.py: a known architecture or a folder with a config.json; nothing is
downloaded; --load_in_4bit needs bitsandbytes). Trajectories are seeded and ragged: a prompt, then a completion with a
tool result in its middle, which is not trained on.

    seconds     GPU: of the clock. CPU: of the processor, over all threads, so that other load does not count
    tokens/s    tokens of all trajectories, without padding, per second of score + update
    peak        GPU: most bytes that torch allocated in the phase. CPU (Linux only): the most resident memory of the
                phase above what was resident before the model was built (and after a step of a very small one), so
                pages that the allocator keeps count too
    predicted   memory.training for the largest micro-batch, without the CUDA context, which torch does not count

Each line runs in a fresh process: one step that is not counted, then the median of --repeats; peaks are the largest of
these. The other side is TRL's GRPOTrainer (checked with 1.16), if it is installed, on a model of the same weights with
the same LoRA, checkpointing, optimizer, clip and token weights: its own log-probs without gradients, its own
compute_loss, backward, clip, step. What differs: TRL pads prompts (left) and completions (right) separately, so its
micro-batches, cut here from tare's, are wider; it runs every completion token through the lm_head, on a CPU every
token; it computes in autocast when --dtype is bfloat16 and keeps adapters of a 4-bit base in bfloat16; it gives the old
log-probs up when a batch is used for a single update, where the score phase falls away (see the column).
"""

import gc
import importlib.metadata
import importlib.util
import json
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, Qwen2Config

import train_rl
from bench.memory import decoder_of, training
from bench.random_model import random_base, shape_config
from bench.rollout import word_tokenizer
from core.args import arg, cli, require_positive
from core.model import OptimizerName, adamw, device, enable_checkpointing, packed, schedule, with_adapter
from core.run import environment, table, write_text
from core.trajectory import Span, Trajectory
from grpo.update import micro_batches, update

GiB = 2**30
GROUP = 8  # trajectories per question
TOOL_SHARE = 0.25  # of a completion
Step = tuple[Callable[[], Any], Callable[[Any], None]]  # score, and the update of what it returns


@dataclass
class Args:
    """Flags of the benchmark."""

    output: str = arg("", "prefix of the table (.md) and the records (.json) (required)")
    random_init: list[str] = arg(["Qwen2.5-7B"], "shapes: known architectures or folders with a config.json")
    layers: list[int] = arg([], "layers of each shape, 0 = all; default all")
    libraries: list[str] = arg(["tare", "trl"], "implementations to run: tare, trl")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    load_in_4bit: bool = arg(False, "Linears in 4-bit NF4")
    lora_r: int = arg(16, "LoRA rank, all Linears but the lm_head")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass")
    optimizer: OptimizerName = arg("adamw", "adamw_8bit: states in 8 bits (bitsandbytes)")
    max_tokens_per_micro_batch: int = arg(8192, "micro-batches of so many tokens, padding included")
    trajectories: int = arg(16, "trajectories of the step")
    prompt_length: list[int] = arg([256, 512], "LOW HIGH: tokens of a prompt")
    completion_length: list[int] = arg([512, 1536], "LOW HIGH: tokens of a completion, tool result included")
    repeats: int = arg(3, "counted steps per line, of which the median counts")
    threads: int = arg(2, "CPU threads")

    def __post_init__(self):
        if not self.output:
            raise ValueError("--output is required")
        if unknown := [name for name in self.libraries if name not in STEPS]:
            raise ValueError(f"--libraries {unknown[0]}: not one of {', '.join(STEPS)}")
        self.layers = self.layers or [0] * len(self.random_init)
        if len(self.layers) != len(self.random_init):
            raise ValueError(f"--layers {self.layers}: one number for each of --random_init {self.random_init}")
        for flag, least in (("prompt_length", 1), ("completion_length", 4)):
            low, high = values if len(values := getattr(self, flag)) == 2 else (0, 0)
            if not least <= low <= high:
                raise ValueError(f"--{flag} takes LOW HIGH from {least} on, not {values}")
        longest = self.prompt_length[1] + self.completion_length[1]
        if self.max_tokens_per_micro_batch < longest:
            raise ValueError(
                f"--max_tokens_per_micro_batch {self.max_tokens_per_micro_batch} is less than a trajectory of {longest}"
            )
        require_positive(self, "trajectories", "repeats", "threads")
        if (self.load_in_4bit or self.optimizer == "adamw_8bit") and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit and --optimizer adamw_8bit need bitsandbytes, which is not installed")


def rl_flags(args: Args, shape: str) -> train_rl.Args:
    """The flags of an RL run with this step; dapo weights, since those of grpo depend on TRL's micro-batches."""
    same = ("dtype", "load_in_4bit", "lora_r", "gradient_checkpointing", "optimizer", "max_tokens_per_micro_batch")
    return train_rl.Args(
        model_name_or_path=shape,
        data="-",
        output_dir="-",
        num_generations=GROUP,
        loss_type="dapo",
        max_prompt_length=args.prompt_length[1],
        max_completion_length=args.completion_length[1],
        **{name: getattr(args, name) for name in same},
    )


def make_trajectories(args: Args, vocab: int) -> list[Trajectory]:
    """Ragged trajectories of random tokens, prompts shared by groups, with one advantage for each."""
    rng = random.Random(0)
    result = []
    for i in range(args.trajectories):
        if i % GROUP == 0:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(*args.prompt_length))]
        n, P = rng.randint(*args.completion_length), len(prompt)
        tool = int(n * TOOL_SHARE)
        start = P + (n - tool) // 2
        ids = prompt + [rng.randrange(vocab) for _ in range(n)]
        mask = [int(t >= P and not start <= t < start + tool) for t in range(len(ids))]
        spans = [Span("tool_result", start, start + tool)]
        t = Trajectory(str(i // GROUP), i % GROUP, "think", ids, P, mask, True, "", spans, [], "eos", "")
        advantage = rng.uniform(-1, 1)
        t.advantage, t.rewards = [advantage * m for m in mask], {"total": advantage}
        result.append(t)
    return result


# ---------------------------------------------------------------------------------------------------- the two steps


def tare_step(model: torch.nn.Module, flags: train_rl.Args, trajectories: list[Trajectory]) -> Step:
    """update.py, as train_rl.py calls it."""
    optimizer = adamw(model, flags.optimizer, flags.learning_rate, flags.weight_decay)
    scheduler = schedule(optimizer, "constant", 0.0, 1)
    betas = [0.0] * len(trajectories)

    def score():
        return micro_batches(trajectories, model, 0, flags)

    def step(batches):
        update(model, optimizer, scheduler, batches, trajectories, betas, flags)

    return score, step


def trl_step(model: torch.nn.Module, flags: train_rl.Args, trajectories: list[Trajectory]) -> Step:
    """GRPOTrainer's own log-probs and loss on prepared inputs; it is never asked to generate."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, report_to="none", use_cpu=device().type == "cpu", bf16=flags.dtype == "bfloat16",
            per_device_train_batch_size=2, num_generations=2, max_completion_length=flags.max_completion_length,
            gradient_checkpointing=flags.gradient_checkpointing, loss_type="dapo", beta=flags.beta,
            epsilon=flags.epsilon, epsilon_high=flags.epsilon_high, temperature=flags.temperature,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_dict({"prompt": ["w0", "w1"]}), processing_class=word_tokenizer(16),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # train() would set it; the dapo loss is normalised by tokens
    optimizer = adamw(model, flags.optimizer, flags.learning_rate, flags.weight_decay)  # after TRL's cast of adapters
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens = sum(t.completion_tokens for t in trajectories)

    def score():
        batches = []
        for rows in packed(trajectories, 0, flags.max_tokens_per_micro_batch):
            inputs = trl_inputs(rows, tokens)
            ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            with torch.no_grad():
                logp, *_ = trainer._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].shape[1]
                )
            batches.append(inputs | {"old_per_token_logps": logp})
        return batches

    def step(batches):
        for inputs in batches:
            trainer.accelerator.backward(trainer.compute_loss(model, inputs))
        torch.nn.utils.clip_grad_norm_(trained, flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return score, step


def trl_inputs(rows: list[Trajectory], tokens: int) -> dict[str, Tensor]:
    """What GRPOTrainer makes of its completions: prompts padded left, completions right, (B, P) and (B, C).

    tokens: trained tokens of the whole step.
    """
    P, C = max(t.prompt_len for t in rows), max(len(t.token_ids) - t.prompt_len for t in rows)
    shapes = {"prompt_ids": P, "prompt_mask": P, "completion_ids": C, "completion_mask": C, "tool_mask": C}
    inputs = {name: torch.zeros(len(rows), width, dtype=torch.long) for name, width in shapes.items()}
    for i, t in enumerate(rows):
        p, n = t.prompt_len, len(t.token_ids) - t.prompt_len
        inputs["prompt_ids"][i, P - p :] = torch.tensor(t.token_ids[:p])
        inputs["prompt_mask"][i, P - p :] = 1
        inputs["completion_ids"][i, :n] = torch.tensor(t.token_ids[p:])
        inputs["completion_mask"][i, :n] = 1
        inputs["tool_mask"][i, :n] = torch.tensor(t.loss_mask[p:])
    inputs["advantages"] = torch.tensor([t.rewards["total"] for t in rows])
    inputs["num_items_in_batch"] = torch.tensor(tokens)
    return {name: x.to(device()) for name, x in inputs.items()}


STEPS = {"tare": tare_step, "trl": trl_step}


# ---------------------------------------------------------------------------------------------------- measuring


def memory_of_process(name: str) -> int:
    """Bytes that Linux reports of this process: VmRSS is now, VmHWM the most since the last `start_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def start_peak() -> None:
    """Forget the peak so far."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes, since `start_peak`."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else memory_of_process("VmHWM")


def timed(call: Callable, *inputs: Any) -> tuple[Any, float, int]:
    """(what the call returns, seconds, peak in bytes)"""
    start_peak()
    if device().type == "cpu":
        begin = time.process_time()
        result = call(*inputs)
        return result, time.process_time() - begin, peak()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call(*inputs)
    torch.cuda.synchronize()
    return result, time.perf_counter() - begin, peak()


def predicted(config: PretrainedConfig, flags: train_rl.Args, trajectories: list[Trajectory]) -> dict[str, int]:
    """The plan's parts for the micro-batch that needs most, without the CUDA context."""
    d = decoder_of(config)
    plans = []
    for rows in packed(trajectories, 0, flags.max_tokens_per_micro_batch):
        parts = training(d, flags, device(), len(rows), max(len(t.token_ids) for t in rows))
        plans.append({name: size for name, size in parts.items() if name != "CUDA context"})
    return max(plans, key=lambda parts: sum(parts.values()))


def build(config: PretrainedConfig, flags: train_rl.Args, trajectories: list[Trajectory], library: str) -> Step:
    """A policy with random weights, ready to be trained, and the library's step on it."""
    model = with_adapter(random_base(config, flags), flags).to(device()).train()
    if flags.gradient_checkpointing:
        enable_checkpointing(model)
    return STEPS[library](model, flags, trajectories)


def rehearse(args: Args, flags: train_rl.Args, library: str) -> None:
    """One step of a very small model: what libraries load when first used is not memory of the step."""
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    short = replace(args, trajectories=2, prompt_length=[4, 4], completion_length=[8, 8])
    score, step = build(config, flags, make_trajectories(short, config.vocab_size), library)
    step(score())
    del score, step
    gc.collect()


def measure(args: Args, shape: str, layers: int, library: str) -> dict:
    """One line, in a process of its own: seconds and peaks of both phases."""
    torch.set_num_threads(args.threads)
    flags = rl_flags(args, shape)
    rehearse(args, flags, library)
    config = shape_config(shape, layers)
    trajectories = make_trajectories(args, config.vocab_size)
    before = 0 if device().type == "cuda" else memory_of_process("VmRSS")
    score, step = build(config, flags, trajectories, library)
    runs = []
    for _ in range(args.repeats + 1):
        scored, score_seconds, score_peak = timed(score)
        _, update_seconds, update_peak = timed(step, scored)
        runs.append((score_seconds, update_seconds, score_peak - before, update_peak - before))
        del scored
    times = list(zip(*runs[1:]))
    record = {
        "tokens": sum(len(t.token_ids) for t in trajectories),
        "trained_tokens": sum(t.completion_tokens for t in trajectories),
        "micro_batches": len(list(packed(trajectories, 0, flags.max_tokens_per_micro_batch))),
        "score_seconds": statistics.median(times[0]),
        "update_seconds": statistics.median(times[1]),
        "score_peak": max(times[2]),
        "update_peak": max(times[3]),
        "all_seconds": list(zip(*times[:2])),
    }
    record["tokens_per_second"] = record["tokens"] / statistics.median(map(sum, record["all_seconds"]))
    if library == "tare":
        record["predicted"] = parts = predicted(config, flags, trajectories)
        record["error"] = sum(parts.values()) / record["update_peak"] - 1
    return record


def line(args: Args, shape: str, layers: int, library: str) -> dict:
    """`measure` in a fresh process; {"failed": why} if the library is not there or memory was too small."""
    if library == "trl" and not importlib.util.find_spec("trl"):
        return {"failed": "not installed"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, args, shape, layers, library).result()
        except torch.OutOfMemoryError:
            return {"failed": "out of memory"}
        except BrokenProcessPool:  # the system ends a process that takes too much
            return {"failed": "process was killed"}


# ---------------------------------------------------------------------------------------------------- report


def report(header: dict, args: Args, rows: list[dict]) -> str:
    """The markdown table, with what it was measured on."""
    cells = []
    for r in rows:
        name = r["shape"] + f", {r['layers']} layers" * bool(r["layers"])
        if "failed" in r:
            cells.append([name, r["library"], r["failed"], *["-"] * 6])
            continue
        plan = ["-", "-"]
        if "predicted" in r:
            plan = [sum(r["predicted"].values()) / GiB, f"{100 * r['error']:+.1f} %"]
        peaks = [r["score_peak"] / GiB, r["update_peak"] / GiB]
        cells.append(
            [name, r["library"], round(r["tokens_per_second"]), r["score_seconds"], r["update_seconds"], *peaks, *plan]
        )
    names = ["model", "library", "tokens/s", "score s", "update s", "score peak GiB", "update peak GiB",
             "predicted GiB", "error"]  # fmt: skip
    sizes = next((r for r in rows if "tokens" in r), {"tokens": 0, "trained_tokens": 0, "micro_batches": 0})
    packages = header["packages"]
    return (
        f"{table(names, cells)}\n\n"
        f"{header['cpu']}, {args.threads} threads of {header['cores']} cores, GPU: {header['gpu'] or 'none'}; torch "
        f"{packages['torch']}, transformers {packages['transformers']}, peft {packages['peft']}, bitsandbytes "
        f"{packages['bitsandbytes']}, trl {packages['trl']}; commit {header['commit']}; median of {args.repeats}.\n"
        f"Random weights in {header['dtype']}{', Linears in 4-bit NF4' * args.load_in_4bit}; LoRA r={args.lora_r}, "
        f"{args.optimizer}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}; "
        f"{args.trajectories} trajectories, {sizes['tokens']} tokens, of which {sizes['trained_tokens']} are trained "
        f"on, in {sizes['micro_batches']} micro-batches of up to {args.max_tokens_per_micro_batch} tokens.\n"
        f"{'Peaks: what torch allocated' if header['gpu'] else 'Seconds of the processor; growth of resident memory'}; "
        f"what differs between the libraries stands in bench/step.py.\n\n    {header['command']}\n"
    )


def version(package: str) -> str | None:
    """Installed version, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(args: Args) -> list[dict]:
    """Run every line; write table and records after each."""
    header = {"command": f"python -m bench.step {shlex.join(sys.argv[1:])}", **environment(args.threads)}
    header["packages"] |= {"trl": version("trl")}
    header["dtype"] = rl_flags(args, args.random_init[0]).dtype
    lines = [(*shape, library) for shape in zip(args.random_init, args.layers) for library in args.libraries]
    rows: list[dict] = []
    for shape, layers, library in tqdm(lines, desc="benchmark", unit="line"):
        rows.append({"shape": shape, "layers": layers, "library": library, **line(args, shape, layers, library)})
        records = {**header, "args": asdict(args), "rows": rows}
        write_text(Path(args.output + ".json"), json.dumps(records, indent=1) + "\n")
        write_text(Path(args.output + ".md"), report(header, args, rows))
    print(report(header, args, rows))
    return rows


if __name__ == "__main__":
    cli(main, Args)
