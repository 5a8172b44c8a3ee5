"""How figures are drawn and saved: without a display, matplotlib loaded only when there is something to draw."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib's pyplot on the backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and close it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot().close(figure)


def calls_and_correctness(axis: Any, points: dict[str, tuple[float, float]], sizes: list[float] | None = None) -> None:
    """One named point per model: its tool calls and its correctness."""
    x, y = zip(*points.values()) if points else ((), ())
    axis.scatter(x, y, s=sizes or 18, c=[f"C{i}" for i in range(len(points))], alpha=0.6)
    for name, point in points.items():
        axis.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("tool calls per question")
    axis.set_ylabel("correctness")
