"""Which checkpoints count as complete."""

import json
import logging

import pytest

from mgllava.training.checkpoints import clear_incomplete, last_complete_checkpoint, mark_complete


def save(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "part").mkdir(parents=True)
    (checkpoint / "part" / "a.bin").write_bytes(b"123")
    (checkpoint / "state.json").write_text("{}")
    mark_complete(checkpoint)
    return checkpoint


def test_the_newest_complete_checkpoint_is_that_of_the_most_steps(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path) is last_complete_checkpoint(tmp_path / "absent") is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "other-300"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-100"
    assert not caplog.text
    files = json.loads((tmp_path / "checkpoint-9" / "complete.json").read_text())
    assert files == {"part/a.bin": 3, "state.json": 2}


@pytest.mark.parametrize("damage", ["removed", "shortened", "longer", "marker", "no marker", "more files", "none"])
def test_a_checkpoint_is_complete_if_its_files_have_their_sizes(tmp_path, damage, caplog):
    checkpoint = save(tmp_path, 2)
    file, marker = checkpoint / "part" / "a.bin", checkpoint / "complete.json"
    {
        "removed": file.unlink,
        "shortened": lambda: file.write_bytes(b"12"),
        "longer": lambda: file.write_bytes(b"1234"),
        "marker": lambda: marker.write_text("{"),
        "no marker": marker.unlink,
        "more files": lambda: (checkpoint / "more").touch(),
        "none": lambda: (checkpoint / "complete.json.ab.partial").touch(),
    }[damage]()
    is_complete = damage in ("more files", "none")
    assert last_complete_checkpoint(tmp_path) == (checkpoint if is_complete else None)
    assert ("checkpoint-2 is skipped: it is incomplete" in caplog.text) == (not is_complete)


def test_a_removal_that_is_interrupted_leaves_no_complete_checkpoint(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 2)

    def fail(path):
        raise OSError("busy")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="busy"):
        patch.setattr("mgllava.training.checkpoints.shutil.rmtree", fail)
        clear_incomplete(checkpoint)
    assert (checkpoint / "state.json").exists() and last_complete_checkpoint(tmp_path) is None
    for _ in range(2):
        clear_incomplete(checkpoint)
        assert not checkpoint.exists()
