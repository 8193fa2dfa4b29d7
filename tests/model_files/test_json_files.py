"""JSON files from strangers, and atomic writing."""

import json
import os

import pytest

from mgllava.atomic_files import is_partial, partial_name, remove_partial, replacing
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json, try_read_json, write_json


def test_huge_files_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(ConversionError, match=r"^`llm`: .*config\.json is too large for a configuration"):
        read_json(path, "llm")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "must be JSON, but cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "must be JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_files_that_hold_no_object_are_named(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConversionError, match=said) as error:
        read_json(tmp_path / "a.json")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
    assert try_read_json(tmp_path / "a.json") is None


def test_object_is_read(tmp_path):
    write_json(tmp_path / "a.json", {"größe": [1]})
    assert read_json(tmp_path / "a.json") == try_read_json(tmp_path / "a.json") == {"größe": [1]}
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "größe": [\n    1\n  ]\n}\n'
    assert try_read_json(tmp_path / "absent.json") is None
    write_json(tmp_path / "a.json", {"name": "ö\udcff"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "ö\udcff"}


def test_messages_of_errors_in_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(MemoryError()) == "MemoryError"


def test_writing_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("new")
        raise OSError("full")
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, path.exists())))
    with replacing(path) as partial:
        partial.write_text("new")
    assert synced == [(path.stat().st_ino, False)]


@pytest.mark.parametrize("name", ["a.txt", "x" * 255, "ö" * 127, "a.0123abcd.partial", "a\nb"])
def test_incomplete_files_are_hidden_and_removed_by_their_name(tmp_path, name):
    path = tmp_path / name
    partial = partial_name(path)
    assert partial.parent == tmp_path and partial.name.startswith(".") and is_partial(partial.name)
    assert partial != partial_name(path) and not is_partial(name)
    partial.write_text("killed")
    mine = [tmp_path / ".other.txt.0123abcd.partial", tmp_path / f"{name[:9]}.partial", partial_name(path)]
    mine[0].write_text("of another")
    mine[1].write_text("of the user")
    mine[2].mkdir()
    link = tmp_path / "link"
    link.symlink_to(path)
    for target in (link, path):
        partial.write_text("killed")
        remove_partial(target)
        assert set(tmp_path.iterdir()) == {*mine, link}
    remove_partial(tmp_path / "absent" / "a.txt")
