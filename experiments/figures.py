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
