"""Plot the loss of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgllava.atomic_files import replacing
from mgllava.extras import import_extra


def plot_losses(history: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Plot the training loss over the steps and, if there is one, the evaluation loss.

    Args:
        history (`Sequence[Mapping]`): `trainer.state.log_history`.
        path (`str` or `Path`): PNG file to write.

    Returns:
        `Path`, *optional*: The file; `None` if nothing was logged.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    curves = {
        label: [(entry["step"], entry[key]) for entry in history if key in entry]
        for label, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    if not curves["training"]:
        return None
    # Without pyplot, which would look for a display.
    matplotlib = import_extra("matplotlib.figure", "train", "The plot of the loss")
    figure = matplotlib.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, points in curves.items():
        if points:
            marker = "o" if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(Path(path)) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return Path(path)


__all__ = ["plot_losses"]
