"""experiments/frontier.py: heights above a price's curve by hand, and how they vary over seeds.

    python -m pytest tests/test_frontier.py
"""

import numpy as np
import pytest

from experiments.cells import plan_cell
from experiments.claims import Args
from experiments.frontier import draw_frontier, frontier_table, height
from experiments.variants import FRONTIERS


def block(calls, correct, seeds=2, questions=10):
    return np.stack([np.full((seeds, questions), calls), np.full((seeds, questions), correct)])


def test_height_by_hand():
    """Prices at (1, .6) and (2, .8): the line is at .7 for 1.5 calls; beyond the ends it is level."""
    prices = np.stack([block(2.0, 0.8), block(1.0, 0.6)])  # in any order
    for calls, correct, expected in ((1.5, 0.75, 0.05), (1.5, 0.6, -0.1), (3.0, 0.8, 0.0), (0.5, 0.6, 0.0)):
        found = height(block(calls, correct), prices, resamples=50)
        assert found == pytest.approx((expected, expected, expected))
    assert np.isnan(height(block(1.5, 0.7, seeds=1), prices[:, :, :1]).low)


def test_a_seed_that_shifts_everything_does_not_widen_the_interval():
    """The comparison is paired: what a seed or a question does to method and prices alike cancels."""
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 0.2, (4, 1)) + rng.normal(0, 0.2, 50)  # of correctness, by seed and question
    together = np.stack([np.zeros_like(shift), shift])
    method, prices = block(1.5, 0.75, 4, 50) + together, np.stack([block(n, 0.4 + 0.2 * n, 4, 50) for n in (1, 2)])
    found = height(method, prices + together, resamples=200)
    assert found == pytest.approx((0.05, 0.05, 0.05))
    alone = height(method, prices, resamples=200)
    assert alone.high - alone.low > 0.1


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="a frontier needs"):
        height(block(1, 1), np.stack([block(1, 1)]))


def test_every_variant_of_a_frontier_is_declared_and_plans():
    args = Args(list=True)
    for prices, methods in FRONTIERS.values():
        assert len(prices) == 6 and len({plan_cell(v, 0, args).files["held_out"] for v in (*prices, *methods)}) == 1


def test_table_and_figure_from_rows(tmp_path):
    name, (prices, methods) = next(iter(FRONTIERS.items()))
    rows = {}
    for k, v in enumerate((*prices, methods[0])):
        for seed in range(2):
            rows[v, seed] = {"questions": {"calls": [k] * 4, "correctness": [0.1 * k] * 4}}
    rows[methods[0], 0]["questions"] = rows[methods[0], 1]["questions"] = {"calls": [2] * 4, "correctness": [0.3] * 4}
    lines = {line[1]: line for line in frontier_table(rows, 2) if line[0] == name}
    first = next(iter(lines.values()))
    assert first[2:5] == [2, 2.0, pytest.approx(0.3)] and first[5].startswith("+0.100") and first[6] == "above"
    assert all(line[6] == "not run" for line in list(lines.values())[1:])
    draw_frontier(tmp_path / "frontier.png", rows)
    assert (tmp_path / "frontier.png").stat().st_size > 5000
