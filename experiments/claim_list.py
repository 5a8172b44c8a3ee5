"""The claims of the three papers as data: worlds, variants (chains of our scripts) and what is compared with what.

Thresholds were written before any of the runs. In a stage's flags "{name}" stands for an earlier stage's output, and
{train}, {held_out}, {index}, {base}, {seed} for what experiments/claim_cells.py fills in; it also adds the flags that all share.
"""

from typing import Any, NamedTuple

from data.world.facts import PLAIN


class World(NamedTuple):
    """Where variants are trained and evaluated; easy_share: share of short sums in training (None: no sums there).

    Whether a held-out item is hard is another matter: there the base was asked (claim_cells.hard_ids).
    """

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
    "plain": World(",".join(PLAIN), 0.0),
    **{f"sums_{share}": World("running_sum", 0.0, share / 100) for share in (35, 55, 75, 85)},
}
VARIANTS: dict[str, Variant] = {}


def declare(name: str, world: str, *stages: Stage, **evaluate: Any) -> str:
    """Enter a variant; returns its name."""
    VARIANTS[name] = Variant(world, stages, evaluate)
    return name


def rl(steps: int = 80, **flags: Any) -> Stage:
    """GRPO on the world's training questions unless `data` says otherwise."""
    return Stage("rl", "train_rl", {"max_steps": steps, "save_steps": 10, **flags}, steps / 40)


# ---------------------------------------------------------------------------------------------------- ET-Agent

ET = {"reward": "et_agent", "sigma_tool": 0.5, "sigma_length": 0.1}
NO_BEHAVIOUR = ET | {"sigma_tool": 0.0, "sigma_length": 0.0}  # S and the format term, with the same weights as in ET
SFT = {"per_device_train_batch_size": 16, "max_steps": 60, "save_steps": 20}
FLYWHEEL = {"critic": "rule", "limit": 300}
SELECTORS = ("pareto", "random", "s_corr_only", "s_tool_only")
SIGMAS = {f"sigma_{sigma}_{advantage}": (sigma, advantage) for sigma in (0.1, 0.5, 2.0)
          for advantage in ("grpo", "grpo_no_std")}  # fmt: skip
PENALTIES = (0.05, 0.1, 0.3)
CAPS = (2, 3)


def rft(**flags: Any) -> tuple[Stage, Stage]:
    """Flywheel and fine-tuning on its RFT set; the same number of SFT examples whatever the flywheel found."""
    flywheel = Stage("flywheel", "flywheel", {**FLYWHEEL, **flags}, 1.5)
    return flywheel, Stage("rft", "train_sft", {**SFT, "data": "{flywheel}/rft.jsonl"}, 0.5)


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
for cap in CAPS:
    calls = {"max_tool_calling_iterations": cap}
    declare(f"rl_cap_{cap}", "noisy", rl(**NO_BEHAVIOUR, **calls), **calls)
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
    "decoupled_frozen": {"entropy_regulariser": "decoupled", "entropy_target": "relative", "beta_lr": 0.0},
    "decoupled_strong": {"entropy_regulariser": "decoupled", "entropy_target": "relative", "beta_long": 0.1},
}
AT_RATE = 5e-4  # at 2e-3 every variant had decided for one mode within 20 steps, in one trial each


def at_rl(**flags: Any) -> Stage:
    """GRPO on sums, the same steps and learning rate in every cell."""
    return rl(AT_STEPS, learning_rate=AT_RATE, **flags)


REFINEMENTS = ("epochs_low", "rollouts_low", "rollouts_high", "random")
PROBE_STEPS = (10, 20, 30, 40)  # checkpoints of a short run that data refinement looks at


def warm(rule: str) -> tuple[Stage, ...]:
    """The warm-up set and SFT on it; none = RL from the base."""
    if rule == "none":
        return ()
    builder = Stage("warmup", "warmup", {"num_generations": 8, "limit": 1200, "label_rule": rule}, 1.0)
    flags = {**SFT, "max_steps": 400, "learning_rate": 2e-3, "data": "{warmup}/sft.jsonl"}
    return builder, Stage("warm", "train_sft", flags, 1.0)


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
MARGINS = (0.0, 0.02, 0.1, 0.3)
KL = {"beta": 1e-3}
SPARSE, DENSE = "en_sparse_reasoning_0.0", "en_dense_reasoning_0.0"
RUNS = ("", "_plain", "_long")  # the main rows: noisy, plain, and noisy with more steps
LONG_STEPS = 300
THINK = {"mode": "think"}  # as the models of the paper; without thinking, the thought between two calls is empty


def entropy(name: str, world: str = "noisy", **flags: Any) -> str:
    """RL with the KL to the start that both entropy rewards have, thinking always; evaluated alike."""
    dense = {"advantage": "entropy_dense"} if flags["reward"] == "entropy_dense" else {}
    return declare(name, world, rl(**KL, **THINK, **dense, **flags), **THINK)


for world in ("noisy", "plain"):
    suffix = "" if world == "noisy" else "_plain"
    declare(f"en_base{suffix}", world, **THINK)
    entropy(f"en_correct{suffix}", world, reward="correct")
    for segment in SEGMENTS if world == "noisy" else SEGMENTS[:1]:
        for margin in MARGINS if world == "noisy" else MARGINS[:1]:
            for kind in ("sparse", "dense"):
                flags = {"reward": f"entropy_{kind}", "segment": segment, "delta_margin": margin}
                entropy(f"en_{kind}_{segment}_{margin}{suffix}", world, **flags)
for name, reward in (("en_correct", "correct"), (SPARSE, "entropy_sparse"), (DENSE, "entropy_dense")):
    entropy(f"{name}_long", reward=reward, steps=LONG_STEPS)
for indicator in ("random", "oracle", "reference"):
    entropy(f"en_sparse_{indicator}", reward="entropy_sparse", indicator=indicator)
for penalty in PENALTIES:
    entropy(f"en_price_{penalty}", reward="calls_penalty", call_penalty=penalty)

# ---------------------------------------------------------------------------------------------------- claims


def shares(first: str, second: str, over: tuple[int, ...] = SHARES) -> tuple[tuple[str, str], ...]:
    """The pair at_SHARE_first, at_SHARE_second for every share of easy items."""
    return tuple((f"at_{share}_{first}", f"at_{share}_{second}") for share in over)


ENDS = (35, 85)
CLAIMS = {
    # --- main rows
    "et_behaviour_reward": Claim(
        "2601.06860, ablations", "the behaviour reward raises efficiency over the outcome reward at equal correctness",
        "efficiency", +1, 0.02, MARGIN, (("rl_et", "rl_correct"), ("rl_et_plain", "rl_correct_plain"))),
    "en_sparse": Claim(
        "2602.02050, sparse reward", "the sparse entropy reward cuts tool calls at non-inferior correctness",
        "calls", -1, 0.3, MARGIN, tuple((SPARSE + w, "en_correct" + w) for w in RUNS)),
    "en_dense": Claim(
        "2602.02050, dense reward", "the dense entropy reward raises correctness over the outcome reward",
        "correctness", +1, 0.005, None, tuple((DENSE + w, "en_correct" + w) for w in RUNS)),
    "at_collapse": Claim(
        "2603.13348, finding", "GRPO without entropy term stops thinking on hard items (asymmetric or plain reward)",
        "thinking|hard", -1, 0.3, None,
        tuple((f"at_{s}_{kind}", "at_base") for s in ENDS for kind in ("none_none", "correct"))),
    "at_autotool": Claim(
        "2603.13348, method", "warm-up and decoupled constraint keep thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("majority_decoupled", "none_none")),
    "et_against_start": Claim(
        "2601.06860, main table", "training with the behaviour reward raises efficiency over the model it starts from",
        "efficiency", +1, 0.05, MARGIN, (("rl_et", "base"), ("rl_et_plain", "base_plain"))),
    "en_against_start": Claim(
        "2602.02050, main table", "the sparse entropy reward cuts tool calls below those of the model it starts from",
        "calls", -1, 0.1, MARGIN, tuple((SPARSE + w, "en_base" + w.removesuffix("_long")) for w in RUNS)),
    "at_fewer_tokens": Claim(
        "2603.13348, main table", "AutoTool writes fewer tokens than a model that always thinks, no less accurate",
        "tokens", -1, 1.0, MARGIN, shares("majority_decoupled", "always_think")),
    "et_flywheel": Claim(
        "2601.06860, ablations", "edited trajectories make a better start than fresh samples, before and after RL",
        "efficiency", +1, 0.0, MARGIN, (("rft", "rft_fresh"), ("rft_rl_et", "rft_fresh_rl_et"))),
    "et_pareto": Claim(
        "2601.06860, ablations", "questions chosen by Pareto sampling teach more than as many chosen otherwise",
        "efficiency", +1, 0.0, MARGIN,
        tuple(("rft_curriculum_pareto", f"rft_curriculum_{other}") for other in SELECTORS[1:])),
    "et_fixed_sigma": Claim(
        "2601.06860, ablations", "σ that does not fall from round to round costs correctness",
        "correctness", -1, 0.01, None, (("rft_curriculum_fixed", "rft_curriculum_pareto"),)),
    # --- what does it
    "en_sparse_controls": Claim(
        "control", "the sign of the entropy change does more than random marks, a frozen model's, or a price on calls",
        "efficiency", +1, 0.0, MARGIN,
        tuple((SPARSE, other) for other in
              ("en_sparse_random", "en_sparse_reference", *(f"en_price_{p}" for p in PENALTIES)))),
    "en_sparse_oracle": Claim(
        "control", "marks that know which calls are needed do better than the sign of the entropy change",
        "efficiency", +1, 0.0, MARGIN, (("en_sparse_oracle", SPARSE),)),
    "en_dense_calls": Claim(
        "our expectation", "the dense reward carries no pressure against calling: more calls than the outcome reward",
        "calls", +1, 0.0, MARGIN, tuple((DENSE + w, "en_correct" + w) for w in RUNS)),
    "at_warmup": Claim(
        "2603.13348, sec. on warm-up", "the warm-up alone keeps thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("majority_none", "none_none") + shares("any_none", "none_none", ENDS)),
    "at_constraint": Claim(
        "2603.13348, method", "the decoupled constraint alone keeps thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("none_decoupled", "none_none")),
    "at_constraint_after_warmup": Claim(
        "2603.13348, method", "the decoupled constraint adds thinking on hard items to what the warm-up keeps",
        "thinking|hard", +1, 0.05, MARGIN, shares("majority_decoupled", "majority_none")),
    "at_easy": Claim(
        "2603.13348, main table", "AutoTool thinks less on easy items than the base does",
        "thinking|easy", -1, 0.1, MARGIN, tuple((f"at_{s}_majority_decoupled", "at_base") for s in SHARES)),
    "at_modes_matter": Claim(
        "2603.13348, main table", "AutoTool is more accurate than a model that never thinks",
        "correctness", +1, 0.05, None, shares("majority_decoupled", "always_no_think")),
    "at_length_penalty": Claim(
        "2603.13348, finding", "a price on length does not cure the collapse",
        "thinking|hard", -1, 0.3, None, tuple((f"at_{s}_length", "at_base") for s in ENDS)),
    "et_beats_price": Claim(
        "control", "the behaviour reward is more than a price on calls",
        "efficiency", +1, 0.0, MARGIN, tuple(("rl_et", f"rl_price_{p}") for p in PENALTIES)),
    "et_beats_cap": Claim(
        "control", "the behaviour reward is more than a hard cap on calls",
        "efficiency", +1, 0.0, MARGIN, tuple(("rl_et", f"rl_cap_{cap}") for cap in CAPS)),
    "et_branching": Claim(
        "2507.19849", "branching where entropy rises teaches more than branching at random or none",
        "efficiency", +1, 0.0, MARGIN, (("rl_et_arpo", "rl_et_random"), ("rl_et_arpo", "rl_et"))),
    "et_hint": Claim(
        "2601.06860, sec. 4.1", "hint injection leaves fewer questions with too few calls",
        "insufficient", -1, 0.0, MARGIN, (("rft", "rft_no_hint"),)),
    "et_critic": Claim(
        "control", "a critic that knows the needed calls beats one that reads entropies only",
        "efficiency", +1, 0.0, MARGIN, (("rft", "rft_entropy_critic"),)),
    "at_refinement": Claim(
        "2603.13348, ablations", "training on the steadiest questions raises accuracy over all, or random ones",
        "correctness", +1, 0.01, None,
        shares("refine_epochs_low", "majority_decoupled", ENDS) + shares("refine_epochs_low", "refine_random", ENDS)),
    "at_refinement_rollouts": Claim(
        "head-to-head of 2603.13348 and 2601.06860", "questions whose rollouts vary less teach more than the opposite",
        "correctness", +1, 0.01, None, shares("refine_rollouts_low", "refine_rollouts_high", ENDS)),
    # --- long sweeps
    "et_sigma_sweep": Claim(
        "2601.06860, sec. 5", "within one run, a fixed σ costs correctness against one that falls to 0",
        "correctness", -1, 0.01, None, tuple((name, f"{name}_falling") for name in SIGMAS)),
    "at_strong_constraint": Claim(
        "control", "the decoupled constraint keeps thinking if its coefficient starts at the best fixed value",
        "thinking|hard", +1, 0.3, MARGIN, tuple(
            (f"at_{s}_{rule}_decoupled_strong", f"at_{s}_{rule}_none") for rule in ("none", "majority") for s in ENDS)),
    "at_decoupling": Claim(
        "2603.13348, ablations", "two coefficients are better than one for both modes",
        "correctness", +1, 0.01, None, tuple(
            pair for rule in ("majority", "none") for pair in shares(f"{rule}_decoupled", f"{rule}_adaptive", ENDS))),
    "at_adaptation": Claim(
        "2603.13348, ablations", "a learned coefficient is better than any fixed one",
        "correctness", +1, 0.01, None, tuple(
            pair for rule in ("majority", "none")
            for other in ("decoupled_frozen", "constant_0.01", "constant_0.1", "constant_0.3")
            for pair in shares(f"{rule}_decoupled", f"{rule}_{other}", ENDS))),
    "at_short_coefficient": Claim(
        "2603.13348, ablations", "no entropy term on answers without thinking is better than a small one",
        "correctness", +1, 0.0, None, tuple(
            pair for rule in ("majority", "none")
            for pair in shares(f"{rule}_decoupled", f"{rule}_decoupled_short", ENDS))),
    "at_label_rule": Claim(
        "control", "labels by majority rather than by any right sample keep more thinking on hard items",
        "thinking|hard", +1, 0.05, MARGIN, tuple(
            pair for regulariser in REGULARISERS
            for pair in shares(f"majority_{regulariser}", f"any_{regulariser}", ENDS))),
    "en_margin": Claim(
        "ours", "a margin cuts calls further, whatever the segment",
        "calls", -1, 0.1, MARGIN, tuple(
            (f"en_sparse_{segment}_{margin}", f"en_sparse_{segment}_0.0")
            for segment in SEGMENTS for margin in MARGINS[1:])),
    "en_segment": Claim(
        "ours", "reasoning without the call's own tokens is the segment that works",
        "efficiency", +1, 0.02, MARGIN, tuple((SPARSE, f"en_sparse_{segment}_0.0") for segment in SEGMENTS[1:])),
    "en_dense_variants": Claim(
        "ours", "the dense reward raises correctness whatever segment and margin",
        "correctness", +1, 0.005, None, tuple(
            (f"en_dense_{segment}_{margin}", "en_correct") for segment in SEGMENTS for margin in MARGINS
            if (segment, margin) != ("reasoning", 0.0))),
}  # fmt: skip
