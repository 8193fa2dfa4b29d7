"""Commands print no irrelevant warnings."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

from mgllava.noise import hide_noise

ROOT = Path(__file__).parents[1]


def test_only_the_known_messages_are_hidden(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_noise()
        hide_noise()
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
        logger.warning("Failed to load CUDA.")
        for category in (FutureWarning, UserWarning):
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed.", category, stacklevel=1)
        warnings.warn("another is deprecated", FutureWarning, stacklevel=1)
    assert [warning.category for warning in shown] == [UserWarning, FutureWarning]
    assert [record.getMessage() for record in caplog.records] == ["Failed to load CUDA."]


def test_chat_prints_one_progress_bar_and_no_warnings(tmp_path):
    command = [sys.executable, "-m", "mgllava", "chat", str(ROOT / "small_world" / "model")]
    done = subprocess.run(
        [*command, "--image", str(ROOT / "examples" / "shapes.jpg")],
        input="What color is the heart?\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    shown = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    bars = [line for line in shown if "%|" in line]
    assert len({line.rpartition("/")[0].rpartition("|")[0].partition(":")[0] for line in bars}) <= 1
    assert sum("100%" in line for line in bars) <= 1
    # The other lines are about the image: its size, the table of its boxes, the file they are drawn to.
    # 5.16 warns of control tokens.
    rest = [line for line in shown if line not in bars and "control tokens" not in line]
    assert "320 x 240 pixels" in rest[0] and rest[-1] == "drawn in chat-boxes/shapes.jpg", rest
