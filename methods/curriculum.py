"""ET-Agent's curriculum RL [2601.06860, sec. 4.2.2, 4.2.3; PAPERS A3, A4]: rounds of sample → select → train.

    python -m methods.curriculum --model_name_or_path out/rft --data Q.jsonl --index DIR --num_questions 500 --output_dir out/c

Round r = 1 … R starts from the policy that round r − 1 has left:
1. sample  K trajectories of every question (rollout.py)             round-r/trajectories.jsonl
2. select  N of the questions by `--selector` (methods/selection.py)         round-r/questions.jsonl
3. train   GRPO on them with this round's σ (train_rl.py)            round-r/rl, an adapter folder
Every part is resumable: the same command goes on where it was killed and ends with the same adapter. result.json holds
the statistics of each selection, the last RL metrics of each round and the folder of the last adapter.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rollout
import train_rl
from core import distributed
from core.args import arg, cli, flags_of, require_positive
from core.run import seed_of, start_run, table
from core.trajectory import DataError
from grpo.rewards import REWARDS
from methods import selection
from methods.selection import SELECTORS


@dataclass
class Args(train_rl.Args):
    """Flags of the curriculum, and all of train_rl.py's for each of its rounds."""

    reward: Literal[tuple(REWARDS)] = arg("et_agent", "what is optimised")
    sigma_schedule: Literal["round", "linear", "fixed"] = arg(
        "round", "both σ: halved from round to round, falling to 0 within each round (ET-Agent's code), or as they are"
    )
    rounds: int = arg(3, "R, rounds (ET-Agent: 3)")
    select_generations: int = arg(16, "K, samples of a question that the selection sees (ET-Agent: 16)")
    num_questions: int = arg(0, "N, questions of a round (required, except for --selector all)")
    selector: Literal[tuple(SELECTORS)] = arg("pareto", "how the questions of a round are chosen")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "rounds", "select_generations")
        if (self.selector == "all") != (self.num_questions == 0) or self.num_questions < 0:
            raise ValueError(f"--num_questions {self.num_questions} does not go with --selector {self.selector}")
        if 0 < self.num_questions < self.questions_per_step:
            raise ValueError(
                f"--num_questions {self.num_questions} is less than --questions_per_step {self.questions_per_step}"
            )
        if distributed.count() > 1:
            raise ValueError(f"the curriculum runs in one process, not {distributed.count()}; use train_rl.py for more")


def main(args: Args) -> dict:
    """Run what is missing of every round; returns (and writes to result.json) what each has done."""
    run = start_run(args, (args.data,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{summary(run.finished)}")
        return run.finished
    result: dict[str, Any] = {"rounds": [], "adapter": args.model_name_or_path, "ended": ""}
    for r in range(1, args.rounds + 1):
        print(f"== round {r}")
        folder, policy = run.dir / f"round-{r}", result["adapter"]
        chosen = select_questions(folder, policy, r, args)
        n = chosen["selected"]["n"]
        if n < args.questions_per_step:
            least = f"--questions_per_step {args.questions_per_step}"
            result["ended"] = f"round {r}: {n} questions selected, fewer than {least}"
            if r == 1:
                raise DataError(result["ended"])
            break  # the policy has too little left to learn from
        settings = round_settings(folder, policy, r, args)
        metrics = train_rl.main(settings)
        sigmas = {"sigma_tool": settings.sigma_tool, "sigma_length": settings.sigma_length}
        result["rounds"].append({"round": r, **sigmas, "selection": chosen, "rl": metrics})
        result["adapter"] = settings.output_dir
    run.finish(result)
    print(summary(result))
    return result


def select_questions(folder: Path, policy: str, r: int, args: Args) -> dict[str, dict]:
    """Write the round's questions, chosen by K samples of the policy; returns the statistics of the selection."""
    sampled, chosen = folder / "trajectories.jsonl", folder / "questions.jsonl"
    if not chosen.exists():
        rollout.main(
            rollout.Args(
                **flags_of(rollout.Args, args)
                | dict(model_name_or_path=policy, output=str(sampled), seed=seed_of_round(r, args), overwrite=False)
                | dict(num_generations=args.select_generations, branching="none", initial_rollouts=0)
            )
        )
        settings = flags_of(selection.Args, args) | dict(trajectories=str(sampled), output=str(chosen), overwrite=False)
        selection.main(selection.Args(**settings | {"seed": seed_of_round(r, args)}))
    return json.loads(Path(f"{chosen}.statistics.json").read_text())


def round_settings(folder: Path, policy: str, r: int, args: Args) -> train_rl.Args:
    """The RL run of a round: `round` halves both σ from round to round (0.1, 0.05, 0.025: our reading)."""
    share = 0.5 ** (r - 1) if args.sigma_schedule == "round" and args.reward == "et_agent" else 1.0
    own = dict(model_name_or_path=policy, data=str(folder / "questions.jsonl"), task="auto", limit=0)
    own |= dict(output_dir=str(folder / "rl"), seed=seed_of_round(r, args), overwrite=False)
    own |= dict(sigma_tool=args.sigma_tool * share, sigma_length=args.sigma_length * share)
    own |= dict(sigma_schedule="linear" if args.sigma_schedule == "linear" else "fixed")
    return train_rl.Args(**flags_of(train_rl.Args, args) | own)


def seed_of_round(r: int, args: Args) -> int:
    """Another seed in every round: other noise, another order of the questions."""
    return seed_of(args.seed, "round", r) % 2**31


def summary(result: dict) -> str:
    """Table of the rounds: what the policy did before each, what was selected, the reward at its end."""
    rows = []
    for row in result["rounds"]:
        before, chosen = row["selection"]["sampled"], row["selection"]["selected"]
        rows.append([row["round"], row["sigma_tool"], before["correctness"], before["calls"], *chosen.values()])
        rows[-1].append(row["rl"]["reward"])
    names = ["round", "σ_tool", "correctness before", "calls before", "selected", "correctness", "calls"]
    names += ["S_corr", "S_tool", "reward after"]
    lines = [table(names, rows), result["ended"], f"adapter: {result['adapter']}"]
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    cli(main, Args)
