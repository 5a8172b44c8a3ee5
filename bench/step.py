"""How fast is one GRPO step, and how much memory does it take? Times score and update as train_rl.py does them.

    python -m bench.step --random_init Qwen2.5-7B --load_in_4bit --gradient_checkpointing --output results/step

Models have random weights (random_model.py). Trajectories are seeded and ragged: a prompt, then a completion with a
tool result in its middle, which is not trained on. Each line runs in a fresh process: one step that is not counted,
then the median of --repeats; peaks are the largest of these.

    seconds     GPU: of the clock. CPU: of the processor, over all threads, so that other load does not count
    tokens/s    tokens of all trajectories, without padding, per second of score + update
    peak        GPU: most bytes that torch allocated in the phase
    plan        bench/memory.py for the largest micro-batch, without the CUDA context, which torch does not count

Beside it stands TRL's GRPOTrainer (checked with 1.16), if installed, with the same weights, LoRA, checkpointing,
optimizer, clip and token weights: its own log-probs, compute_loss, backward, clip, step. What differs: TRL pads prompts
(left) and completions (right) separately, so its micro-batches are wider; it runs every completion token through the
lm_head, on a CPU every token; with --dtype bfloat16 it computes in autocast and keeps adapters of a 4-bit base in
bfloat16; where a batch is used for a single update it would leave out the score phase (see the column).
"""

import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

import train_rl
from bench import report
from bench.memory import Parts, decoder_of, training
from bench.plan import GiB, rl_setup, total
from bench.random_model import random_base, shape_config
from bench.rollout import word_tokenizer
from core.args import arg, cli, require_positive
from core.model import OptimizerName, adamw, device, enable_checkpointing, packed, schedule, with_adapter
from core.trajectory import Span, Trajectory

GROUP = 8  # trajectories per question
TOOL_SHARE = 0.25  # of a completion
COLUMNS = ["model", "library", "tokens/s", "score s", "update s", "score peak GiB", "update peak GiB", "plan GiB"]
Step = tuple[Callable[[], Any], Callable[[Any], None]]  # score, and the update of what it returns


@dataclass
class Args:
    """Flags of the benchmark."""

    output: str = arg("", "prefix of the table (.md) and the records (.json) (required)")
    random_init: list[str] = arg(["Qwen2.5-7B"], "known architectures, or folders with a config.json")
    layers: list[int] = arg([], "layers of each shape, 0 = all; default all")
    libraries: list[str] = arg(["tare", "trl"], "implementations to run: tare, trl")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    load_in_4bit: bool = arg(False, "Linears in 4-bit NF4 (bitsandbytes)")
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
        require_positive(self, "trajectories", "repeats", "threads")
        if (self.load_in_4bit or self.optimizer == "adamw_8bit") and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit and --optimizer adamw_8bit need bitsandbytes, which is not installed")
        rl_flags(self, self.random_init[0])  # whose own checks name what does not go together


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
    """The functions of train_rl.py, as its loop calls them."""
    optimizer = adamw(model, flags.optimizer, flags.learning_rate)
    scheduler = schedule(optimizer, "constant", 0.0, 1)
    betas = [0.0] * len(trajectories)

    def step(batches):
        train_rl.update(model, optimizer, scheduler, batches, trajectories, betas, flags)

    return lambda: train_rl.micro_batches(trajectories, model, 0, flags), step


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
    optimizer = adamw(model, flags.optimizer, flags.learning_rate)  # after TRL's cast of adapters
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


def timed(call: Callable, *inputs: Any) -> tuple[Any, float, int | None]:
    """(what the call returns, seconds, peak in bytes on a GPU)"""
    if device().type == "cpu":
        begin = time.process_time()
        result = call(*inputs)
        return result, time.process_time() - begin, None
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call(*inputs)
    torch.cuda.synchronize()
    return result, time.perf_counter() - begin, torch.cuda.max_memory_allocated()


def predicted(config: PretrainedConfig, flags: train_rl.Args, trajectories: list[Trajectory]) -> Parts:
    """The plan's parts for the micro-batch that needs most, without the CUDA context."""
    d, setup = decoder_of(config), rl_setup(flags, device(), 0)
    batches = packed(trajectories, 0, flags.max_tokens_per_micro_batch)
    plans = [training(d, setup, len(rows), max(len(t.token_ids) for t in rows)) for rows in batches]
    return {name: size for name, size in max(plans, key=total).items() if name != "CUDA context"}


def build(config: PretrainedConfig, flags: train_rl.Args, trajectories: list[Trajectory], library: str) -> Step:
    """A policy with random weights, ready to be trained, and the library's step on it."""
    model = with_adapter(random_base(config, flags), flags).to(device()).train()
    if flags.gradient_checkpointing:
        enable_checkpointing(model)
    return STEPS[library](model, flags, trajectories)


def measure(args: Args, shape: str, layers: int, library: str) -> dict:
    """One line, in a process of its own: seconds and peaks of both phases."""
    torch.set_num_threads(args.threads)
    flags = rl_flags(args, shape)
    config = shape_config(shape, layers)
    trajectories = make_trajectories(args, config.vocab_size)
    score, step = build(config, flags, trajectories, library)
    runs = []
    for _ in range(args.repeats + 1):
        scored, score_seconds, score_peak = timed(score)
        _, update_seconds, update_peak = timed(step, scored)
        runs.append((score_seconds, update_seconds, score_peak, update_peak))
        del scored
    score_seconds, update_seconds, score_peaks, update_peaks = zip(*runs[1:])
    tokens = sum(len(t.token_ids) for t in trajectories)
    return {
        "tokens": tokens,
        "trained_tokens": sum(t.completion_tokens for t in trajectories),
        "micro_batches": len(list(packed(trajectories, 0, flags.max_tokens_per_micro_batch))),
        "tokens_per_second": tokens / statistics.median(map(sum, zip(score_seconds, update_seconds))),
        "score_seconds": statistics.median(score_seconds),
        "update_seconds": statistics.median(update_seconds),
        "score_peak": max(score_peaks) if score_peaks[0] else None,
        "update_peak": max(update_peaks) if update_peaks[0] else None,
        "all_seconds": [score_seconds, update_seconds],
        "predicted": predicted(config, flags, trajectories) if library == "tare" else None,
    }


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


def cells(rows: list[dict]) -> list[list]:
    """The lines of the table."""
    result = []
    for r in rows:
        name = f"{r['shape']}, {r['layers']} layers" if r["layers"] else r["shape"]
        if "failed" in r:
            result.append([name, r["library"], r["failed"], *["-"] * 5])
            continue
        sizes = r["score_peak"], r["update_peak"], total(r["predicted"]) if r["predicted"] else None
        seconds = round(r["tokens_per_second"]), r["score_seconds"], r["update_seconds"]
        result.append([name, r["library"], *seconds, *(size and size / GiB for size in sizes)])
    return result


def main(args: Args) -> list[dict]:
    """Run every line; write table and records after each."""
    result = report.start("bench.step", args)
    lines = [(*shape, library) for shape in zip(args.random_init, args.layers) for library in args.libraries]
    for shape, layers, library in tqdm(lines, desc="benchmark", unit="line"):
        row = {"shape": shape, "layers": layers, "library": library, **line(args, shape, layers, library)}
        result["rows"].append(row)
        sizes = next((r for r in result["rows"] if "tokens" in r), {"tokens": 0, "trained_tokens": 0})
        notes = (
            f"{args.trajectories} trajectories, {sizes['tokens']} tokens, of which {sizes['trained_tokens']} are "
            f"trained on; median of {args.repeats}; random weights in {rl_flags(args, shape).dtype}. All flags: in "
            "the json. What the columns mean and how the libraries differ: bench/step.py."
        )
        text = report.write(result, COLUMNS, cells(result["rows"]), notes)
    print(text)
    return result["rows"]


if __name__ == "__main__":
    cli(main, Args)
