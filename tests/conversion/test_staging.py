"""Existing files at and next to the output of a conversion, and killed runs: tested with the fast one of RAM++."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from mgllava import MGLlavaProcessor, RamPlusForImageTagging
from mgllava.conversion import ConversionError, convert_checkpoint, convert_ram_plus
from mgllava.folder_lock import FolderLock
from mgllava.model_files import staging
from mgllava.model_files.staging import StagingFolder
from tests.ram_plus.golden import SOURCES


def _in_child(function):
    """Run a function in a forked process, which has imported everything, and return its process id."""
    if (child := os.fork()) == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            function()
        finally:
            os._exit(1)
    return child


def _die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(output, where):
    """Convert in a process that kills itself at a certain step."""

    def convert():
        progress = None
        if where == "weights":

            def progress(stage, done, total):
                if stage == "writing weights" and any((output.parent / "out.incomplete").glob("model-00002*")):
                    _die()

        elif where == "duplicating":
            staging._link_or_copy = _die
        elif where == "between":
            rename = Path.rename
            Path.rename = lambda self, target: _die() if self.name.endswith(".incomplete") else rename(self, target)
        elif where == "removing":
            staging._remove_replaced = _die
        _convert(output, overwrite=True, progress=progress)

    assert os.waitstatus_to_exitcode(os.waitpid(_in_child(convert), 0)[1]) == -signal.SIGKILL


def _convert(output, **options):
    return convert_ram_plus(**SOURCES, output=output, max_shard_size="200KB", **options)


def _tree(folder):
    """Return every path in a folder with its contents, or the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = kind
    return found


def _is_whole(folder):
    _, info = RamPlusForImageTagging.from_pretrained(folder, output_loading_info=True)
    return not any(info.values())


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return _convert(tmp_path_factory.mktemp("tagger") / "tagger")


def _thesis(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def _link(path):
    target = path.parent / "elsewhere"
    target.mkdir()
    (target / "photo.jpg").write_bytes(b"mine")
    path.symlink_to(target)


def _file(path):
    path.write_text("mine")


def _marked_by_name_only(path):
    path.mkdir()
    (path / "conversion_progress.json").write_text('{"model.safetensors": "0"}')


@pytest.mark.parametrize("make", [_thesis, _link, _file, _marked_by_name_only])
def test_other_folder_named_incomplete_is_refused(tmp_path, make):
    make(tmp_path / "out.incomplete")
    before = _tree(tmp_path)
    with pytest.raises(ConversionError, match=r"out\.incomplete is in the way"):
        _convert(tmp_path / "out")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("make", [_thesis, _link, _file])
def test_other_folder_named_replaced_is_refused(tmp_path, tagger, make):
    shutil.copytree(tagger, tmp_path / "out")
    make(tmp_path / "out.replaced")
    before = _tree(tmp_path)
    with pytest.raises(ConversionError, match=r"out\.replaced is in the way"):
        _convert(tmp_path / "out", overwrite=True)
    after = {path: content for path, content in _tree(tmp_path).items() if not path.startswith("out.incomplete")}
    assert after == before


def test_file_added_to_an_unfinished_folder_is_not_deleted(tmp_path):
    _kill_at(tmp_path / "out", "weights")
    (tmp_path / "out.incomplete" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match=r"holds also thesis\.tex"):
        _convert(tmp_path / "out")
    assert (tmp_path / "out.incomplete" / "thesis.tex").exists()
    (tmp_path / "out.incomplete" / "thesis.tex").unlink()
    assert _is_whole(_convert(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _add_files(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("my card")
    (folder / "box_detector" / "tagger").mkdir(parents=True)
    (folder / "box_detector" / "tagger" / "model.safetensors").write_bytes(b"weights")
    (folder / "link").symlink_to("notes.txt")
    (folder / "dangling").symlink_to("nowhere")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")


ADDED = ("notes.txt", "README.md", "box_detector", "link", "dangling", ".git")


def _added(folder):
    return {path: content for path, content in _tree(folder).items() if path.split("/")[0] in ADDED}


@pytest.mark.parametrize("links", [True, False])
def test_overwriting_keeps_the_users_files_and_removes_old_weights(tmp_path, tagger, monkeypatch, links):
    output = shutil.copytree(tagger, tmp_path / "out")
    _add_files(output)
    mine = _added(output)
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **o: (_ for _ in ()).throw(OSError("no links on this disk")))
    convert_ram_plus(**SOURCES, output=output, overwrite=True)
    assert _added(output) == mine
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not (output / "model.safetensors.index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_mgllava_keeps_its_box_detector(tmp_path, converted, golden, sources):
    output = shutil.copytree(converted, tmp_path / "out")
    (output / "box_detector").mkdir()
    (output / "box_detector" / "prompt_embeds.safetensors").write_bytes(b"mine")
    config = {"tagger": ["cat"], "detector": "google/owlv2-large-patch14-ensemble", "mode": "clean"}
    processor = json.loads((output / "processor_config.json").read_text())
    (output / "processor_config.json").write_text(json.dumps({**processor, "box_detector_config": config}))
    convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=output, overwrite=True)
    assert (output / "box_detector" / "prompt_embeds.safetensors").read_bytes() == b"mine"
    assert MGLlavaProcessor.from_pretrained(output).box_detector_config == config


@pytest.mark.parametrize("where", ["weights", "duplicating", "between", "removing"])
def test_killed_replacement_loses_nothing(tmp_path, tagger, where):
    output = shutil.copytree(tagger, tmp_path / "out")
    _add_files(output)
    mine = _added(output)
    _kill_at(output, where)
    # The output is complete or does not exist.
    assert where == "between" or (_is_whole(output) and _added(output) == mine)
    with pytest.raises(ConversionError, match="pass `overwrite=True`"):
        _convert(output)
    assert _is_whole(output) and _added(output) == mine
    _convert(output, overwrite=True)
    assert _is_whole(output) and _added(output) == mine
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_that_is_added_while_the_output_is_replaced_is_kept(tmp_path, tagger, monkeypatch):
    output = shutil.copytree(tagger, tmp_path / "out")
    remove = staging._remove_replaced

    def add_first(old, *arguments):
        (old / "late.txt").write_text("mine")
        remove(old, *arguments)

    monkeypatch.setattr(staging, "_remove_replaced", add_first)
    _convert(output, overwrite=True)
    assert _tree(tmp_path / "out.replaced") == {"late.txt": b"mine"}


@pytest.mark.parametrize("change", ["content", "link", "file to link", "file to folder"])
def test_file_that_is_changed_after_it_was_copied_is_kept(tmp_path, change):
    """Also if size and time are those of the copy, as of files that `cp -p` or `rsync` wrote."""
    old, new = tmp_path / "out.replaced", tmp_path / "out"
    for folder in (old, new):
        folder.mkdir()
        (folder / "same.txt").write_text("mine")
        (folder / "same link").symlink_to("same.txt")
        (folder / "note").write_text("mine")
        (folder / "link").symlink_to("note")
    if change == "content":
        (old / "note").write_text("MINE")
        os.utime(old / "note", ns=(0, (new / "note").stat().st_mtime_ns))
    elif change == "link":
        (old / "link").unlink()
        (old / "link").symlink_to("same.txt")
    else:
        (old / "note").unlink()
        if change == "file to link":
            (old / "note").symlink_to("same.txt")
        else:
            (old / "note").mkdir()
            (old / "note" / "more.txt").write_text("mine")
    before = _tree(old)
    staging._remove_replaced(old, new, [])
    left = "link" if change == "link" else "note"
    assert _tree(old) == {path: content for path, content in before.items() if path.split("/")[0] == left}


@pytest.mark.parametrize(("written", "is_kept"), [(["vocabulary.txt"], False), ([], True), (5, True), (None, True)])
def test_interrupted_replacement_removes_only_what_was_written_again(tmp_path, written, is_kept):
    """Files of any name count as written if the list names them; a damaged list names nothing."""
    output, replaced = tmp_path / "out", tmp_path / "out.replaced"
    folder = staging.StagingFolder(output, overwrite=False)
    for path, text in ((output, "the new one"), (replaced, "the old")):
        path.mkdir()
        (path / "vocabulary.txt").write_text(text)
    mark = {"mark": staging._MARK, "written": written}
    (replaced / "conversion_replaced.json").write_text(json.dumps(mark))
    folder._finish_replacement()
    assert _tree(output) == {"vocabulary.txt": b"the new one"}
    assert replaced.exists() == is_kept and (not is_kept or _tree(replaced) == {"vocabulary.txt": b"the old"})


# Links, and other outputs


def test_target_of_a_link_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for options in ({}, {"overwrite": True}):
        _convert(tmp_path / "out", **options)
        assert (tmp_path / "out").is_symlink() and _is_whole(tmp_path / "disk" / "out")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["out"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ConversionError, OSError)):
        _convert(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("output", ["/", "/.", "//"])
def test_root_is_not_an_output(output):
    with pytest.raises(ConversionError, match="`output` must be a folder that can be created"):
        _convert(output)


def test_link_to_a_folder_of_the_user_is_refused(tmp_path):
    _link(tmp_path / "out")
    before = _tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConversionError):
            _convert(tmp_path / "out", overwrite=overwrite)
    assert _tree(tmp_path) == before


def test_file_at_the_output_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="exists and is not a folder"):
            _convert(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_empty_output_is_replaced_and_its_folders_are_made(tmp_path):
    (tmp_path / "out").mkdir()
    assert _is_whole(_convert(tmp_path / "out"))
    assert _is_whole(_convert(tmp_path / "new" / "folders" / "out"))


def test_run_that_was_killed_while_it_marked_its_folder_is_resumed(tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / ".conversion_progress.json.0123abcd.partial").write_text("{")
    assert _is_whole(_convert(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_are_not_copied(tmp_path, tagger, monkeypatch):
    """A copy would wait for the other end; a hard link does not."""
    output = shutil.copytree(tagger, tmp_path / "out")
    os.mkfifo(output / "pipe")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *a, **o: (_ for _ in ()).throw(OSError("no links on this disk")))
        with pytest.raises(OSError, match="no links on this disk"):
            _convert(output, overwrite=True)
    assert _is_whole(output)
    _convert(output, overwrite=True)
    assert (output / "pipe").is_fifo()


# The files of a model folder, which transformers and this package name, and some of a user.
OWN = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("image_processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "conversion_report.json", "modeling_mgllava.py"),
    *("modeling_slime.py", "modeling_ram_plus.py", "text_common.py", "__init__.py"),
)
OF_THE_USER = (
    *("adapter_model.safetensors", "model-1-of-2.safetensors", "handler.py", "my_config.json", "notes.txt", "a.jinja"),
    *("config.json.bak", "tokenizer.model", "video_mgllava.txt"),
)


@pytest.mark.parametrize("name", [*OWN, *OF_THE_USER])
def test_files_of_a_model_folder_are_replaced_and_others_are_kept(tmp_path, name):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "ram_plus"}')
    if name != "config.json":
        (output / name).write_text("old")
    with StagingFolder(output, True, "ram_plus") as folder:
        folder.keep_finished({}, [])
        folder.publish()
    assert _tree(output) == ({} if name in OWN else {name: b"old"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        *((name, True) for name in (*OWN, "box_detector", "vision_tower", "additional_chat_templates", "README.md")),
        *((".gitattributes", True), (".config.json.0123abcd.partial", True)),
        *((name, False) for name in OF_THE_USER),
    ],
)
def test_unfinished_folder_may_hold_what_a_run_writes(tmp_path, name, is_own):
    unfinished = tmp_path / "out.incomplete"
    unfinished.mkdir()
    (unfinished / "conversion_progress.json").write_text(json.dumps({"mark": staging._MARK}))
    (unfinished / name).write_text("old")
    if is_own:
        with StagingFolder(tmp_path / "out", False, "ram_plus") as folder:
            folder.keep_finished({}, [])
        assert [path.name for path in unfinished.iterdir()] == ["conversion_progress.json"]
    else:
        with pytest.raises(ConversionError, match=rf"holds also {name}\."):
            StagingFolder(tmp_path / "out", False, "ram_plus").__enter__()
        assert (unfinished / name).exists()
    assert not (tmp_path / "out.lock").exists()


@pytest.mark.parametrize("config", ["{", "[]", '"ram_plus"', '{"model_type": ["ram_plus"]}', "[" * 100_000, "\udcff"])
def test_output_with_a_broken_config_is_not_replaced(tmp_path, config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConversionError, match="is not a ram_plus model folder"):
        _convert(tmp_path / "out", overwrite=True)


# Two runs


def test_second_run_on_an_output_is_an_error(tmp_path):
    with StagingFolder(tmp_path / "out", False, "ram_plus") as first:
        first.keep_finished({}, [])
        before = _tree(tmp_path)
        for name in ("out", "link"):
            if name == "link":
                (tmp_path / "link").symlink_to(tmp_path / "out")
                before = _tree(tmp_path)
            with pytest.raises(ConversionError, match="is being written by another run"):
                _convert(tmp_path / name)
            assert _tree(tmp_path) == before


def test_run_that_has_lost_its_lock_does_not_publish(tmp_path, tagger):
    output = shutil.copytree(tagger, tmp_path / "out")
    before = _tree(output)
    with StagingFolder(output, True, "ram_plus") as folder:
        folder.keep_finished({}, [])
        (tmp_path / "out.lock").unlink()
        with FolderLock(output, "another"), pytest.raises(ConversionError, match="lost its lock"):
            folder.publish()
    assert _tree(output) == before


def _random_kills(output, runs, seed):
    """Kill pairs of conversions at random moments, and check the output after each pair."""
    chosen = random.Random(seed)
    whole = 0
    for run in range(runs):
        children = [_in_child(lambda: _convert(output, overwrite=True)) for _ in range(2)]
        for child in children:
            time.sleep(chosen.random() * 0.8)
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        if output.exists():
            assert _is_whole(output), run
            if whole:
                assert (output / "notes.txt").read_text() == "mine", run
            (output / "notes.txt").write_text("mine")
            whole += 1
    _convert(output, overwrite=True)
    assert _is_whole(output)
    assert not whole or (output / "notes.txt").read_text() == "mine"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_kill_at_a_random_moment_loses_nothing(tmp_path):
    _random_kills(tmp_path / "out", 2, seed=1)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    _random_kills(tmp_path / "out", 20, seed=0)


# Full disks


@pytest.mark.parametrize("limit", [1 << 16, 300_000, 1_000_000])
def test_full_disk_is_an_error_and_the_next_run_resumes(tmp_path, limit):
    resource = pytest.importorskip("resource")

    def convert():
        # Like a full disk: writing beyond the limit is an error of the system.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            convert_ram_plus(**SOURCES, output=tmp_path / "out")
        except OSError:
            os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(_in_child(convert), 0)[1]) == 7
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.safetensors"))
    assert _is_whole(_convert(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_another_program_wrote_meanwhile_is_not_replaced(tmp_path):
    staging_folder = StagingFolder(tmp_path / "out", False, "ram_plus")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="out exists"), staging_folder:
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
