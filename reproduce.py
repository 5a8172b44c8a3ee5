"""The main job: the three methods in the calibration world, from the shipped base to one report.

    ./reproduce.sh                      (or: python reproduce.py) one seed, on two cores
    python reproduce.py --seeds 5       mean and standard deviation over paired seeds
    python reproduce.py --quick         a smoke run of the same path
    python reproduce.py --full          the claims: variants × seeds, cell by cell (claims.py)

1. Evaluate the shipped base, which calls tools too often, too rarely and wrongly at known rates.
2. GRPO from the base on the same questions with four rewards: outcome, ET-Agent, entropy reduction sparse and dense.
3. ET-Agent whole: SFT on right samples → flywheel → RFT → three rounds of (Pareto selection → RL).
4. AutoTool on running sums, where thinking pays on long ones only: warm-up → RL, with and without its constraint.
5. Evaluate all of them on held-out questions; write metrics.json, report.md and figures, and print the tables.
Every part is a resumable folder under --output_dir; what is finished is not computed again.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

import claims
import curriculum
import flywheel
import refine
import rollout
import train_rl
import train_sft
import warmup
from common import RunArgs, arg, cli, start_run, table, write_text
from data import world
from data.questions import load_questions
from eval import action_space, behaviour, insufficiency
from eval.evaluate import COLUMNS, evaluate, metrics_table
from eval.grader import score
from eval.report import sums_table, write_report
from trajectory import DataError, Trajectory, groups_of

FAMILIES = "recall,lookup,bridge,add,multiply,lookup_compute"
BASES = {"tiny": "data/tiny", "small": "data/small"}
EVAL_SEED = 10_000  # held-out questions are drawn by seeds that training never uses
QUESTIONS = {  # part -> families, flag of its size, seed
    "train": (FAMILIES, "train_questions", 0),
    "eval": (FAMILIES, "eval_questions", EVAL_SEED),
    "sums": ("running_sum", "sum_questions", 0),
    "sums-eval": ("running_sum", "eval_questions", EVAL_SEED),
}
ROUNDS = 3
KINDS = ("stages", "sums")
STAGES = ("base", "outcome_rl", "et_agent", "sft", "rft", *(f"rl_round_{r}" for r in range(1, ROUNDS + 1)),
          "entropy_sparse", "entropy_dense")  # fmt: skip
CURVES = ("outcome_rl", "et_agent", "entropy_sparse", "entropy_dense")
HARD = 0.5  # a sum is hard if the base answers less than this share right without thinking [DESIGN 4]


@dataclass
class Args(RunArgs):
    """Flags of the reproduction; the defaults are the README's numbers."""

    output_dir: str = arg("out/reproduce", "folder of the whole reproduction")
    preset: Literal["tiny", "small"] = arg("tiny", "size of the world: tiny for a CPU, small for a GPU")
    base: str = arg("", "base model folder; default: the preset's")
    quick: bool = arg(False, "few steps and questions: shows that the path works, not what it achieves")
    full: bool = arg(False, "run the claims instead (python claims.py --full has more flags)")
    engine: Literal["hf", "fast"] = arg("fast", "sampler; both sample the same trajectories, up to ties")
    threads: int = arg(1, "CPU threads of each process; results are identical only for equal counts")
    workers: int = arg(2, "processes that train at once")
    seeds: int = arg(1, "runs per stage, paired by seed: --seed, --seed + 1, …")
    train_questions: int = arg(2000, "questions to train on")
    eval_questions: int = arg(600, "held-out questions to evaluate on")
    max_steps: int = arg(80, "RL steps of each single run")
    round_steps: int = arg(30, "RL steps of each round of ET-Agent's curriculum")
    sum_questions: int = arg(1600, "running sums to warm up and train on")
    evolve_questions: int = arg(240, "questions of SFT samples and flywheel")
    select_questions: int = arg(400, "questions sampled before each round of the curriculum; half are kept")
    sigma_tool: float = arg(0.5, "ET-Agent reward: weight of tool calls (paper 0.1, on a 7B model)")
    sigma_length: float = arg(0.1, "ET-Agent reward: weight of reasoning length")

    def __post_init__(self):
        super().__post_init__()
        for flag in ("seeds", "workers"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} must be at least 1, not {getattr(self, flag)}")
        if self.quick:
            self.train_questions, self.eval_questions, self.max_steps = 240, 120, 6
            self.round_steps, self.evolve_questions, self.select_questions, self.sum_questions = 3, 24, 36, 60


class Job(NamedTuple):
    """One seed of the reproduction: where its parts are, and what they share."""

    folder: Path
    base: str
    index: str
    seed: int
    args: Args

    @property
    def shared(self) -> dict[str, Any]:
        """Flags of every script here; generous times, because a busy machine must not change a number."""
        return dict(threads=self.args.threads, engine=self.args.engine, index=self.index, search_top_k=1,
                    max_completion_length=256, python_timeout=60.0, max_tool_seconds=600.0)  # fmt: skip

    def questions(self, part: str) -> str:
        """Path of a part of QUESTIONS, drawn if it is not there."""
        path = self.folder / f"{part}.questions.jsonl"
        if not path.exists():
            families, size, seed = QUESTIONS[part]
            flags = ["--questions", str(getattr(self.args, size)), "--seed", str(seed + self.seed)]
            world.main([*flags, "--preset", self.args.preset, "--families", families, "--output", str(path)])
        return str(path)

    def rl(self, stage: str, start: str, data: str, **flags: Any) -> str:
        """The adapter folder of a GRPO run."""
        own = dict(model_name_or_path=start, data=data, output_dir=str(self.folder / stage), seed=self.seed)
        print(f"== {stage}", flush=True)
        train_rl.main(train_rl.Args(**self.shared | dict(max_steps=self.args.max_steps) | own | flags))
        return own["output_dir"]

    def sft(self, stage: str, start: str, data: str, steps: int) -> str:
        """The adapter folder of a fine-tuning run."""
        own = dict(model_name_or_path=start, data=data, output_dir=str(self.folder / stage), seed=self.seed)
        own |= dict(max_steps=min(steps, self.args.max_steps), per_device_train_batch_size=16)
        print(f"== {stage}", flush=True)
        train_sft.main(train_sft.Args(**own, threads=self.args.threads))
        return own["output_dir"]

    def evolve(self, name: str, start: str, data: str, **flags: Any) -> str:
        """The RFT set of a flywheel run with the world's oracle as critic; rounds=0: of plain samples."""
        own = dict(model_name_or_path=start, data=data, output_dir=str(self.folder / name), seed=self.seed)
        own |= dict(critic="rule", limit=self.args.evolve_questions)
        print(f"== {name}", flush=True)
        flywheel.main(flywheel.Args(**self.shared | own | flags))
        return str(self.folder / name / "rft.jsonl")

    def sample(self, name: str, model: str, data: str, **flags: Any) -> list[Trajectory]:
        """One held-out sample per question, or as many as `num_generations`."""
        own = dict(model_name_or_path=model, data=data, output=str(self.folder / f"{name}.jsonl"), num_generations=1)
        print(f"== sample {name}", flush=True)
        return rollout.main(rollout.Args(**self.shared | own | dict(seed=EVAL_SEED + self.seed) | flags))


    def measured(self, stage: str, model: str) -> dict:
        """Metrics of a stage on the held-out questions of the six plain families."""
        return evaluate(self.sample(stage, model, self.questions("eval")))


def main(args: Args) -> dict:
    """Run what is missing, write the report, return the content of metrics.json."""
    if args.full:
        return claims.main(claims.Args(full=True, base=args.base or BASES[args.preset], preset=args.preset))
    run = start_run(args)
    out, base = Path(args.output_dir), args.base or BASES[args.preset]
    if run.finished:
        metrics = json.loads((out / "metrics.json").read_text())
        print(f"{out}: finished before", tables(metrics), f"report: {out / 'report.md'}", sep="\n")
        return metrics
    if not Path(base).is_dir():
        command = f"python -m data.world --pretrain --preset {args.preset} --output {base}"
        raise DataError(f"--base {base}: no such folder; make it with: {command}")
    index = out / "index"
    if not index.exists():
        world.main(["--index", str(index), "--preset", args.preset])
    jobs = [Job(out / f"seed-{seed}", base, str(index), seed, args) for seed in range(args.seed, args.seed + args.seeds)]
    per_seed = run_chains(jobs, args.workers)
    metrics = combine(per_seed)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    notes = [
        f"base {base}, {args.seeds} seed(s) from {args.seed}, {args.max_steps} steps of 12 questions × 8 trajectories "
        f"(rl_round_*: {args.round_steps} each), {args.eval_questions} held-out questions, temperature 1",
        f"ET-Agent reward with sigma_tool {args.sigma_tool}, sigma_length {args.sigma_length}, halved from round to "
        "round in the curriculum; entropy rewards as published (margin 0)",
        "single runs of a seed share base, questions and their order",
        "redundant, insufficient, conciseness: shares of trajectories; failed, redundant_calls: shares of calls; "
        "calls, tokens: means per trajectory; definitions in eval/behaviour.py",
    ]
    runs = {stage: [out / f"seed-{args.seed + k}" / stage for k in range(args.seeds)] for stage in CURVES}
    report = write_report(out, metrics, runs, notes)
    run.finish({"report": str(report)})
    print(tables(metrics), f"\nreport: {report}", sep="\n")
    return metrics


def run_chains(jobs: list[Job], workers: int) -> list[dict]:
    """Every chain of every seed, `workers` at once, each in a process of its own; the parts of each seed put together.

    A process writes what it does to CHAIN.log in its seed's folder; it ends when this one does.
    """
    for job in jobs:
        for part in QUESTIONS:
            job.questions(part)
    tasks = [(job, name) for job in jobs for name in CHAINS]
    results: dict[tuple, dict] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(run_chain, job, name): (job.seed, name) for job, name in tasks}
        print(f"{len(tasks)} chains, {workers} at once; what each does: tail -f {jobs[0].folder}/*.log")
        bar = tqdm(as_completed(futures), total=len(tasks), desc="reproduce", unit="chain")
        for future in bar:
            results[futures[future]] = future.result()
            bar.set_postfix(done="/".join(map(str, futures[future])))
        pool.submit(run_chain, jobs[0], "analyses").result()
    merged = []
    for job in jobs:
        parts = [results[job.seed, name] for name in CHAINS]
        merged.append({kind: {k: v for part in parts for k, v in part.get(kind, {}).items()} for kind in KINDS})
    return merged


def end_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone, so that no two work on a folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_chain(job: Job, name: str) -> dict:
    """One chain in this process, its output in a log file; returns {"stages": …} or {"sums": …}."""
    with open(job.folder / f"{name}.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return analyses(job) if name == "analyses" else CHAINS[name](job)


# ---------------------------------------------------------------------------------------------------- chains


def base_only(job: Job) -> dict:
    """The model that everything starts from."""
    return {"stages": {"base": job.measured("base", job.base)}}


def single_run(stage: str, **flags: Any) -> Callable[[Job], dict]:
    """A chain of one GRPO run from the base."""
    return partial(_single_run, stage=stage, flags=flags)


def _single_run(job: Job, stage: str, flags: dict) -> dict:
    own = {k: getattr(job.args, k) for k in ("sigma_tool", "sigma_length")}
    model = job.rl(stage, job.base, job.questions("train"), **own | flags)
    return {"stages": {stage: job.measured(stage, model)}}


def et_agent_whole(job: Job) -> dict:
    """SFT on right samples → flywheel → RFT → rounds of Pareto selection and RL [2601.06860; PAPERS A]."""
    args, train = job.args, job.questions("train")
    models = {}
    samples = job.evolve("samples", job.base, train, rounds=0, num_generations=4)
    models["sft"] = job.sft("sft", job.base, samples, 60)
    evolved = job.evolve("flywheel", models["sft"], train, num_generations=2)
    models["rft"] = job.sft("rft", models["sft"], evolved, 60)
    folder = job.folder / "curriculum"
    own = dict(model_name_or_path=models["rft"], data=train, limit=args.select_questions, seed=job.seed)
    own |= dict(num_questions=args.select_questions // 2, select_generations=8, rounds=ROUNDS)
    own |= dict(sigma_tool=args.sigma_tool, sigma_length=args.sigma_length, max_steps=args.round_steps)
    curriculum.main(curriculum.Args(**job.shared | own, output_dir=str(folder)))
    models |= {f"rl_round_{r}": str(folder / f"round-{r}" / "rl") for r in range(1, ROUNDS + 1)}
    return {"stages": {stage: job.measured(stage, model) for stage, model in models.items()}}


def autotool(job: Job) -> dict:
    """AutoTool on running sums [2603.13348; PAPERS B]: {"sums": {stage: {"all", "easy", "hard"}}}.

    think, no_think: the base in a forced mode. autotool: warm-up, refined data, asymmetric reward and the decoupled
    constraint; unconstrained: without the constraint; no_warmup: from the base, without it either.
    """
    base, train, held_out = job.base, job.questions("sums"), job.questions("sums-eval")
    probe = job.sample("sums-probe", base, held_out, mode="no_think", num_generations=8)
    hard = {i for i, share in right_shares(probe).items() if share < HARD}
    folder = job.folder / "warmup"
    own = dict(model_name_or_path=base, data=train, output=str(folder), num_generations=8, label_rule="majority")
    warmup.main(warmup.Args(**job.shared | own, seed=job.seed))
    warm = job.sft("autotool_warmup", base, str(folder / "sft.jsonl"), 400)
    refined = refined_questions(job, warm, train)
    rl = dict(reward="autotool", learning_rate=5e-4)
    constraint = dict(entropy_regulariser="decoupled", entropy_target="relative")
    stages = {
        "base": (base, "auto"),
        "think": (base, "think"),
        "no_think": (base, "no_think"),
        "autotool_warmup": (warm, "auto"),
        "autotool": (job.rl("autotool", warm, refined, **rl, **constraint), "auto"),
        "unconstrained": (job.rl("autotool_unconstrained", warm, refined, **rl), "auto"),
        "no_warmup": (job.rl("autotool_no_warmup", base, refined, **rl), "auto"),
    }
    metrics = {}
    for stage, (model, mode) in stages.items():
        sampled = job.sample(f"sums-{stage}", model, held_out, mode=mode)
        parts = {
            "all": sampled,
            "easy": [t for t in sampled if t.question_id not in hard],
            "hard": [t for t in sampled if t.question_id in hard],
        }
        metrics[stage] = {name: evaluate(part)["all"] for name, part in parts.items() if part}
    return {"sums": metrics}


def refined_questions(job: Job, warm: str, train: str) -> str:
    """AutoTool's data refinement: rewards of every question at two moments of a short RL run [PAPERS B2]."""
    output, n = job.folder / "sums-refined.questions.jsonl", len(load_questions(train)) // 2
    if output.exists():
        return str(output)
    probing = job.rl("sums-probing", warm, train, reward="autotool", learning_rate=5e-4, max_steps=job.args.round_steps)
    epochs = []
    for epoch, model in enumerate((warm, probing)):
        job.sample(f"sums-epoch-{epoch}", model, train, num_generations=8, seed=job.seed)
        epochs.append(str(job.folder / f"sums-epoch-{epoch}.jsonl"))
    refine.main(refine.Args(trajectories=epochs, data=train, output=str(output), num_questions=n, seed=job.seed))
    return str(output)


def right_shares(trajectories: list[Trajectory]) -> dict[str, float]:
    """Question id -> mean correctness of its samples."""
    return {g[0].question_id: fmean(score(t)[0] for t in g) for g in groups_of(trajectories)}


CHAINS: dict[str, Callable[[Job], dict]] = {  # long ones first
    "et_agent_whole": et_agent_whole,
    "autotool": autotool,
    "outcome_rl": single_run("outcome_rl", reward="correct"),
    "et_agent": single_run("et_agent", reward="et_agent"),
    "entropy_sparse": single_run("entropy_sparse", reward="entropy_sparse"),
    "entropy_dense": single_run("entropy_dense", reward="entropy_dense", advantage="entropy_dense", beta=1e-3),
    "base": base_only,
}


def analyses(job: Job) -> dict:
    """Beside the metrics, for one seed: what calls do to entropy, what hints repair, where stages act [PAPERS A6, C1]."""
    folder, last = job.folder.parent / "analyses", f"rl_round_{ROUNDS}"
    sampled = {stage: str(job.folder / f"{stage}.jsonl") for stage in STAGES}
    behaviour.main([sampled["base"], "--entropy", "--model_name_or_path", job.base, "--output", str(folder)])
    files = [f"{stage}={sampled[stage]}" for stage in ("base", "outcome_rl", "rft", last)]
    own = dict(model_name_or_path=job.base, trajectories=files, output=str(folder), limit=200, threads=job.args.threads)
    action_space.main(action_space.Args(**own))
    sets = {}
    for stage, model in (("base", job.base), (last, str(job.folder / "curriculum" / f"round-{ROUNDS}" / "rl"))):
        own = dict(model_name_or_path=model, trajectories=sampled[stage], output_dir=str(job.folder / f"{stage}-hints"))
        sets[stage] = insufficiency.main(insufficiency.Args(**job.shared | own, seed=job.seed))["sets"]["all"]
    columns = ("wrong", "fixed", "insufficient", "mean_extra_calls")
    rows = [[stage, *(row[c] for c in columns)] for stage, row in sets.items()]
    text = "Wrong trajectories, and what up to three hints repair: shares of the wrong ones, calls beyond theirs.\n\n"
    write_text(folder / "insufficiency.md", text + table(["", *columns], rows) + "\n")
    return {}


def combine(per_seed: list[dict]) -> dict:
    """metrics.json: stage and family means over seeds and, for several seeds, the standard deviation of each metric."""
    first = per_seed[0]
    stages, sums = sorted(first["stages"], key=STAGES.index), first["sums"]
    metrics = {
        "stages": {s: _mean([m["stages"][s]["all"] for m in per_seed]) for s in stages},
        "families": {
            s: {f: _mean([m["stages"][s]["families"][f] for m in per_seed]) for f in first["stages"][s]["families"]}
            for s in stages
        },
        "sums": {
            s: {part: _mean([m["sums"][s][part] for m in per_seed if part in m["sums"][s]]) for part in sums[s]}
            for s in sums
        },
    }
    if len(per_seed) > 1:
        metrics["spread"] = {
            s: {c: stdev(m["stages"][s]["all"][c] for m in per_seed) for c in COLUMNS if c != "n"} for s in stages
        }
        metrics["seeds"] = per_seed
    return metrics


def _mean(rows: list[dict]) -> dict:
    return {name: fmean(row[name] for row in rows) if name != "n" else rows[0]["n"] for name in rows[0]}


def tables(metrics: dict) -> str:
    """The stage table and the table of sums."""
    return f"{metrics_table(metrics['stages'])}\n\n{sums_table(metrics['sums'])}"


if __name__ == "__main__":
    cli(main, Args)
