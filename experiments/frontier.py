"""The price frontier: does a method beat a plain price on tool calls? Each method as a point against the price's curve.

GRPO with the reward S − λ n, n calls, gives one policy for every price λ: together they are a curve of correctness over
calls. A method is worth its code if it lies above that curve. `height` is the vertical distance, in correctness, at the
method's own number of calls; between two prices the curve is a straight line, beyond its ends it is level.
"""

from pathlib import Path
from statistics import fmean

import numpy as np

from eval.intervals import T_975, Interval
from experiments.cells import column
from experiments.figures import pyplot, save
from experiments.variants import FRONTIERS, VARIANTS

Rows = dict[tuple[str, int], dict]  # (variant, seed) -> its row of rows.jsonl


def height(method: np.ndarray, prices: np.ndarray, resamples: int = 2000, seed: int = 0) -> Interval:
    """Height of a method above the price's curve, with a 95 % interval over seeds and questions.

    method: (2, S, Q) calls and correctness per seed and question; prices: (P, 2, S, Q) of P >= 2 prices, the same seeds
    and questions. The interval is a two-level bootstrap of the whole comparison, curve included, widened to Student's t
    over the seeds where that is wider. ValueError if the shapes do not go together.
    """
    if prices.ndim != 4 or len(prices) < 2 or prices.shape[1:] != method.shape:
        raise ValueError(f"a frontier needs (P >= 2, 2, S, Q) prices for a (2, S, Q) method, not {prices.shape}")
    every = np.concatenate([method[None], prices])  # (P + 1, 2, S, Q)
    seeds, questions = every.shape[2:]
    per_seed = every.mean(axis=3)  # (P + 1, 2, S)
    mean = _above(per_seed.mean(axis=2))
    if seeds == 1:
        return Interval(mean, float("nan"), float("nan"))
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        share = rng.multinomial(questions, np.full(questions, 1 / questions)) / questions  # (Q,)
        drawn = rng.integers(seeds, size=seeds)
        found.append(_above((every[:, :, drawn] @ share).mean(axis=2)))
    low, high = np.quantile(found, (0.025, 0.975))
    spread = np.std([_above(per_seed[:, :, s]) for s in range(seeds)], ddof=1)
    reach = T_975[min(seeds - 1, len(T_975)) - 1] * spread / seeds**0.5
    return Interval(mean, float(min(low, mean - reach)), float(max(high, mean + reach)))


def _above(points: np.ndarray) -> float:
    """(P + 1, 2) mean calls and correctness, the method first: its height above the line through the others."""
    (calls, correct), curve = points[0], points[1:][np.argsort(points[1:, 0])]
    return float(correct - np.interp(calls, curve[:, 0], curve[:, 1]))


def frontier_table(rows: Rows, seeds: int) -> list[list]:
    """A line per method of FRONTIERS: world, method, seeds, calls, correctness, height with interval, and a remark."""
    lines = []
    for name, (prices, methods) in FRONTIERS.items():
        for variant in methods:
            shared = [s for s in range(seeds) if all((v, s) in rows for v in (variant, *prices))]
            if not shared:
                lines.append([name, VARIANTS[variant].label, 0, "", "", "", "not run"])
                continue
            found = np.array([_values(v, shared, rows) for v in (variant, *prices)])  # (P + 1, 2, S, Q)
            calls, correct = found[0].mean(axis=(1, 2))
            ends = found[1:, 0].mean(axis=(1, 2))
            above = height(found[0], found[1:])
            word = "above" if above.low > 0 else "below" if above.high < 0 else "on the curve, as far as seen"
            if not ends.min() <= calls <= ends.max():
                word += f"; its calls are beyond the prices' {ends.min():.2f} to {ends.max():.2f}"
            shown = f"{above.mean:+.3f}" + ("" if np.isnan(above.low) else f" [{above.low:+.3f}, {above.high:+.3f}]")
            lines.append([name, VARIANTS[variant].label, len(shared), float(calls), float(correct), shown, word])
    return lines


def _values(variant: str, seeds: list[int], rows: Rows) -> list[list[list[float]]]:
    return [[column(rows[variant, s], metric) for s in seeds] for metric in ("calls", "correctness")]


def draw_frontier(path: Path, rows: Rows) -> None:
    """A panel per frontier: the curve of the prices with their λ, and the methods as named points; means over seeds."""
    panels = {name: parts for name, parts in FRONTIERS.items() if any(v == w for v in parts[0] for w, _ in rows)}
    figure, axes = pyplot().subplots(1, max(len(panels), 1), figsize=(5.5 * max(len(panels), 1), 4.5), squeeze=False)
    for axis, (name, (prices, methods)) in zip(axes[0], panels.items()):
        curve = sorted(point for v in prices if (point := _mean_point(v, rows)))
        axis.plot(*zip(*curve), "o-", color="0.6", zorder=1, label="a price on calls")
        for v in prices:
            if point := _mean_point(v, rows):
                axis.annotate(f"λ {v.rpartition('_')[2]}", point, fontsize=7, color="0.4", xytext=(3, -9),
                              textcoords="offset points")  # fmt: skip
        for k, v in enumerate(methods):
            if point := _mean_point(v, rows):
                axis.scatter(*point, color=f"C{k}", zorder=2)
                axis.annotate(VARIANTS[v].label, point, fontsize=8, color=f"C{k}", xytext=(4, 3),
                              textcoords="offset points")  # fmt: skip
        axis.set_title(f"Does it beat a price on calls? {name}", fontsize=10)
        axis.set_xlabel("tool calls per question")
        axis.set_ylabel("correctness")
    save(figure, path)


def _mean_point(variant: str, rows: Rows) -> tuple[float, float] | None:
    mine = [row for (name, _), row in rows.items() if name == variant]
    return tuple(fmean(fmean(column(row, m)) for row in mine) for m in ("calls", "correctness")) if mine else None
