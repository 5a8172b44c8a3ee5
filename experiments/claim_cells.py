"""One cell of the claims: a variant's chain of stages for one seed, its evaluation on the held-out questions, its row.

A stage is one of our scripts with flags (experiments/claim_list.py). Its folder is named after everything that its result depends
on (script, flags, the stages before it, the weights of the base), so cells that begin alike share what they have in
common, and a changed declaration never meets an old result. A folder is worked on by one process at a time (a lock
that ends with its process), every script resumes, and every file is written whole: a cell may be killed at any moment.
"""

import fcntl
import functools
import hashlib
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import rollout
from core.run import commit, write_text
from core.trajectory import DataError, Trajectory, load_trajectories, write_jsonl
from data.world.facts import EASY_TERMS, World, questions
from data.world.noise import MIX
from eval.behaviour import insufficient, redundant_calls
from eval.evaluate import evaluate
from eval.grader import grade
from experiments.claim_list import VARIANTS, WORLDS, Variant
from experiments.entropy_pilot import analyse, fill_entropies
from experiments.shared import EVAL_SEED, PROBES, RL_SAMPLING, SAMPLING, hard_ids
from tools.search import SearchIndex

TRAINING = ("train_rl", "train_sft", "curriculum")  # scripts whose folder is the model of the stages after them
CURVES = ("reward", "rewards/correct/mean", "rewards/reducing/mean", "tools/call_frequency", "completions/mean_length",
          "entropy", "entropy/decision", "think_rate", "think_rate/long", "frac_reward_zero_std", "beta_long",
          "rollout/tokens_saved")  # fmt: skip
FILES = ("rollout", "selection", "refine")  # scripts whose --output is a file, not a folder
EVERY = 10  # steps that a point of a row's curves is the mean of


class Job(NamedTuple):
    """A stage with everything filled in; `output` is the folder or file that it makes."""

    folder: Path
    script: str
    flags: dict[str, Any]
    output: str

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


def plan_cell(name: str, seed: int, args: Any) -> Cell:
    """Fill in a variant's stages; nothing is created. args: the flags of experiments/claims.py."""
    variant: Variant = VARIANTS[name]
    files = world_files(variant.world, seed, args)
    model, jobs, names = args.base, [], {**files, "base": args.base, "seed": seed}
    for stage in variant.stages:
        jobs.append(_job(stage.name, stage.script, stage.flags, model, names, args))
        names[stage.name] = jobs[-1].output
        model = jobs[-1].output if stage.script in TRAINING else model
    flags = {"data": files["held_out"], "num_generations": 1, "seed": EVAL_SEED + seed, "noise_seed": EVAL_SEED}
    jobs.append(_job("evaluate", "rollout", flags | variant.evaluate, model, names, args))
    return Cell(name, seed, jobs, files, jobs[-1].folder.name.rpartition("-")[2])


def _job(name: str, script: str, declared: dict, model: str, names: dict, args: Any) -> Job:
    """The job of a stage: declared flags over those that all stages share, as far as the script has them."""
    cls = importlib.import_module(script).Args
    known, noise = {f.name for f in fields(cls)}, float(names["noise"])
    shared = {"model_name_or_path": model, "data": names["train"], "index": names["index"], **SAMPLING, **RL_SAMPLING,
              "noise": noise, "noise_seed": names["seed"], "seed": names["seed"], "threads": 1, "engine": "fast"}  # fmt: skip
    flags = {k: v for k, v in shared.items() if k in known}
    flags |= {k: _filled(v, names) for k, v in declared.items()}
    if args.max_steps and "max_steps" in flags:
        flags["max_steps"] = min(args.max_steps, flags["max_steps"])
    root = Path(args.output_dir)
    text = json.dumps([script, flags], sort_keys=True).replace(str(root) + "/", "")
    digest = _digest(text.replace(json.dumps(args.base), json.dumps(base_digest(args.base))).encode())
    folder = root / f"seed-{names['seed']}" / f"{name}-{digest}"
    output = str(folder / "out.jsonl" if script in FILES else folder)
    return Job(folder, script, flags | {"output_dir" if "output_dir" in known else "output": output}, output)


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
        raise DataError(f"--base {base}: no model.safetensors there")
    return _file_digest(weights, weights.stat().st_mtime_ns)


@functools.cache
def _file_digest(path: Path, changed_ns: int) -> str:  # changed_ns: a file written anew is read anew
    return _digest(path.read_bytes())


# ---------------------------------------------------------------------------------------------------- running


def run_cell(cell: Cell, args: Any) -> dict:
    """Run what is missing of a cell and return its row, which is also written to its file under --output_dir."""
    path = row_file(cell, args)
    if path.exists():
        return json.loads(path.read_text())
    prepare_world(cell, args)
    seconds = sum(run_job(job) for job in cell.jobs)
    world = WORLDS[VARIANTS[cell.variant].world]
    hard = hard_ids(load_trajectories(cell.files["held_out_probe"])) if world.easy_share is not None else None
    row = {"variant": cell.variant, "seed": cell.seed, "digest": cell.digest, "commit": commit(), "threads": 1}
    row |= {"base": base_digest(args.base), "seconds": round(seconds, 1)}
    trajectories = load_trajectories(cell.jobs[-1].output)
    row |= measure(trajectories, hard) | {"curves": curves(cell.jobs)}
    if any(t.tool_calls for t in trajectories):  # ΔH of the calls under the model that made them [PAPERS C1]
        torch.set_num_threads(1)  # as in the stages, which may all have been finished before
        fill_entropies(trajectories, cell.jobs[-1].flags["model_name_or_path"])
        own = next((job.flags for job in cell.jobs[::-1] if "delta_margin" in job.flags), {})
        how = {("reasoning", 0.0), (own.get("segment", "reasoning"), own.get("delta_margin", 0.0))}
        scores = [grade(t)[0] for t in trajectories]
        row["entropy"] = [analyse(trajectories, scores, *settings)[0] for settings in sorted(how)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row) + "\n")
    return row


def row_file(cell: Cell, args: Any) -> Path:
    """Where a cell leaves its row."""
    return Path(args.output_dir) / "rows" / f"{cell.variant}-{cell.seed}-{cell.digest}.json"


def run_job(job: Job) -> float:
    """Run a stage unless it is finished; returns the seconds its last session took."""
    with locked(job.folder):
        if not job.done.exists():
            print(f"== {job.folder.name}: {job.script}", flush=True)
            module, started = importlib.import_module(job.script), time.monotonic()
            flags = job.flags
            if job.script in ("selection", "refine"):  # they write at once, and not over an older file
                flags = flags | {"overwrite": True}
                job.folder.mkdir(exist_ok=True)
            module.main(module.Args(**flags))
            write_text(job.done, json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
        return json.loads(job.done.read_text())["seconds"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside a path; it is free again when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- worlds


def world_files(name: str, seed: int, args: Any) -> dict[str, str]:
    """Paths of a world's files by placeholder: index, train, held_out, the base's probe of that; and its noise.

    The held-out questions are the same for all seeds.
    """
    world, root = WORLDS[name], Path(args.output_dir) / "worlds" / f"{args.preset}-{base_digest(args.base)}"
    held_out, share = f"held_out-{world.families}-{args.eval_questions}", world.easy_share
    train = f"train-{world.families}-{args.train_questions}" + (f"-easy-{share}" if share is not None else "")
    names = {"held_out": held_out, "held_out_probe": f"{held_out}-probe", "train": f"{train}-seed-{seed}"}
    paths = {key: str(root / f"{file}.jsonl") for key, file in names.items()}
    return {**paths, "index": str(root / "index"), "noise": str(world.noise)}


def prepare_world(cell: Cell, args: Any) -> None:
    """Make the files of a cell's world that are missing."""
    files, world = cell.files, WORLDS[VARIANTS[cell.variant].world]
    with locked(Path(files["index"])):  # one lock for all of them
        if not Path(files["index"]).exists():
            unfinished = Path(files["index"] + ".tmp")
            SearchIndex.build(World(args.preset).passages(), progress=False).save(unfinished)
            unfinished.rename(files["index"])
        families = MIX if world.families == "noisy" else tuple(world.families.split(","))
        if not Path(files["held_out"]).exists():
            write_jsonl(files["held_out"], questions(World(args.preset), args.eval_questions, EVAL_SEED, families))
        if not Path(files["train"]).exists():
            easy = None if world.easy_share is None else (world.easy_share, EASY_TERMS)
            rows = questions(World(args.preset), args.train_questions, cell.seed, families, easy)
            write_jsonl(files["train"], rows)
        if world.easy_share is not None:
            probe(files["held_out"], files["held_out_probe"], args)


def probe(data: str, output: str, args: Any) -> None:
    """PROBES samples of the base without thinking for every question of a file."""
    flags = {"model_name_or_path": args.base, "data": data, "output": output, "mode": "no_think"}
    rollout.main(rollout.Args(**SAMPLING, **flags, num_generations=PROBES, threads=1, engine="fast"))


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


def curves(jobs: list[Job]) -> dict[str, list]:
    """Training metrics of the last RL stage (of a curriculum: its last round), means over windows of EVERY steps.

    `step`: the last of each window. A metric that no step of a window has is None there.
    """
    stages = [job.folder for job in jobs if job.script in ("train_rl", "curriculum")]
    if not stages:
        return {}
    *_, folder = [stages[-1], *sorted(stages[-1].glob("round-*/rl"))]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    windows = [log[at : at + EVERY] for at in range(0, len(log), EVERY)]
    found = {key: [[row[key] for row in w if key in row] for w in windows] for key in CURVES}
    return {"step": [w[-1]["step"] for w in windows]} | {
        key: [round(fmean(v), 4) if v else None for v in values] for key, values in found.items() if any(values)
    }
