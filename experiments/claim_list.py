"""What the three papers claim, as data: which variant is compared with which, on what, by how much they have to differ.

experiments/variants.py declares the variants. A claim's thresholds were written before its own rows; some claims
were added when rows of others were known (git log).
"""

from typing import NamedTuple

from experiments.variants import (
    CAPS,
    DENSE,
    DENSE_WITH_ANSWER,
    FIRST_RUNS,
    MARGINS,
    PENALTIES,
    REGULARISERS,
    RUNS,
    SEGMENTS,
    SELECTORS,
    SHARES,
    SIGMAS,
    SPARSE,
    SPARSE_WITH_ANSWER,
    WITH_ANSWER,
)  # fmt: skip


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
        "calls", -1, 0.3, MARGIN, tuple((SPARSE + w, "en_correct" + w) for w in RUNS)
        + tuple((SPARSE_WITH_ANSWER + w, "en_correct" + w) for w in FIRST_RUNS)),
    "en_dense": Claim("2602.02050, dense reward", "the dense entropy reward raises correctness over the outcome reward",
        "correctness", +1, 0.005, None, tuple((DENSE + w, "en_correct" + w) for w in RUNS)
        + tuple((DENSE_WITH_ANSWER + w, "en_correct" + w) for w in FIRST_RUNS)),
    "at_collapse": Claim(
        "2603.13348, finding", "GRPO without entropy term stops thinking on hard items (asymmetric or plain reward)",
        "thinking|hard", -1, 0.3, None,
        tuple((f"at_{s}_{kind}", "at_base") for s in ENDS for kind in ("none_none", "correct"))),
    "at_autotool": Claim("2603.13348, method", "warm-up and decoupled constraint keep thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("majority_decoupled", "none_none")),
    "et_against_start": Claim(
        "2601.06860, main table", "training with the behaviour reward raises efficiency over the model it starts from",
        "efficiency", +1, 0.05, MARGIN, (("rl_et", "base"), ("rl_et_plain", "base_plain"))),
    "en_against_start": Claim(
        "2602.02050, main table", "the sparse entropy reward cuts tool calls below those of the model it starts from",
        "calls", -1, 0.1, MARGIN, tuple((SPARSE + w, "en_base" + w.removesuffix("_long")) for w in RUNS)
        + tuple((SPARSE_WITH_ANSWER + w, "en_base" + w) for w in FIRST_RUNS)),
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
    "et_fixed_sigma": Claim("2601.06860, ablations", "σ that does not fall from round to round costs correctness",
        "correctness", -1, 0.01, None, (("rft_curriculum_fixed", "rft_curriculum_pareto"),)),
    # --- what does it
    "en_sparse_controls": Claim(
        "control", "the sign of the entropy change does more than random marks, a frozen model's, or a price on calls",
        "efficiency", +1, 0.0, MARGIN, tuple((SPARSE, other) for other in
              ("en_sparse_random", "en_sparse_reference", *(f"en_price_{p}" for p in PENALTIES)))),
    "en_sparse_oracle": Claim(
        "control", "marks that know which calls are needed do better than the sign of the entropy change",
        "efficiency", +1, 0.0, MARGIN, (("en_sparse_oracle", SPARSE),)),
    "en_dense_calls": Claim(
        "our expectation", "the dense reward carries no pressure against calling: more calls than the outcome reward",
        "calls", +1, 0.0, MARGIN, tuple((DENSE + w, "en_correct" + w) for w in RUNS)
        + tuple((DENSE_WITH_ANSWER + w, "en_correct" + w) for w in FIRST_RUNS)),
    "at_warmup": Claim("2603.13348, sec. on warm-up", "the warm-up alone keeps thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("majority_none", "none_none") + shares("any_none", "none_none", ENDS)),
    "at_constraint": Claim("2603.13348, method", "the decoupled constraint alone keeps thinking on hard items",
        "thinking|hard", +1, 0.3, MARGIN, shares("none_decoupled", "none_none")),
    "at_constraint_after_warmup": Claim(
        "2603.13348, method", "the decoupled constraint adds thinking on hard items to what the warm-up keeps",
        "thinking|hard", +1, 0.05, MARGIN, shares("majority_decoupled", "majority_none")),
    "at_easy": Claim("2603.13348, main table", "AutoTool thinks less on easy items than the base does",
        "thinking|easy", -1, 0.1, MARGIN, tuple((f"at_{s}_majority_decoupled", "at_base") for s in SHARES)),
    "at_modes_matter": Claim("2603.13348, main table", "AutoTool is more accurate than a model that never thinks",
        "correctness", +1, 0.05, None, shares("majority_decoupled", "always_no_think")),
    "at_length_penalty": Claim("2603.13348, finding", "a price on length does not cure the collapse",
        "thinking|hard", -1, 0.3, None, tuple((f"at_{s}_length", "at_base") for s in ENDS)),
    "et_beats_price": Claim("control", "the behaviour reward is more than a price on calls",
        "efficiency", +1, 0.0, MARGIN, tuple(("rl_et", f"rl_price_{p}") for p in PENALTIES)),
    "et_beats_cap": Claim("control", "the behaviour reward is more than a hard cap on calls",
        "efficiency", +1, 0.0, MARGIN, tuple(("rl_et", f"rl_cap_{cap}") for cap in CAPS)),
    "et_branching": Claim("2507.19849", "branching where entropy rises teaches more than branching at random or none",
        "efficiency", +1, 0.0, MARGIN, (("rl_et_arpo", "rl_et_random"), ("rl_et_arpo", "rl_et"))),
    "et_hint": Claim("2601.06860, sec. 4.1", "hint injection leaves fewer questions with too few calls",
        "insufficient", -1, 0.0, MARGIN, (("rft", "rft_no_hint"),)),
    "et_critic": Claim("control", "a critic that knows the needed calls beats one that reads entropies only",
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
    "at_decoupling": Claim("2603.13348, ablations", "two coefficients are better than one for both modes",
        "correctness", +1, 0.01, None, tuple(
            pair for rule in ("majority", "none") for pair in shares(f"{rule}_decoupled", f"{rule}_adaptive", ENDS))),
    "at_adaptation": Claim("2603.13348, ablations", "a learned coefficient is better than any fixed one",
        "correctness", +1, 0.01, None, tuple(pair for rule in ("majority", "none")
            for other in ("decoupled_frozen", "constant_0.01", "constant_0.1", "constant_0.3")
            for pair in shares(f"{rule}_decoupled", f"{rule}_{other}", ENDS))),
    "at_short_coefficient": Claim(
        "2603.13348, ablations", "no entropy term on answers without thinking is better than a small one",
        "correctness", +1, 0.0, None, tuple(pair for rule in ("majority", "none")
            for pair in shares(f"{rule}_decoupled", f"{rule}_decoupled_short", ENDS))),
    "at_label_rule": Claim(
        "control", "labels by majority rather than by any right sample keep more thinking on hard items",
        "thinking|hard", +1, 0.05, MARGIN, tuple(pair for regulariser in REGULARISERS
            for pair in shares(f"majority_{regulariser}", f"any_{regulariser}", ENDS))),
    "en_margin": Claim("ours", "a margin cuts calls further, whatever the segment",
        "calls", -1, 0.1, MARGIN, tuple((f"en_sparse_{segment}_{margin}", f"en_sparse_{segment}_0.0")
            for segment in SEGMENTS for margin in MARGINS[1:])),
    "en_segment": Claim(
        "ours", "reasoning without the call's own tokens and without the answer is the segment that works",
        "efficiency", +1, 0.02, MARGIN,
        tuple((SPARSE, f"en_sparse_{segment}_0.0") for segment in (*SEGMENTS[1:], WITH_ANSWER))),
    "en_dense_variants": Claim("ours", "the dense reward raises correctness whatever segment and margin",
        "correctness", +1, 0.005, None, tuple(
            (f"en_dense_{segment}_{margin}", "en_correct") for segment in SEGMENTS for margin in MARGINS
            if (segment, margin) != ("reasoning", 0.0))),
}  # fmt: skip
