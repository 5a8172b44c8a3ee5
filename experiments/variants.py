"""Everything that is trained and compared here, as data: a variant is a chain of our scripts that starts from the base.

To try something of your own, `declare` a variant: its world, its stages with their flags, how it is evaluated. In a
flag "{name}" stands for an earlier stage's output, and {base}, {train}, {held_out}, {index} and {seed} for what
experiments/cells.py fills in; it also adds the flags that all stages share. One variant run with one seed is a cell.
"""

from typing import Any, NamedTuple

from data.world.facts import PLAIN


class World(NamedTuple):
    """Where variants are trained and evaluated."""

    families: str  # of data.world --families
    noise: float = 0.0
    easy_share: float | None = None  # share of short sums in training; None = as many of every length
    train: int = 2000  # questions
    held_out: int = 1000
    fresh: bool = False  # held-out questions of its own for each seed; else all seeds are asked the same

    @property
    def sums(self) -> bool:
        """Whether its questions are sums, which need no tool and of which the hard ones need a thought."""
        return self.families == "running_sum"


class Stage(NamedTuple):
    """One script run; minutes: on one core, an expectation."""

    name: str
    script: str  # of cells.SCRIPTS
    flags: dict[str, Any]
    minutes: float


class Variant(NamedTuple):
    """A chain of stages from the base; evaluate: flags of the evaluation; label: what reports call it."""

    world: str
    stages: tuple[Stage, ...]
    evaluate: dict[str, Any]
    label: str


WORLDS = {
    "noisy": World("noisy", 1.0),
    "plain": World(",".join(PLAIN)),
    **{f"sums_{share}": World("running_sum", easy_share=share / 100) for share in (35, 55, 75, 85)},
}
VARIANTS: dict[str, Variant] = {}


def declare(name: str, world: str, *stages: Stage, label: str = "", **evaluate: Any) -> str:
    """Enter a variant; returns its name."""
    VARIANTS[name] = Variant(world, stages, evaluate, label or name)
    return name


def rl(steps: int = 80, name: str = "rl", **flags: Any) -> Stage:
    """GRPO on the world's training questions unless `data` says otherwise."""
    return Stage(name, "train_rl", {"max_steps": steps, "save_steps": 10, **flags}, steps / 40)


def sft(name: str, data: str, steps: int = 60, **flags: Any) -> Stage:
    """Fine-tuning on a trajectory file."""
    flags = {"per_device_train_batch_size": 16, "max_steps": steps, "save_steps": 20, "data": data, **flags}
    return Stage(name, "train_sft", flags, 0.4 + steps / 600)


# ---------------------------------------------------------------------------------------------------- ET-Agent

ET = {"reward": "et_agent", "sigma_tool": 0.5, "sigma_length": 0.1}
NO_BEHAVIOUR = ET | {"sigma_tool": 0.0, "sigma_length": 0.0}  # S and the format term, with the same weights as in ET
FLYWHEEL = {"critic": "rule", "limit": 300, "rft_select": "fewest_calls", "rft_per_question": 4}
SELECTORS = ("pareto", "random", "s_corr_only", "s_tool_only")
SIGMAS = {f"sigma_{sigma}_{advantage}": (sigma, advantage) for sigma in (0.1, 0.5, 2.0)
          for advantage in ("grpo", "grpo_no_std")}  # fmt: skip
PENALTIES = (0.05, 0.1, 0.3)
PRICES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # λ of the price frontier
CAPS = (2, 3)


def rft(**flags: Any) -> tuple[Stage, Stage]:
    """Flywheel and fine-tuning on its RFT set; the same number of SFT examples whatever the flywheel found.

    The critic is the world's oracle, and the set is the trajectories with the fewest calls: neither is the paper's.
    """
    return Stage("flywheel", "flywheel", {**FLYWHEEL, **flags}, 1.5), sft("rft", "{flywheel}/rft.jsonl")


def curriculum(selector: str, schedule: str = "round") -> Stage:
    """Three rounds of 16 samples of 300 questions, 60 chosen, 30 RL steps on them; σ halves from round to round."""
    flags = {"limit": 300, "selector": selector, "num_questions": 60, "max_steps": 30, "save_steps": 10}
    return Stage("curriculum", "curriculum", {**ET, **flags, "sigma_schedule": schedule}, 5.5)


FRESH = rft(rounds=0, num_generations=5)  # one flywheel sampled 240 and added 901 trajectories of 240 questions
NO_HINT = ["redundant_modification", "global_refinement", "self_correction"]

for world in ("noisy", "plain"):
    at = "" if world == "noisy" else "_plain"
    declare(f"base{at}", world)
    declare(f"rl_correct{at}", world, rl(**NO_BEHAVIOUR))
    declare(f"rl_et{at}", world, rl(**ET))
declare("rft", "noisy", *rft())
declare("rft_fresh", "noisy", *FRESH)
declare("rft_rl_et", "noisy", *rft(), rl(**ET))
declare("rft_fresh_rl_et", "noisy", *FRESH, rl(**ET))
for selector in SELECTORS:
    declare(f"rft_curriculum_{selector}", "noisy", *rft(), curriculum(selector))
declare("rft_curriculum_fixed", "noisy", *rft(), curriculum("pareto", "fixed"))
for name, (sigma, advantage) in SIGMAS.items():
    flags = {"reward": "et_agent", "sigma_tool": sigma, "sigma_length": sigma, "advantage": advantage}
    declare(name, "noisy", rl(**flags))
    declare(f"{name}_falling", "noisy", rl(**flags, sigma_schedule="linear"))
for penalty in PENALTIES:
    declare(f"rl_price_{penalty}", "noisy", rl(reward="calls_penalty", call_penalty=penalty))
for world, at in (("noisy", ""), ("plain", "_plain")):
    for price in PRICES:
        declare(f"rl_price{at}_{price}", world, rl(reward="calls_penalty", call_penalty=price))
    declare(f"rl_otc{at}", world, rl(reward="otc"), label="OTC-PO")
    for cap in CAPS:
        calls = {"max_tool_calling_iterations": cap}
        declare(f"rl_cap_{cap}{at}", world, rl(**NO_BEHAVIOUR, **calls), label=f"at most {cap} calls", **calls)
for branching in ("arpo", "random"):
    declare(f"rl_et_{branching}", "noisy", rl(**ET, branching=branching))
declare("rft_no_hint", "noisy", *rft(operators=NO_HINT))
declare("rft_entropy_critic", "noisy", *rft(critic="entropy"))

# ---------------------------------------------------------------------------------------------------- AutoTool

SHARES = (35, 55, 75, 85)  # percent of easy items in training
AT_STEPS = 120
REGULARISERS = {
    "none": {},
    "constant_0.01": {"entropy_regulariser": "constant", "entropy_coef": 0.01},
    "constant_0.1": {"entropy_regulariser": "constant", "entropy_coef": 0.1},
    "constant_0.3": {"entropy_regulariser": "constant", "entropy_coef": 0.3},
    "adaptive": {"entropy_regulariser": "adaptive", "entropy_target": "relative"},
    "decoupled": {"entropy_regulariser": "decoupled", "entropy_target": "relative"},
    "decoupled_short": {"entropy_regulariser": "decoupled", "entropy_target": "relative", "beta_short": 0.01},
    # "without adaptation" of the paper; the constants lack gate and mode mask as well
    "decoupled_frozen": {"entropy_regulariser": "decoupled", "entropy_target": "relative", "beta_lr": 0.0},
    "decoupled_strong": {"entropy_regulariser": "decoupled", "entropy_target": "relative", "beta_long": 0.1},
}
AT_RATE = 5e-4  # at 2e-3 every variant had decided for one mode within 20 steps, in one trial each


def at_rl(**flags: Any) -> Stage:
    """GRPO on sums, the same steps and learning rate in every cell."""
    return rl(AT_STEPS, learning_rate=AT_RATE, **flags)


REFINEMENTS = ("epochs_low", "rollouts_low", "rollouts_high", "random")
PROBE_STEPS = (10, 20, 30, 40)  # checkpoints of a short run that data refinement looks at


def warm(rule: str, limit: int = 1200, steps: int = 400) -> tuple[Stage, ...]:
    """The warm-up set and SFT on it; none = RL from the base."""
    if rule == "none":
        return ()
    builder = Stage("warmup", "warmup", {"num_generations": 8, "limit": limit, "label_rule": rule}, 1.0)
    return builder, sft("warm", "{warmup}/sft.jsonl", steps, learning_rate=2e-3)


def refined(how: str) -> tuple[Stage, ...]:
    """A third of 900 questions, chosen from probes of a short run's checkpoints, for the RL stage after them."""
    flags = {"max_steps": PROBE_STEPS[-1], "save_steps": 10, "save_total_limit": 0, "limit": 900}
    short = Stage("probe_rl", "train_rl", {"reward": "autotool", "learning_rate": AT_RATE, **flags}, 0.8)
    probes = [
        Stage(f"probe_{n}", "rollout", {"model_name_or_path": "{probe_rl}/checkpoint-" + str(n), "limit": 900}, 1.5)
        for n in PROBE_STEPS
    ]
    files = [f"{{probe_{n}}}" for n in PROBE_STEPS]
    flags = {"trajectories": files, "data": "{train}", "num_questions": 300, "refine": how}
    return short, *probes, Stage("refine", "refine", flags, 0.2)


def at(rule: str, share: int, regulariser: str, **flags: Any) -> str:
    """The variant of one cell of the factorial: asymmetric reward, warm-up rule, share of easy items, regulariser."""
    stages = *warm(rule), at_rl(**({"reward": "autotool"} | REGULARISERS[regulariser] | flags))
    return declare(f"at_{share}_{rule}_{regulariser}", f"sums_{share}", *stages)


declare("at_base", "sums_85")
for share in SHARES:
    for rule, regulariser in (("none", "none"), ("none", "decoupled"), ("majority", "none"), ("majority", "decoupled")):
        at(rule, share, regulariser)
    for mode, reward in (("think", "correct"), ("no_think", "correct")):
        stage = at_rl(reward=reward, mode=mode)
        declare(f"at_{share}_always_{mode}", f"sums_{share}", stage, mode=mode)
for share in (35, 85):
    for rule in ("none", "any", "majority"):
        for regulariser in REGULARISERS:
            at(rule, share, regulariser)
    declare(f"at_{share}_correct", f"sums_{share}", at_rl(reward="correct"))
    limit = {"max_completion_length": 64}  # no answer on sums is longer; the penalty is a share of it
    declare(f"at_{share}_length", f"sums_{share}", at_rl(reward="length_penalty", **limit))
    for how in REFINEMENTS:
        start = {"model_name_or_path": "{warm}", "data": "{refine}"}  # not from the probe run
        stage = at_rl(reward="autotool", **start, **REGULARISERS["decoupled"])
        declare(f"at_{share}_refine_{how}", f"sums_{share}", *warm("majority"), *refined(how), stage)

# ---------------------------------------------------------------------------------------------------- entropy

SEGMENTS = ("reasoning", "with_call", "think")
WITH_ANSWER = "reasoning_with_answer"  # what --segment reasoning meant in the first runs of these claims
MARGINS = (0.0, 0.02, 0.1, 0.3)
KL = {"beta": 1e-3}
SPARSE, DENSE = "en_sparse_reasoning_0.0", "en_dense_reasoning_0.0"
SPARSE_WITH_ANSWER, DENSE_WITH_ANSWER = f"en_sparse_{WITH_ANSWER}_0.0", f"en_dense_{WITH_ANSWER}_0.0"
RUNS = ("", "_plain", "_long")  # the main rows: noisy, plain, and noisy with more steps
FIRST_RUNS = RUNS[:2]  # those with the answer in the last segment
LONG_STEPS = 300
THINK = {"mode": "think"}  # as the models of the paper; without thinking, the thought between two calls is empty


def entropy(name: str, world: str = "noisy", **flags: Any) -> str:
    """RL with the KL to the start that both entropy rewards have, thinking always; evaluated alike."""
    dense = {"advantage": "entropy_dense"} if flags["reward"] == "entropy_dense" else {}
    stage = rl(**KL, **THINK, **dense, **flags)
    if flags["reward"].startswith("entropy_"):  # a name of its own: no folder or row from before the default segment
        stage = stage._replace(name="rl_entropy")  # left out the answer is taken for one of these
    return declare(name, world, stage, **THINK)


for world in ("noisy", "plain"):
    suffix = "" if world == "noisy" else "_plain"
    declare(f"en_base{suffix}", world, **THINK)
    entropy(f"en_correct{suffix}", world, reward="correct")
    settings = [(s, m) for s in SEGMENTS for m in MARGINS] if world == "noisy" else [(SEGMENTS[0], MARGINS[0])]
    for segment, margin in [*settings, (WITH_ANSWER, 0.0)]:
        for kind in ("sparse", "dense"):
            flags = {"reward": f"entropy_{kind}", "segment": segment, "delta_margin": margin}
            entropy(f"en_{kind}_{segment}_{margin}{suffix}", world, **flags)
for name, reward in (("en_correct", "correct"), (SPARSE, "entropy_sparse"), (DENSE, "entropy_dense")):
    entropy(f"{name}_long", reward=reward, steps=LONG_STEPS)
for indicator in ("random", "oracle", "reference"):
    entropy(f"en_sparse_{indicator}", reward="entropy_sparse", indicator=indicator)
for penalty in PENALTIES:
    entropy(f"en_price_{penalty}", reward="calls_penalty", call_penalty=penalty)
for world, at in (("noisy", ""), ("plain", "_plain")):
    for price in PRICES:
        entropy(f"en_price{at}_{price}", world, reward="calls_penalty", call_penalty=price)

# ---------------------------------------------------------------------------------------------------- price frontier

MARKS = tuple(f"en_sparse_{indicator}" for indicator in ("random", "oracle", "reference"))
FRONTIERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # panel -> its prices, the methods held against them
    f"{world} world, {how}": (tuple(f"{kind}_price{at}_{price}" for price in PRICES), tuple(v + at for v in methods))
    for world, at in (("noisy", ""), ("plain", "_plain"))
    for how, kind, methods in (
        ("thinking free", "rl", ("rl_et", "rl_otc", *(f"rl_cap_{cap}" for cap in CAPS))),
        ("always thinking, KL", "en", (SPARSE, DENSE, *(MARKS if world == "noisy" else ()))),
    )
}
for name, label in (
    ("rl_et", "ET-Agent"), (SPARSE, "entropy, sparse"), (DENSE, "entropy, dense"), (MARKS[0], "random marks"),
    (MARKS[1], "oracle marks"), (MARKS[2], "marks of a frozen model"),
):  # fmt: skip
    for at in ("", "_plain"):
        if name + at in VARIANTS:
            VARIANTS[name + at] = VARIANTS[name + at]._replace(label=label)

# ---------------------------------------------------------------------------------------------------- reproduction


class Size(NamedTuple):
    """How much the reproduction does."""

    train: int  # questions of the six plain families
    sums: int  # running sums to train on
    held_out: int  # questions of each kind
    steps: int  # of each RL run
    round_steps: int  # of each round of the curriculum, and of the run that data refinement looks at
    evolve: int  # questions of the SFT samples and of the flywheel
    select: int  # questions sampled before each round of the curriculum, which keeps half of them
    sft: int  # steps
    warm: int  # steps of fine-tuning on the warm-up set


SIZES = {
    "reproduce": Size(2000, 1600, 600, 80, 30, 240, 400, 60, 400),
    "quick": Size(240, 60, 120, 6, 3, 24, 36, 6, 6),
}
ROUNDS = 3


def reproduction(kind: str, n: Size) -> list[str]:
    """Declare the variants of the reproduction at a size, KIND_STAGE and KIND_sums_STAGE; returns their names."""
    WORLDS[kind] = World(",".join(PLAIN), train=n.train, held_out=n.held_out, fresh=True)
    WORLDS[f"{kind}_sums"] = World("running_sum", train=n.sums, held_out=n.held_out, fresh=True)
    names = []

    def plain(name: str, label: str, *stages: Stage, **evaluate: Any) -> None:
        names.append(declare(f"{kind}_{name}", kind, *stages, label=label, **evaluate))

    def sums(name: str, label: str, *stages: Stage, **evaluate: Any) -> None:
        names.append(declare(f"{kind}_sums_{name}", f"{kind}_sums", *stages, label=label, **evaluate))

    # ET-Agent whole: SFT on right samples, flywheel, RFT, rounds of Pareto selection and RL [2601.06860; PAPERS A]
    evolve = {"critic": "rule", "limit": n.evolve, "rft_select": "all"}
    fresh = evolve | {"rounds": 0, "num_generations": 4}
    start = Stage("samples", "flywheel", fresh, 0.5), sft("sft", "{samples}/rft.jsonl", n.sft)
    evolved = Stage("flywheel", "flywheel", evolve | {"num_generations": 2}, 1.5)
    tuned = *start, evolved, sft("rft", "{flywheel}/rft.jsonl", n.sft)
    flags = {"limit": n.select, "num_questions": n.select // 2, "select_generations": 8, "max_steps": n.round_steps}
    rounds = *tuned, Stage("curriculum", "curriculum", {**ET, **flags, "rounds": ROUNDS}, 5.5)
    sparse = {"reward": "entropy_sparse", "segment": "reasoning", **KL}
    dense = sparse | {"reward": "entropy_dense", "advantage": "entropy_dense"}
    plain("base", "base model")
    plain("outcome_rl", "GRPO, right answers only", rl(n.steps, "outcome_rl", **NO_BEHAVIOUR))
    plain("et_agent", "GRPO, ET-Agent's reward", rl(n.steps, "et_agent", **ET))
    plain("sft", "ET-Agent: SFT on its samples", *start)
    plain("rft", "ET-Agent: flywheel and RFT", *tuned)
    for r in range(1, ROUNDS + 1):
        at = {"model_name_or_path": f"{{curriculum}}/round-{r}/rl"}
        plain(f"rl_round_{r}", f"ET-Agent: RL round {r}", *rounds, **at)
    plain("entropy_sparse", "GRPO, sparse entropy reward", rl(n.steps, "entropy_sparse", **sparse))
    plain("entropy_dense", "GRPO, dense entropy reward", rl(n.steps, "entropy_dense", **dense))

    # AutoTool: warm-up, data refinement by two moments of a short RL run, RL [2603.13348; PAPERS B]
    at = {"reward": "autotool", "learning_rate": AT_RATE}
    warmed = warm("majority", 0, n.warm)
    moments = enumerate(("{warm}", "{probing}"))
    probes = [Stage(f"epoch_{i}", "rollout", {"model_name_or_path": model}, 1.5) for i, model in moments]
    flags = {"trajectories": ["{epoch_0}", "{epoch_1}"], "data": "{train}", "num_questions": n.sums // 2}
    kept = *warmed, rl(n.round_steps, "probing", **at), *probes, Stage("refine", "refine", flags, 0.2)
    from_warm, steady = {"model_name_or_path": "{warm}"}, {"data": "{refine}"}
    constraint = REGULARISERS["decoupled"]
    sums("base", "base model")
    sums("think", "base, always thinking", mode="think")
    sums("no_think", "base, never thinking", mode="no_think")
    sums("autotool_warmup", "AutoTool: warm-up", *warmed)
    sums("autotool", "AutoTool: warm-up, RL", *kept, rl(n.steps, "autotool", **at, **from_warm, **steady, **constraint))
    sums("unrefined", "… on all sums", *warmed, rl(n.steps, "unrefined", **at, **constraint))
    sums("unconstrained", "… without constraint", *kept, rl(n.steps, "unconstrained", **at, **from_warm, **steady))
    no_warmup = rl(n.steps, "no_warmup", **at, **steady, model_name_or_path="{base}")
    sums("no_warmup", "… from the base, without constraint", *kept, no_warmup)
    return names


REPRODUCTION = {kind: reproduction(kind, size) for kind, size in SIZES.items()}
