"""The picture of the loss."""

import numpy as np
import pytest
from PIL import Image

from mgllava.training.loss_plot import plot_losses

pytest.importorskip("matplotlib")
# The first two colors of matplotlib: training, evaluation.
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def pixels_of(path, color):
    image = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return np.argwhere(np.abs(image - color).max(-1) < 12)


def test_falling_losses_are_drawn_falling(tmp_path):
    history = [{"step": step, "loss": 5 - step / 25} for step in range(1, 101)]
    history += [{"step": 50, "eval_loss": 4.0}, {"step": 100, "eval_loss": 3.9}, {"step": 100, "train_runtime": 1.0}]
    path = plot_losses(history, tmp_path / "loss.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]
    training = pixels_of(path, BLUE)
    (first_row, _), (last_row, _) = training[training[:, 1].argmin()], training[training[:, 1].argmax()]
    assert last_row - first_row > Image.open(path).height / 3
    assert len(pixels_of(path, ORANGE)) > 0


def test_without_evaluation_there_is_one_curve(tmp_path):
    path = plot_losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path / "loss.png")
    assert len(pixels_of(path, BLUE)) > 0
    assert len(pixels_of(path, ORANGE)) == 0


def test_a_single_loss_is_visible(tmp_path):
    path = plot_losses([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}], tmp_path / "loss.png")
    middle = Image.open(path).width / 2
    for color in (BLUE, ORANGE):
        assert any(abs(column - middle) < middle / 8 for _, column in pixels_of(path, color))


def test_without_losses_there_is_no_picture(tmp_path):
    assert plot_losses([{"step": 1, "train_runtime": 3.0}], tmp_path / "loss.png") is None
    assert not list(tmp_path.iterdir())
