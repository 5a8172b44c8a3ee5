"""The claims of the three papers as data: worlds, variants (chains of our scripts) and what is compared with what.

Thresholds were written before any of the runs. In a stage's flags "{name}" stands for an earlier stage's output, and
{train}, {held_out}, {index}, {base}, {seed} for what claim_cells.py fills in; it also adds the flags that all share.
"""

from typing import Any, NamedTuple


class World(NamedTuple):
    """Where variants are trained and evaluated; easy_share: share of training items easy for the base, or as drawn."""

    families: str  # of data.world --families
    noise: float
    easy_share: float | None = None


class Stage(NamedTuple):
    """One script run; minutes: on one core, an expectation for --list."""

    name: str
    script: str
    flags: dict[str, Any]
    minutes: float


class Variant(NamedTuple):
    """A chain of stages from the base; evaluate: flags of the evaluation."""

    world: str
    stages: tuple[Stage, ...]
    evaluate: dict[str, Any] = {}


class Claim(NamedTuple):
    """`says`, in our words, and how it is decided: `metric` of the first variant of each pair against the second.

    metric: a column of a row's `questions`, or column|subset. sign: +1 if the claim says higher, −1 if lower.
    at_least: the smallest difference that deserves the claim's words. margin: by how much correctness may be lower;
    None where the claim is about correctness itself or compares a model with its own start.
    """

    where: str
    says: str
    metric: str
    sign: int
    at_least: float
    margin: float | None
    pairs: tuple[tuple[str, str], ...]


MARGIN = 0.01
EVALUATION_MINUTES = 0.5
WORLDS = {
    "noisy": World("noisy", 1.0),
    "plain": World("recall,lookup,bridge,add,multiply,lookup_compute", 0.0),
    **{f"sums_{share}": World("running_sum", 0.0, share / 100) for share in (35, 55, 75, 85)},
}
VARIANTS: dict[str, Variant] = {}


def declare(name: str, world: str, *stages: Stage, **evaluate: Any) -> str:
    """Enter a variant; returns its name."""
    VARIANTS[name] = Variant(world, stages, evaluate)
    return name


def rl(steps: int = 80, **flags: Any) -> Stage:
    """GRPO on the world's training questions unless `data` says otherwise."""
    return Stage("rl", "train_rl", {"max_steps": steps, "save_steps": 10, **flags}, steps / 50)


# ---------------------------------------------------------------------------------------------------- ET-Agent

ET = {"reward": "et_agent", "sigma_tool": 0.5, "sigma_length": 0.1}
SFT = {"per_device_train_batch_size": 16, "max_steps": 60, "save_steps": 20}
FLYWHEEL = {"critic": "rule", "limit": 300}


def rft(**flags: Any) -> tuple[Stage, Stage]:
    """Flywheel and fine-tuning on its RFT set; the same number of SFT examples whatever the flywheel found."""
    flywheel = Stage("flywheel", "flywheel", {**FLYWHEEL, **flags}, 1.5)
    return flywheel, Stage("rft", "train_sft", {**SFT, "data": "{flywheel}/rft.jsonl"}, 0.5)


FRESH = rft(rounds=0, num_generations=10)  # as many samples as 1 + 3 rounds of 3 may give, without any edit
NO_HINT = ["redundant_modification", "global_refinement", "self_correction"]


def selected(selector: str, *before: Stage) -> tuple[Stage, ...]:
    """One round of the curriculum: K = 16 samples of the current model, N questions chosen, RL on them."""
    sample = Stage("sample", "rollout", {"num_generations": 16, "limit": 400}, 1.5)
    flags = {"trajectories": "{sample}", "selector": selector, "num_questions": 80}
    return *before, sample, Stage("select", "selection", flags, 0.2), rl(data="{select}", **ET)


for world in ("noisy", "plain"):
    at = "" if world == "noisy" else "_plain"
    declare(f"base{at}", world)
    declare(f"rl_correct{at}", world, rl(reward="correct"))
    declare(f"rl_et{at}", world, rl(**ET))
declare("rft", "noisy", *rft())
declare("rft_fresh", "noisy", *FRESH)
declare("rft_rl_et", "noisy", *rft(), rl(**ET))
declare("rft_fresh_rl_et", "noisy", *FRESH, rl(**ET))
for selector in ("pareto", "random", "s_corr_only", "s_tool_only"):
    declare(f"select_{selector}", "noisy", *selected(selector, *rft()))
for sigma in (0.1, 0.5, 2.0):
    for advantage in ("grpo", "grpo_no_std"):
        flags = {"reward": "et_agent", "sigma_tool": sigma, "sigma_length": sigma, "advantage": advantage}
        declare(f"sigma_{sigma}_{advantage}", "noisy", rl(**flags))
declare("rl_cap_2", "noisy", rl(reward="correct", max_tool_calling_iterations=2))
declare("rft_no_hint", "noisy", *rft(operators=NO_HINT))
declare("rft_entropy_critic", "noisy", *rft(critic="entropy"))

SIGMAS = tuple(f"sigma_{sigma}_{advantage}" for sigma in (0.1, 0.5, 2.0) for advantage in ("grpo", "grpo_no_std"))
CLAIMS = {
    "et_behaviour_reward": Claim(
        "2601.06860, ablations", "the behaviour reward raises efficiency over the outcome reward at equal correctness",
        "efficiency", +1, 0.02, MARGIN, (("rl_et", "rl_correct"), ("rl_et_plain", "rl_correct_plain"))),
    "et_against_start": Claim(
        "2601.06860, main table", "training with the behaviour reward raises efficiency over the model it starts from",
        "efficiency", +1, 0.05, MARGIN, (("rl_et", "base"), ("rl_et_plain", "base_plain"))),
    "et_flywheel": Claim(
        "2601.06860, ablations", "edited trajectories make a better start than fresh samples, before and after RL",
        "efficiency", +1, 0.0, MARGIN, (("rft", "rft_fresh"), ("rft_rl_et", "rft_fresh_rl_et"))),
    "et_pareto": Claim(
        "2601.06860, ablations", "questions chosen by Pareto sampling teach more than as many chosen otherwise",
        "efficiency", +1, 0.0, MARGIN,
        tuple(("select_pareto", f"select_{other}") for other in ("random", "s_corr_only", "s_tool_only"))),
    "et_fixed_sigma": Claim(
        "2601.06860, sec. 5", "a fixed weight of the behaviour terms costs correctness against the outcome reward",
        "correctness", -1, 0.01, None, tuple((name, "rl_correct") for name in SIGMAS)),
    "et_beats_simple_rules": Claim(
        "control", "the behaviour reward is more than a price or a cap on calls",
        "efficiency", +1, 0.0, MARGIN, (("rl_et", "rl_cap_2"),)),
    "et_hint": Claim(
        "2601.06860, sec. 4.1", "hint injection leaves fewer questions with too few calls",
        "insufficient", -1, 0.0, MARGIN, (("rft", "rft_no_hint"),)),
    "et_critic": Claim(
        "control", "a critic that knows the needed calls beats one that reads entropies only",
        "efficiency", +1, 0.0, MARGIN, (("rft", "rft_entropy_critic"),)),
}  # fmt: skip
