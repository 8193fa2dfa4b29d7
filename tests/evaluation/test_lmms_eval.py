"""The model of lmms-eval, or of a stand-in where it is not installed: answers in order, boxes, options of tasks."""

import importlib
import io
import json
import re
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from mgllava.box_files import BoxFile, read_boxes, write_boxes
from mgllava.evaluation import BENCHMARKS, Answerer, BadRowError, EvaluationError
from mgllava.evaluation.answering import Film, open_video
from tests import processes
from tests.processing.videos import make_frames, write

pytestmark = pytest.mark.filterwarnings("ignore")

COLORS = ("red", "green", "blue")
TASK = "# task: absent\ntask: 'pope'  # a comment\ntest_split: \"test\"\n"


class Collator:
    """Batches of arguments with equal options, longest first, and the way back to the given order."""

    def __init__(self, arguments, sort, group_fn, grouping):
        assert grouping
        self.groups = {}
        for number, entry in sorted(enumerate(arguments), key=lambda pair: sort(pair[1])):
            self.groups.setdefault(str(group_fn(entry)), []).append((number, entry))
        self.order = [number for group in self.groups.values() for number, _ in group]

    def get_batched(self, n, batch_fn):
        assert batch_fn is None
        for group in self.groups.values():
            for start in range(0, len(group), n):
                yield [entry for _, entry in group[start : start + n]]

    def get_original(self, results):
        return [result for _, result in sorted(zip(self.order, results, strict=True), key=lambda pair: pair[0])]


class Messages:
    def __init__(self, messages):
        self.messages = messages

    def to_hf_messages(self):
        def block(part):
            kind = part["type"]
            return dict(part) if kind == "text" else {"type": kind, kind: part["url"]}

        return [{**message, "content": [block(part) for part in message["content"]]} for message in self.messages]


class Model:
    def __init__(self):
        self.cache_hook = SimpleNamespace(saved=[])
        self.cache_hook.add_partial = lambda *call: self.cache_hook.saved.append(call)


@pytest.fixture(autouse=True)
def lmms_eval(tmp_path, monkeypatch):
    """What of lmms-eval is used, if it is not installed."""
    if find_spec("lmms_eval") is None:
        for name, content in {
            "": {},
            ".api": {},
            ".models": {},
            ".utils": {"Collator": Collator, "__file__": str(tmp_path / "lmms" / "utils.py")},
            ".api.model": {"lmms": Model},
            ".models.registry_v2": {"ModelManifest": SimpleNamespace},
            ".protocol": {"ChatMessages": Messages},
        }.items():
            module = ModuleType(f"lmms_eval{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        sys.modules["lmms_eval"].utils = sys.modules["lmms_eval.utils"]
        monkeypatch.delitem(sys.modules, "mgllava.integrations.lmms_eval", raising=False)
        (tmp_path / "lmms" / "tasks").mkdir(parents=True)
        (tmp_path / "lmms" / "tasks" / "pope.yaml").write_text(TASK)
        (tmp_path / "lmms" / "tasks" / "absent.yaml").write_text("task: other\n")
        yield
        sys.modules.pop("mgllava.integrations.lmms_eval", None)
    else:
        yield


def test_the_class_of_the_manifest_is_there():
    lmms_eval = importlib.import_module("mgllava.integrations.lmms_eval")

    found = lmms_eval.manifest()
    assert found.model_id == "mgllava"
    module, _, name = found.chat_class_path.rpartition(".")
    assert getattr(sys.modules[module], name) is lmms_eval.MGLlavaChat and not lmms_eval.MGLlavaChat.is_simple


@pytest.fixture
def documents():
    return [{"question_id": n, "image": Image.new("RGB", (40, 30), color)} for n, color in enumerate(COLORS)]


@pytest.fixture
def ask(repository, documents):
    from mgllava.integrations.lmms_eval import MGLlavaChat

    def to_messages(document):
        content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": "Q?"}]
        return [{"role": "user", "content": content}]

    def run(options=({"max_new_tokens": 4},) * 3, change=lambda chat: None, **arguments):
        chat = MGLlavaChat(str(repository), device="cpu", dtype="float32", batch_size="2", **arguments)
        change(chat)
        chat.task_dict = {"task": {"test": documents}}
        requests = [
            SimpleNamespace(args=("context", to_messages, options[number], number, "task", "test"))
            for number in (2, 0, 1)
        ]
        return chat.generate_until(requests)

    return run


def test_answers_are_in_the_order_of_the_requests(ask, model, processor, documents):
    expected = Answerer(model, processor, 4).answer([document["image"] for document in documents], ["Q?"] * 3)
    assert ask() == [expected[number] for number in (2, 0, 1)]
    # Options of generation differ, so that the batches do too.
    options = [{"max_new_tokens": 4}, {"max_new_tokens": 2}, {"max_new_tokens": 4, "until": [expected[2][:1]]}]
    hooks = []
    found = ask(options, change=lambda chat: hooks.append(chat.cache_hook))
    assert found[:2] == ["", expected[0]]
    if hasattr(hooks[0], "saved"):  # answers that are saved for another run
        wanted = [("generate_until", ("context", options[number]), found[place]) for place, number in ((1, 0), (2, 1))]
        assert all(call in hooks[0].saved for call in wanted) and len(hooks[0].saved) == 3


def test_progress_counts_answers_in_the_main_process(ask, monkeypatch):
    lmms_eval = importlib.import_module("mgllava.integrations.lmms_eval")

    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done, self.is_closed = options, 0, False
            bars.append(self)

        def update(self, count):
            self.done += count

        def close(self):
            self.is_closed = True

    monkeypatch.setattr(lmms_eval, "tqdm", Bar)
    sizes = []

    def count(chat):
        answer = chat.answerer.answer_conversations
        chat.answerer.answer_conversations = lambda batch, *rest, **more: (
            sizes.append(len(batch)) or answer(batch, *rest, **more)
        )

    ask(change=count)
    assert sizes == [2, 1], "documents with the same options are a batch"
    ask(change=lambda chat: setattr(chat, "_rank", 1))
    assert [(bar.done, bar.is_closed, bar.options["total"]) for bar in bars] == [(3, True, 3)] * 2
    assert [bar.options["disable"] for bar in bars] == [False, True]


def note_boxes(chat, given):
    """Note the boxes that the model gets with the image of each color, or with each video."""
    answer = chat.answerer.answer_conversations

    def note(conversations, *rest, **options):
        for block in (block for conversation in conversations for block in conversation[0]["content"]):
            if block["type"] == "image":
                color = COLORS[max(range(3), key=block["image"].getpixel((0, 0)).__getitem__)]
                given[color] = block["boxes"]["boxes"]
            elif block["type"] == "video":
                given[len(given)] = [entry["boxes"] for entry in block["boxes"]]
        return answer(conversations, *rest, **options)

    chat.answerer.answer_conversations = note


def test_boxes_of_a_file(ask, model, processor, documents, tmp_path):
    records = [{"id": n, "boxes": [[n, 0, 30, 30]], "labels": ["a"], "scores": [0.9]} for n in range(3)]
    file = str(write_boxes(tmp_path / "b.json", records))
    images = [document["image"] for document in documents]
    expected = Answerer(model, processor, 4).answer(images, ["Q?"] * 3, records)
    given = {}
    assert ask(box_file=file, change=lambda chat: note_boxes(chat, given)) == [expected[n] for n in (2, 0, 1)]
    assert given == {color: records[number]["boxes"] for number, color in enumerate(COLORS)}
    file = str(write_boxes(tmp_path / "b.json", records[:1]))
    with pytest.raises(EvaluationError, match="no boxes for the id 1"):
        ask(box_file=file)


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_model_is_registered_if_it_is_imported_first():
    """As here; lmms-eval loads it while it is imported itself."""
    code = "import mgllava.integrations.lmms_eval, lmms_eval.models as m; m.get_model_manifest('mgllava')"
    assert processes.run("-c", code) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"boxes": "oracle"}, "`boxes` must be one of none, file, detector"),
        ({"boxes": "file"}, "needs a file"),
        ({"boxes": "detector"}, "has none"),
        ({"boxes": "none", "box_file": "b.json"}, "`boxes` is none, but `box_file` is b.json"),
        ({"temperature": 1, "max_batch_size": 8}, "has temperature, which mgllava does not know"),
    ],
)
def test_wrong_arguments(arguments, problem, ask):
    with pytest.raises(EvaluationError, match=problem):
        ask(**arguments)


def test_its_own_limits_of_batches_are_ignored(ask):
    assert ask(max_batch_size=8) == ask()


def test_boxes_of_the_detector(ask, processor, model, documents):
    """The one of the model by default, and for every image of a batch its own boxes."""
    records = [{"boxes": [[n, 0, 30, 30]], "labels": ["a"], "scores": [0.9]} for n in range(3)]
    images = [document["image"] for document in documents]
    expected = Answerer(model, processor, 4).answer(images, ["Q?"] * 3, records)
    limits = []

    def change(chat):
        chat._detects = True
        chat.answerer.detect = lambda found: [
            next(record for record, image in zip(records, images, strict=True) if image.tobytes() == seen.tobytes())
            for seen in found
        ]
        limits.append(chat._options)
        note_boxes(chat, given)

    given = {}
    assert ask(change=change) == [expected[number] for number in (2, 0, 1)]
    assert given == {color: records[number]["boxes"] for number, color in enumerate(COLORS)}
    ask(change=change, box_limit=0)
    assert limits == [{"box_limit": 100}, {"box_limit": None}]


@pytest.mark.parametrize(("boxes", "detects"), [(None, True), ("detector", True), ("none", False)])
def test_the_detector_of_the_model_is_the_default(boxes, detects, monkeypatch):
    lmms_eval = importlib.import_module("mgllava.integrations.lmms_eval")

    given = []

    def load(path, **options):
        given.append(options)
        return None, SimpleNamespace(box_detector_config={"tagger": "coco80"})

    monkeypatch.setattr(lmms_eval, "load", load)
    monkeypatch.setattr(lmms_eval, "Answerer", lambda *pair: SimpleNamespace(takes_boxes=True))
    chat = lmms_eval.MGLlavaChat("folder", boxes=boxes, device=None)
    assert chat._detects == detects and chat.batch_size == 1
    assert chat._num_frames == BENCHMARKS["msvd-qa"].num_frames and chat._options == {"box_limit": 100}
    assert given[0]["boxes"] == (None if boxes == "none" else boxes)
    assert (given[0]["device"], given[0]["dtype"], given[0]["trust_remote_code"]) == ("auto", "auto", False)


@pytest.mark.parametrize(("count", "device"), [(1, "cpu"), (2, "cuda:1")])
def test_each_process_has_its_own_device(count, device, monkeypatch):
    lmms_eval = importlib.import_module("mgllava.integrations.lmms_eval")

    state = SimpleNamespace(num_processes=count, process_index=count - 1, device="cuda:1")
    devices = []
    monkeypatch.setattr(lmms_eval, "Accelerator", lambda: state)
    monkeypatch.setattr(lmms_eval, "load", lambda path, **options: (devices.append(options["device"]), None))
    monkeypatch.setattr(lmms_eval, "Answerer", lambda *pair: SimpleNamespace(takes_boxes=False))
    chat = lmms_eval.MGLlavaChat("folder", device="cpu")
    assert devices == [device] and (chat._rank, chat._world_size) == (count - 1, count)
    assert chat.accelerator is state and chat._options == {} and not chat._detects


@pytest.mark.parametrize(
    ("document", "images", "key", "problem"),
    [
        ({"name": 1}, 1, None, r"no video_name or index or question_id or questionId or pid or id, but \['name'\]"),
        ({"id": 1}, 1, "name", "the document has no name"),
        ({"id": 1}, 2, None, "Document 1 has 2 images or videos, but a box file has one record"),
    ],
)
def test_documents_without_boxes_of_their_own(document, images, key, problem):
    from mgllava.integrations.lmms_eval import _KEYS, MGLlavaChat

    chat = MGLlavaChat.__new__(MGLlavaChat)
    chat._box_file, chat._keys = BoxFile([1], [{"boxes": [], "labels": [], "scores": []}]), (key,) if key else _KEYS
    assert chat._boxes({"id": None, "name": 1, "index": 1}, 1)[0]["boxes"] == []
    with pytest.raises(EvaluationError, match=problem):
        chat._boxes(document, images)


def test_images_are_shown_as_stored(ask):
    """As in `mgllava eval`: the processor would turn them upright."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(file, "JPEG", exif=exif)
    block = {"type": "image", "image": Image.open(file)}
    ask(change=lambda chat: chat._prepare([[{"role": "user", "content": [block]}]], [{}]))
    assert block["image"].size == (40, 30) and not block["image"].getexif()


def test_other_than_images_and_videos_is_refused(ask):
    def change(chat):
        def prepare(**block):
            chat._prepare([[{"role": "user", "content": [block]}]], [{}])

        with pytest.raises(EvaluationError, match="The document has audio, but only images and videos are supported"):
            prepare(type="audio", audio="a.wav")
        with pytest.raises(EvaluationError, match="has video_start, but only whole videos"):
            prepare(type="video", video="a.mp4", video_start=1.0)
        with pytest.raises(BadRowError, match="its video cannot be read"):
            prepare(type="video", video="absent.mp4")
        with pytest.raises(BadRowError, match="its image cannot be read"):
            prepare(type="image", image=b"no image")
        processor, chat.answerer.processor = chat.answerer.processor, SimpleNamespace(takes_videos=False)
        with pytest.raises(EvaluationError, match=r"has a video, but the model takes none.*add_videos"):
            prepare(type="video", video="a.mp4")
        chat.answerer.processor = processor
        for refused in (chat.loglikelihood, chat.generate_until_multi_round):
            with pytest.raises(NotImplementedError, match="generate_until only"):
                refused([])

    ask(change=change)


@pytest.fixture
def films(tmp_path):
    """Questions about two videos, one of them about an image as well, and their box file."""
    for number in (1, 2):
        (tmp_path / f"v{number}.mp4").write_bytes(write(make_frames(4 * number), "mpeg4", "yuv420p", "mp4"))
    boxes = [[[number + time, 0, 40, 30]] for number in (1, 2) for time in (0, 1)]
    frames = [{"boxes": found, "labels": ["a"], "scores": [0.9]} for found in boxes]
    records = [{"id": f"v{number}.mp4", "frames": frames[2 * number - 2 : 2 * number]} for number in (1, 2)]
    return [tmp_path / "v1.mp4", tmp_path / "v2.mp4"], records, str(write_boxes(tmp_path / "films.parquet", records))


@pytest.mark.parametrize("source", ["none", "file", "detector"])
def test_videos_and_their_boxes(source, films, repository, model, processor):
    """Equal to the answers of `mgllava eval`, in batches with an image."""
    from mgllava.integrations.lmms_eval import MGLlavaChat

    paths, records, file = films
    image = Image.new("RGB", (40, 30), "red")
    answerer = Answerer(model, processor, 4)
    clips = [open_video(path, 2).clip for path in paths]
    boxes = [[[]] * 2] * 2 if source == "none" else [record["frames"] for record in records]
    expected = answerer.answer_videos(clips, ["Q?"] * 2, boxes)
    chat = MGLlavaChat(
        str(repository),
        device="cpu",
        dtype="float32",
        batch_size=3,
        num_frames=2,
        boxes="file" if source == "file" else "none",
        box_file=file if source == "file" else None,
    )
    documents = [
        {"video_name": f"v{number}", "question_id": "1", "video": str(paths[number - 1])} for number in (2, 1)
    ]
    if source != "file":  # a box file is of videos or of images here
        documents.append({"image": image})
        expected += answerer.answer([image], ["Q?"])
    if source == "detector":
        given = {
            frame.tobytes(): entry
            for clip, record in zip(clips, records, strict=True)
            for frame, entry in zip(Film(clip).frames, record["frames"], strict=True)
        }
        chat._detects = True
        chat.answerer.detect = lambda images: [given.get(image.tobytes(), {"boxes": []}) for image in images]

    def to_messages(document):
        kind = "video" if "video" in document else "image"
        content = [{"type": kind, "url": document[kind]}, {"type": "text", "text": "Q?"}]
        return [{"role": "user", "content": content}]

    shown = {}
    note_boxes(chat, shown)
    chat.task_dict = {"task": {"test": documents}}
    options = {"max_new_tokens": 4, "until": []}
    found = chat.generate_until(
        [SimpleNamespace(args=("c", to_messages, options, number, "task", "test")) for number in range(len(documents))]
    )
    assert found == [expected[1], expected[0], *expected[2:]]
    of_videos = [[entry["boxes"] if source != "none" else [] for entry in row["frames"]] for row in records]
    if source == "detector":  # which finds the same in equal frames of the two
        of_videos = [[given[frame.tobytes()]["boxes"] for frame in Film(clip).frames] for clip in clips]
    assert [shown[number] for number in (0, 1)] == of_videos[::-1]


def test_frames_and_boxes_that_do_not_fit_are_refused(films, repository):
    from mgllava.integrations.lmms_eval import MGLlavaChat

    with pytest.raises(EvaluationError, match="`num_frames` must be at least 1, got 0"):
        MGLlavaChat(str(repository), num_frames=0)
    chat = MGLlavaChat.__new__(MGLlavaChat)
    chat._box_file, chat._keys = read_boxes(films[2]), ("video_name",)
    assert len(chat._boxes({"video_name": "v1"}, 1, 2)) == 2
    with pytest.raises(EvaluationError, match="the document 'v1', it has boxes of 2 frames, but 3 are sampled"):
        chat._boxes({"video_name": "v1"}, 1, 3)
    with pytest.raises(EvaluationError, match="no boxes for the id 'v3'"):
        chat._boxes({"video_name": "v3"}, 1, 2)
    with pytest.raises(EvaluationError, match=r"boxes of frames of a video for the id 'v1\.mp4'"):
        chat._boxes({"video_name": "v1.mp4"}, 1)


def test_task_of_videos(films, tmp_path):
    from mgllava.integrations.lmms_eval import messages_about_video, score_answer, write_task

    questions, answers = tmp_path / "q.json", tmp_path / "a.json"
    rows = [{"question_id": number, "video_name": f"v{number}", "question": f"{number}?"} for number in (1, 2)]
    questions.write_text(json.dumps(rows))
    answers.write_text(json.dumps([{"answer": "2010-01-01"}, {"answer": "a big dog"}]))
    path = write_task("MSVD_QA", [questions], tmp_path / "tasks", annotations=answers)
    task = json.loads(re.sub(r"!function mgllava\.integrations\.lmms_eval\.(\w+)", r'"\1"', path.read_text()))
    assert path.name == "msvd_qa_local.yaml"
    metrics = ("exact_match", "token_f1")
    assert task == {  # the names of lmms-eval
        "task": "msvd_qa_local",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": [str(tmp_path / "tasks" / "msvd_qa_local.parquet")]}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "video",
        "doc_to_messages": "messages_about_video",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "process_results": "score_answer",
        "generation_kwargs": {"max_new_tokens": 100, "temperature": 0, "do_sample": False, "until": []},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }
    table = pq.read_table(task["dataset_kwargs"]["data_files"]["test"]).to_pylist()
    assert table[0] == {
        "question_id": "1",
        "video_name": "v1",
        "video": str(tmp_path / "v1.mp4"),
        "question": "1?",
        "answer": "2010-01-01",
    }
    # A video also if lmms-eval would take its file for an image.
    [message] = messages_about_video({**table[0], "video": "a.gif"})
    assert message["role"] == "user"
    assert message["content"] == [{"type": "video", "url": "a.gif"}, {"type": "text", "text": "1?"}]
    assert score_answer(table[1], ["big dog."]) == {"exact_match": 1.0, "token_f1": 1.0}  # articles do not count
    assert score_answer(table[1], ["cat dog"]) == {"exact_match": 0.0, "token_f1": 0.5}
    with pytest.raises(EvaluationError, match="`annotations` must name a file with the answers"):
        write_task("msvd-qa", [questions], tmp_path / "tasks")
    with pytest.raises(EvaluationError, match="`annotations` and `image_folder` are for tasks of videos"):
        write_task("pope", [questions], tmp_path / "tasks", annotations=answers)
    (tmp_path / "v2.mp4").unlink()
    with pytest.raises(EvaluationError, match=r"`data`: .*v2 does not exist"):
        write_task("msvd-qa", [questions], tmp_path / "tasks", annotations=answers)


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet"])
def test_a_missing_writer_of_parquet_is_named(module, tmp_path, monkeypatch):
    from mgllava.integrations.lmms_eval import write_task

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"The data of a task needs pyarrow .*'\.\[eval\]'"):
        write_task("msvd-qa", [], tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (False, 1.0, 1.0, 1, 100)),
        ({"temperature": 0, "do_sample": True, "num_beams": 3, "max_new_tokens": 7}, (False, 1.0, 1.0, 3, 7)),
        ({"temperature": 0.5}, (True, 0.5, 1.0, 1, 100)),
        ({"temperature": 0.5, "do_sample": False}, (False, 1.0, 1.0, 1, 100)),
        ({"temperature": 0.5, "top_p": 0.9, "num_beams": None}, (True, 0.5, 0.9, 1, 100)),
    ],
)
def test_options_of_generation(options, expected, model):
    from mgllava.integrations.lmms_eval import generation_config

    config = generation_config(model.generation_config, options)
    names = ("do_sample", "temperature", "top_p", "num_beams", "max_new_tokens")
    assert tuple(getattr(config, name) for name in names) == expected and config.top_k == 50  # as in transformers


def test_answers_end_before_the_first_of_some_words():
    from mgllava.integrations.lmms_eval import _cut

    assert _cut(" a b\n\nc ", None) == "a b\n\nc" and _cut("a b c", ["c", "", "b"]) == "a" and _cut("ab", "b") == "a"


def test_local_variant_of_a_task(tmp_path):
    from mgllava.integrations.lmms_eval import write_local_task

    data = tmp_path / "a.parquet"
    data.touch()
    content = json.loads(write_local_task("pope", [data], tmp_path / "tasks").read_text())
    assert content["task"] == "pope_local" and content["include"].endswith("pope.yaml")
    assert content["dataset_kwargs"] == {"data_files": {"test": [str(data)]}} and content["test_split"] == "test"
    assert content["dataset_path"] == "parquet" and content["dataset_name"] is None
    with pytest.raises(EvaluationError, match="no such file: none was given"):
        write_local_task("pope", [], tmp_path)
    with pytest.raises(EvaluationError, match=r"no such file: [^,]*b\.parquet\.$"):
        write_local_task("pope", [data, tmp_path / "b.parquet"], tmp_path)
    with pytest.raises(EvaluationError, match="no task 'absent'"):
        write_local_task("absent", [data], tmp_path)


@pytest.mark.parametrize(("line", "split"), [("test_split: 'validation'", "validation"), ("", "test")])
def test_a_local_variant_has_the_split_of_its_task(line, split, tmp_path, monkeypatch):
    lmms_eval = importlib.import_module("mgllava.integrations.lmms_eval")

    monkeypatch.setattr(lmms_eval.utils, "__file__", str(tmp_path / "lmms" / "utils.py"))
    (tmp_path / "lmms" / "tasks").mkdir(parents=True, exist_ok=True)
    (tmp_path / "lmms" / "tasks" / "docvqa.yaml").write_text(f"task: docvqa\n{line}\n")
    (tmp_path / "a.parquet").touch()
    app = typer.Typer()
    app.command()(lmms_eval.main)
    result = CliRunner().invoke(app, ["docvqa", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "new" / "x")])
    path = tmp_path / "new" / "x" / "docvqa_local.yaml"
    assert result.exit_code == 0 and f"Wrote {path}" in result.output.replace("\n", "")
    content = json.loads(path.read_text())
    assert content["test_split"] == split and list(content["dataset_kwargs"]["data_files"]) == [split]


def test_the_module_is_a_program(help_of):
    assert "Write a task for lmms-eval" in help_of("mgllava.integrations.lmms_eval")
