"""The parts of the reproduction: chains of our scripts that start from the base, one seed at a time (experiments/reproduce.py).

A chain returns {"stages": {name: metrics}} on held-out questions of the world's six plain families, or {"sums": …} on
running sums. Everything it makes is a resumable folder or file.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flywheel
import rollout
import train_rl
import train_sft
from core.run import table, write_text
from core.segments import Segment
from core.trajectory import Trajectory
from data.questions import load_questions
from data.world import __main__ as world
from data.world import facts
from eval import behaviour
from eval.evaluate import evaluate
from experiments import action_space, insufficiency
from experiments.shared import EVAL_SEED, PROBES, RL_SAMPLING, SAMPLING, hard_ids
from methods import curriculum, refine, warmup

FAMILIES = ",".join(facts.PLAIN)
QUESTIONS = {  # part -> families, flag of its size, seed
    "train": (FAMILIES, "train_questions", 0),
    "eval": (FAMILIES, "eval_questions", EVAL_SEED),
    "sums": ("running_sum", "sum_questions", 0),
    "sums-eval": ("running_sum", "eval_questions", EVAL_SEED),
}
ROUNDS = 3
STAGES = ("base", "outcome_rl", "et_agent", "sft", "rft", *(f"rl_round_{r}" for r in range(1, ROUNDS + 1)),
          "entropy_sparse", "entropy_dense")  # fmt: skip


SUM_NOTES = (
    "think, no_think: the base in a forced mode; oracle: the base, told to think on the hard sums only",
    "autotool_warmup: SFT on labelled answers (majority); autotool: then RL on the refined half of the sums, with the "
    "asymmetric reward and the decoupled constraint; unrefined: on all of them; unconstrained: without the constraint",
    "no_warmup: from the base on the same refined sums (refined by probes of the warmed-up model), no constraint",
)


class Job(NamedTuple):
    """One seed of the reproduction: where its parts are, and what they share."""

    folder: Path
    base: str
    index: str
    seed: int
    args: Any  # the flags of experiments/reproduce.py

    @property
    def shared(self) -> dict[str, Any]:
        """Flags of every script that samples."""
        return dict(SAMPLING, threads=self.args.threads, engine=self.args.engine, index=self.index)

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
        own |= dict(RL_SAMPLING, max_steps=self.args.max_steps)
        train_rl.main(train_rl.Args(**self.shared | own | flags))
        return own["output_dir"]

    def sft(self, stage: str, start: str, data: str, steps: int, **flags: Any) -> str:
        """The adapter folder of a fine-tuning run."""
        own = dict(model_name_or_path=start, data=data, output_dir=str(self.folder / stage), seed=self.seed)
        own |= dict(max_steps=self.args.max_steps if self.args.quick else steps, per_device_train_batch_size=16)
        print(f"== {stage}", flush=True)
        train_sft.main(train_sft.Args(**own | flags, threads=self.args.threads))
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


def base_only(job: Job) -> dict:
    """The model that everything starts from."""
    return {"stages": {"base": job.measured("base", job.base)}}


def single_run(stage: str, **flags: Any) -> Callable[[Job], dict]:
    """A chain of one GRPO run from the base."""
    return partial(_single_run, stage=stage, flags=flags)


def et_reward(job: Job) -> dict:
    """GRPO with ET-Agent's reward; outcome_rl is the same with both σ = 0: right and well formed, whatever it took."""
    sigmas = {name: getattr(job.args, name) for name in ("sigma_tool", "sigma_length")}
    return _single_run(job, "et_agent", {"reward": "et_agent", **sigmas})


def _single_run(job: Job, stage: str, flags: dict) -> dict:
    model = job.rl(stage, job.base, job.questions("train"), **flags)
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
    own |= dict(sigma_tool=args.sigma_tool, sigma_length=args.sigma_length, max_steps=args.round_steps) | RL_SAMPLING
    done = len(curriculum.main(curriculum.Args(**job.shared | own, output_dir=str(folder)))["rounds"])
    for r in range(1, ROUNDS + 1):  # a round with too little left to learn ends the curriculum: the policy stays
        models[f"rl_round_{r}"] = round_folder(job, min(r, done))
    return {"stages": {stage: job.measured(stage, model) for stage, model in models.items()}}


def round_folder(job: Job, r: int) -> str:
    """The adapter that a round of the curriculum has left."""
    return str(job.folder / "curriculum" / f"round-{r}" / "rl")


def autotool(job: Job) -> dict:
    """AutoTool on running sums [2603.13348; PAPERS B]: {"sums": {stage: {"all", "easy", "hard"}}}.

    Stages: SUM_NOTES. Hard sums are those that the base, answering at once, gets wrong in most of PROBES samples.
    """
    base, train, held_out = job.base, job.questions("sums"), job.questions("sums-eval")
    own = dict(mode="no_think", num_generations=PROBES, seed=job.seed)  # other samples than those that are measured
    hard = hard_ids(job.sample("sums-probe", base, held_out, **own))
    folder = job.folder / "warmup"
    own = dict(model_name_or_path=base, data=train, output=str(folder), num_generations=8, label_rule="majority")
    warmup.main(warmup.Args(**job.shared | own, seed=job.seed))
    warm = job.sft("autotool_warmup", base, str(folder / "sft.jsonl"), 400, learning_rate=2e-3)
    refined = refined_questions(job, warm, train)
    rl = dict(reward="autotool", learning_rate=5e-4)
    constraint = dict(entropy_regulariser="decoupled", entropy_target="relative")
    stages = {
        "base": (base, "auto"),
        "think": (base, "think"),
        "no_think": (base, "no_think"),
        "autotool_warmup": (warm, "auto"),
        "autotool": (job.rl("autotool", warm, refined, **rl, **constraint), "auto"),
        "unrefined": (job.rl("autotool_unrefined", warm, train, **rl, **constraint), "auto"),
        "unconstrained": (job.rl("autotool_unconstrained", warm, refined, **rl), "auto"),
        "no_warmup": (job.rl("autotool_no_warmup", base, refined, **rl), "auto"),
    }
    samples = {s: job.sample(f"sums-{s}", model, held_out, mode=mode) for s, (model, mode) in stages.items()}
    samples["oracle"] = [t for t in samples["think"] if t.question_id in hard]
    samples["oracle"] += [t for t in samples["no_think"] if t.question_id not in hard]
    metrics = {}
    for stage, sampled in samples.items():
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


CHAINS: dict[str, Callable[[Job], dict]] = {  # long ones first
    "et_agent_whole": et_agent_whole,
    "autotool": autotool,
    "outcome_rl": single_run("outcome_rl", reward="et_agent", sigma_tool=0.0, sigma_length=0.0),
    "et_agent": et_reward,
    "entropy_sparse": single_run("entropy_sparse", reward="entropy_sparse", beta=1e-3),
    "entropy_dense": single_run("entropy_dense", reward="entropy_dense", advantage="entropy_dense", beta=1e-3),
    "base": base_only,
}


def analyses(job: Job) -> dict:
    """For one seed: what calls do to entropy, what hints repair, where the stages act [PAPERS A6, C1].

    What hints repair is an upper bound: a second sample without a hint would repair some of it too.
    """
    folder, last = job.folder.parent / "analyses", f"rl_round_{ROUNDS}"
    sampled = {stage: str(job.folder / f"{stage}.jsonl") for stage in STAGES}
    for segment in get_args(Segment):
        own = [] if segment == "reasoning" else ["--segment", segment]
        flags = [*own, "--model_name_or_path", job.base, "--output", str(folder.joinpath(*own[1:]))]
        behaviour.main([sampled["base"], "--entropy", *flags])
    files = [f"{stage}={sampled[stage]}" for stage in ("base", "outcome_rl", "rft", last)]
    own = dict(model_name_or_path=job.base, trajectories=files, output=str(folder), limit=200, threads=job.args.threads)
    action_space.main(action_space.Args(**own))
    sets = {}
    for stage, model in (("base", job.base), (last, str(job.folder / "curriculum"))):
        own = dict(model_name_or_path=model, trajectories=sampled[stage], output_dir=str(job.folder / f"{stage}-hints"))
        sets[stage] = insufficiency.main(insufficiency.Args(**job.shared | own, seed=job.seed))["sets"]["all"]
    columns = ("wrong", "fixed", "insufficient", "mean_extra_calls")
    rows = [[stage, *(row[c] for c in columns)] for stage, row in sets.items()]
    text = "Wrong trajectories, and what up to three hints repair (another sample without a hint would repair some too): "
    text += "shares of the wrong ones, calls beyond theirs.\n\n"
    write_text(folder / "insufficiency.md", text + table(["", *columns], rows) + "\n")
    return {}
