"""Runs a cell, which is one variant with one seed: its chain of scripts, its evaluation, the row that is kept of it.

Reproduction and claims both consist of cells; experiments/variants.py declares the variants. A stage is one of our
scripts with flags. Its folder is named after all that its result depends on (script, flags, the stages before it, the
weights of the base), so cells that begin alike share what they have in common, and a changed declaration never meets
an old result. One process at a time works on a folder (a lock that ends with its process), every script resumes, and
every file is written whole: a cell may be killed at any moment, and the same command goes on.
"""

import fcntl
import functools
import hashlib
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch

import rollout
from core.args import arg, check_numbers, require_positive
from core.run import commit, write_text
from core.trajectory import DataError, Trajectory, groups_of, load_trajectories, read_lines, write_jsonl
from data.world import facts
from data.world.noise import MIX
from eval.behaviour import insufficient, redundant_calls
from eval.evaluate import evaluate
from eval.grader import grade
from experiments.entropy_pilot import analyse, fill_entropies
from experiments.variants import VARIANTS, WORLDS, Stage
from tools.search import SearchIndex

EVAL_SEED = 10_000  # of held-out questions, their noise and their samples; training uses small seeds
PROBES = 8  # no-think samples of the base per held-out sum
HARD = 0.5  # a sum is hard if a smaller share of them is right
SHARED = {  # flags of every script that has them; times are generous: a busy machine must not change a number
    "search_top_k": 1,
    "max_completion_length": 256,
    "python_timeout": 60.0,
    "max_tool_seconds": 600.0,
    "threads": 1,  # results are identical only for equal counts
    "engine": "fast",
    "rollout_dtype": "float32",  # RL samples from merged weights, a quarter faster
}
SCRIPTS = {  # name of a script in a stage -> its module; the name is part of a digest, so it outlives a move
    "rollout": "rollout",
    "train_sft": "train_sft",
    "train_rl": "train_rl",
    "flywheel": "flywheel",
    "curriculum": "methods.curriculum",
    "refine": "methods.refine",
    "warmup": "methods.warmup",
    "entropy_pilot": "experiments.entropy_pilot",
    "action_space": "experiments.action_space",
    "insufficiency": "experiments.insufficiency",
}
TRAINING = ("train_rl", "train_sft", "curriculum")  # scripts whose folder is the model of the stages after them
FILES = ("rollout", "refine")  # scripts whose --output is a file, not a folder
CURVES = ("reward", "rewards/correct/mean", "rewards/reducing/mean", "tools/call_frequency", "completions/mean_length",
          "entropy", "entropy/decision", "think_rate", "think_rate/long", "frac_reward_zero_std", "beta_long",
          "rollout/tokens_saved")  # fmt: skip
EVERY = 10  # steps that a point of a row's curves is the mean of


@dataclass
class CellArgs:
    """Flags of every command that runs cells."""

    output_dir: str = arg("", "folder of the stages: models, trajectories, logs (required)")
    preset: Literal["tiny", "small"] = arg("tiny", "size of the world that the base was trained on")
    base: str = arg("", "base model folder; default: data/PRESET")
    workers: int = arg(2, "cells run at once, each in a process of one thread")
    train_questions: int = arg(0, "questions to train on; 0 = as declared in experiments/variants.py")
    eval_questions: int = arg(0, "held-out questions; 0 = as declared")
    max_steps: int = arg(0, "most steps of every training stage (for a smoke run); 0 = as declared")

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("--output_dir is required")
        self.base = self.base or f"data/{self.preset}"
        check_numbers(self)
        require_positive(self, "workers")


class Job(NamedTuple):
    """A stage with everything filled in; `output` is the folder or file that it makes."""

    folder: Path
    script: str
    flags: dict[str, Any]
    output: str
    minutes: float  # expected

    @property
    def done(self) -> Path:
        """Written when the stage has finished; holds the seconds that its last session took."""
        return self.folder.with_name(self.folder.name + ".done.json")


class Cell(NamedTuple):
    """A (variant, seed) with its stages; `digest` stands for all that its row depends on besides the code."""

    variant: str
    seed: int
    jobs: list[Job]
    files: dict[str, str]
    digest: str


def plan_cell(name: str, seed: int, args: CellArgs) -> Cell:
    """Fill in a variant's stages; nothing is created."""
    variant = VARIANTS[name]
    files = world_files(variant.world, seed, args)
    model, jobs, names = args.base, [], {**files, "base": args.base, "seed": seed}
    for stage in variant.stages:
        jobs.append(plan_job(stage, model, names, args))
        names[stage.name] = jobs[-1].output
        model = jobs[-1].output if stage.script in TRAINING else model
    flags = {"data": files["held_out"], "num_generations": 1, "seed": EVAL_SEED + seed, "noise_seed": EVAL_SEED}
    jobs.append(plan_job(Stage("evaluate", "rollout", flags | variant.evaluate, 0.5), model, names, args))
    return Cell(name, seed, jobs, files, jobs[-1].folder.name.rpartition("-")[2])


def plan_job(stage: Stage, model: str, names: dict, args: CellArgs) -> Job:
    """The job of a stage: declared flags over those that all stages share, as far as the script has them."""
    known, noise = {f.name for f in fields(module_of(stage.script).Args)}, float(names["noise"])
    shared = {**SHARED, "model_name_or_path": model, "data": names["train"], "index": names["index"], "noise": noise,
              "noise_seed": names["seed"], "seed": names["seed"]}  # fmt: skip
    flags = {k: v for k, v in shared.items() if k in known}
    flags |= {k: _filled(v, names) for k, v in stage.flags.items()}
    if args.max_steps and "max_steps" in flags:
        flags["max_steps"] = min(args.max_steps, flags["max_steps"])
    root = Path(args.output_dir)
    text = json.dumps([stage.script, flags], sort_keys=True).replace(str(root) + "/", "")
    digest = _digest(text.replace(json.dumps(args.base), json.dumps(base_digest(args.base))).encode())
    folder = root / f"seed-{names['seed']}" / f"{stage.name}-{digest}"
    output = str(folder / "out.jsonl" if stage.script in FILES else folder)
    flags["output_dir" if "output_dir" in known else "output"] = output
    return Job(folder, stage.script, flags, output, stage.minutes)


def module_of(script: str) -> Any:
    """The module of a stage's script."""
    return importlib.import_module(SCRIPTS[script])


def _filled(value: Any, names: dict) -> Any:
    if isinstance(value, list):
        return [_filled(v, names) for v in value]
    return value.format(**names) if isinstance(value, str) else value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]


def base_digest(base: str) -> str:
    """Stands for the weights of the base in every folder's name; DataError if there are none."""
    weights = Path(base) / "model.safetensors"
    if not weights.is_file():
        make = f"python -m data.world --pretrain --preset PRESET --output {base}"
        raise DataError(f"--base {base}: no model.safetensors there; a base of the world is made by: {make}")
    return _file_digest(weights, weights.stat().st_mtime_ns)


@functools.cache
def _file_digest(path: Path, changed_ns: int) -> str:  # changed_ns: a file written anew is read anew
    return _digest(path.read_bytes())


# ---------------------------------------------------------------------------------------------------- running


def run_cell(cell: Cell, args: CellArgs) -> dict:
    """Run what is missing of a cell and return its row, which is also written to its file under --output_dir."""
    path = row_file(cell, args)
    if path.exists():
        return json.loads(path.read_text())
    prepare_world(cell, args)
    seconds = sum(run_job(job) for job in cell.jobs)
    sums = WORLDS[VARIANTS[cell.variant].world].sums
    hard = hard_ids(load_trajectories(cell.files["held_out_probe"])) if sums else None
    row = {"variant": cell.variant, "seed": cell.seed, "digest": cell.digest, "commit": commit(), "threads": 1}
    row |= {"base": base_digest(args.base), "seconds": round(seconds, 1)}
    trajectories = load_trajectories(cell.jobs[-1].output)
    row |= measure(trajectories, hard) | {"curves": curves(cell.jobs)}
    if any(t.tool_calls for t in trajectories):  # ΔH of the calls under the model that made them [PAPERS C1]
        torch.set_num_threads(1)  # as in the stages, which may all have been finished before
        fill_entropies(trajectories, reached(cell.jobs[-1].flags["model_name_or_path"]))
        own = next((job.flags for job in cell.jobs[::-1] if "delta_margin" in job.flags), {})
        how = {("reasoning", 0.0), (own.get("segment", "reasoning"), own.get("delta_margin", 0.0))}
        scores = [grade(t)[0] for t in trajectories]
        row["entropy"] = [analyse(trajectories, scores, *settings)[0] for settings in sorted(how)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row) + "\n")
    return row


def row_file(cell: Cell, args: CellArgs) -> Path:
    """Where a cell leaves its row."""
    return Path(args.output_dir) / "rows" / f"{cell.variant}-{cell.seed}-{cell.digest}.json"


def run_job(job: Job) -> float:
    """Run a stage unless it is finished; returns the seconds its last session took."""
    with locked(job.folder):
        if not job.done.exists():
            print(f"== {job.folder.name}: {job.script}", flush=True)
            script, started, flags = module_of(job.script), time.monotonic(), dict(job.flags)
            if "model_name_or_path" in flags:
                flags["model_name_or_path"] = reached(flags["model_name_or_path"])
            if job.script == "refine":  # it writes at once, and not over an older file
                flags["overwrite"] = True
                job.folder.mkdir(exist_ok=True)
            script.main(script.Args(**flags))
            write_text(job.done, json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
        return json.loads(job.done.read_text())["seconds"]


def reached(model: str) -> str:
    """A model's folder; where a curriculum ended before the round that is asked for, the curriculum's own."""
    whole = Path(model).parent.parent
    return str(whole) if not Path(model).exists() and (whole / "result.json").exists() else model


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside a path; it is free again when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- worlds


def world_files(name: str, seed: int, args: CellArgs) -> dict[str, str]:
    """Paths of a world's files by placeholder: index, train, held_out, the base's probe of that; and its noise."""
    world, root = WORLDS[name], Path(args.output_dir) / "worlds" / f"{args.preset}-{base_digest(args.base)}"
    held_out = f"held_out-{world.families}-{args.eval_questions or world.held_out}" + f"-seed-{seed}" * world.fresh
    easy = "" if world.easy_share is None else f"-easy-{world.easy_share}"
    train = f"train-{world.families}-{args.train_questions or world.train}{easy}-seed-{seed}"
    names = {"held_out": held_out, "held_out_probe": f"{held_out}-probe", "train": train}
    paths = {key: str(root / f"{file}.jsonl") for key, file in names.items()}
    return {**paths, "index": str(root / "index"), "noise": str(world.noise)}


def prepare_world(cell: Cell, args: CellArgs) -> None:
    """Make the files of a cell's world that are missing: index, questions and, for sums, the base's probe."""
    files, world = cell.files, WORLDS[VARIANTS[cell.variant].world]
    drawn = cell.seed if world.fresh else 0
    with locked(Path(files["index"])):  # one lock for all of them
        if not Path(files["index"]).exists():
            unfinished = Path(files["index"] + ".tmp")
            SearchIndex.build(facts.World(args.preset).passages(), progress=False).save(unfinished)
            unfinished.rename(files["index"])
        families = MIX if world.families == "noisy" else tuple(world.families.split(","))
        easy = None if world.easy_share is None else (world.easy_share, facts.EASY_TERMS)
        held_out = args.eval_questions or world.held_out, EVAL_SEED + drawn, families
        train = args.train_questions or world.train, cell.seed, families, easy
        for part, what in (("held_out", held_out), ("train", train)):
            if not Path(files[part]).exists():
                write_jsonl(files[part], facts.questions(facts.World(args.preset), *what))
        if world.sums:  # other samples than those that are measured
            own = {"data": files["held_out"], "output": files["held_out_probe"], "index": files["index"]}
            own |= {"num_generations": PROBES, "mode": "no_think", "seed": drawn, "model_name_or_path": args.base}
            known = {f.name for f in fields(rollout.Args)}
            rollout.main(rollout.Args(**{k: v for k, v in SHARED.items() if k in known}, **own))


def hard_ids(probes: list[Trajectory]) -> set[str]:
    """Questions that fewer than HARD of their samples answer right."""
    return {g[0].question_id for g in groups_of(probes) if fmean(grade(t)[0] for t in g) < HARD}


# ---------------------------------------------------------------------------------------------------- rows


def measure(trajectories: list[Trajectory], hard: set[str] | None) -> dict:
    """metrics and families as in metrics.json; and one value per held-out question, in the order of their ids.

    `asked` stands for these questions. What follows from other columns is not stored (`column`).
    """
    result = evaluate(trajectories)
    trajectories = sorted(trajectories, key=lambda t: t.question_id)
    correct = [grade(t)[0] for t in trajectories]
    columns = {
        "correctness": [round(c, 4) for c in correct],
        "calls": [t.n_calls for t in trajectories],
        "redundant": [int(redundant_calls(t) > 0) for t in trajectories],
        "insufficient": [int(insufficient(t, c)) for t, c in zip(trajectories, correct)],
        "tokens": [t.completion_tokens for t in trajectories],
        "thinking": [int(t.mode == "think") for t in trajectories],
    }
    if hard is not None:
        columns["hard"] = [int(t.question_id in hard) for t in trajectories]
    columns = {name: compact(values) for name, values in columns.items()}
    asked = _digest("\n".join(t.question_id + t.question for t in trajectories).encode())
    return {"metrics": result["all"], "families": result["families"], "asked": asked, "questions": columns}


def compact(values: list[float]) -> str | list[float]:
    """A column as a string of digits, if every value is one; else as it is."""
    return "".join(str(int(v)) for v in values) if all(v in range(10) for v in values) else values


def column(row: dict, name: str) -> list[float]:
    """One value per held-out question of a row: a stored column, or `efficiency` or `easy` made from them."""
    if name == "efficiency":
        return [c / max(n, 1) for c, n in zip(column(row, "correctness"), column(row, "calls"))]
    if name == "easy":
        return [1 - h for h in column(row, "hard")]
    return [float(v) for v in row["questions"][name]]


def training_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, one per step."""
    return [json.loads(line) for _, line in read_lines(folder / "metrics.jsonl")]


def curves(jobs: list[Job]) -> dict[str, list]:
    """Training metrics of the last RL stage (of a curriculum: its last round), means over windows of EVERY steps.

    `step`: the last of each window. A metric that no step of a window has is None there.
    """
    stages = [job.folder for job in jobs if job.script in ("train_rl", "curriculum")]
    if not stages:
        return {}
    *_, folder = [stages[-1], *sorted(stages[-1].glob("round-*/rl"))]
    log = training_log(folder)
    windows = [log[at : at + EVERY] for at in range(0, len(log), EVERY)]
    found = {key: [[row[key] for row in w if key in row] for w in windows] for key in CURVES}
    return {"step": [w[-1]["step"] for w in windows]} | {
        key: [round(fmean(v), 4) if v else None for v in values] for key, values in found.items() if any(values)
    }
