"""What the reproduction (experiments/chains.py) and the claims (experiments/claim_cells.py) share: how they sample and what counts as hard.

Their runs differ in length and in what stands before RL; only rows of one of the two can be compared.
"""

from statistics import fmean

from core.trajectory import Trajectory, groups_of
from eval.grader import grade

EVAL_SEED = 10_000  # of held-out questions, their noise and their samples; training uses small seeds
PROBES = 8  # no-think samples of the base per held-out sum
HARD = 0.5  # a sum is hard if a smaller share of them is right
SAMPLING = {  # flags of every script that samples; times are generous: a busy machine must not change a number
    "search_top_k": 1,
    "max_completion_length": 256,
    "python_timeout": 60.0,
    "max_tool_seconds": 600.0,
}
RL_SAMPLING = {"rollout_dtype": "float32"}  # of every RL run: samples from merged weights, a quarter faster


def hard_ids(probes: list[Trajectory]) -> set[str]:
    """Questions that fewer than HARD of their samples answer right."""
    return {g[0].question_id for g in groups_of(probes) if fmean(grade(t)[0] for t in g) < HARD}
