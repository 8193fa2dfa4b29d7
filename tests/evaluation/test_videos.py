"""Questions about videos: files of MSVD-QA, boxes per frame, scores, report, and runs that are resumed."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from mgllava.box_files import BoxFile
from mgllava.cli import app
from mgllava.evaluation import Answerer, BoxChanges, BoxSource, EvaluationError, evaluate, load_task
from mgllava.evaluation.answering import check_context, open_video
from mgllava.evaluation.evaluate import finish
from mgllava.evaluation.job import Boxes, answer_task, with_boxes
from mgllava.evaluation.task import without_placeholders
from tests.processing.videos import HEIGHT, WIDTH, make_frames, write

from .conftest import Echo

FRAMES = 2
NONE = Boxes(BoxSource.NONE, None, BoxChanges())
DETECTOR = Boxes(BoxSource.DETECTOR, None, BoxChanges())
QUESTIONS = [("vid1", "what is moving?", "man"), ("vid2", "who walks?", "two men"), ("vid1", "is it day?", "yes")]


class VideoEcho(Echo):
    """Answers about videos; `shown` are the frames of each question."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shown = []

    def answer_videos(self, clips, prompts, boxes=None, **options):
        self.options.append(options)
        self.shown += [clip.frames for clip in clips]
        return [
            self.reply(prompt, [entry["boxes"] for entry in given])
            for prompt, given in zip(prompts, boxes, strict=True)
        ]


@pytest.fixture
def files(tmp_path):
    """The questions and the answers of MSVD-QA, and two videos."""
    for number, name in enumerate(("vid1.avi", "vid2.mp4"), 1):
        frames = make_frames(5 * number)
        (tmp_path / name).write_bytes(write(frames, "mpeg4", "yuv420p", "mp4" if "mp4" in name else "avi"))
    questions = [
        {"question_id": number, "video_name": video, "question": question}
        for number, (video, question, _) in enumerate(QUESTIONS)
    ]
    answers = [{"question_id": number, "answer": answer} for number, (_, _, answer) in enumerate(QUESTIONS)]
    paths = tmp_path / "test_q.json", tmp_path / "test_a.json"
    for path, content in zip(paths, (questions, answers), strict=True):
        path.write_text(json.dumps(content))
    return paths


def load(files, **options):
    questions, answers = files
    return load_task("msvd-qa", questions, annotations=answers, num_frames=FRAMES, **options)


def run(task, output, echo=None, boxes=NONE, **options):
    echo = echo or VideoEcho(lambda prompt, boxes: "man")
    return answer_task(task, lambda: echo, boxes, output, {"x": 1}, **options)


def records(*frames):
    return {
        "frames": [{"boxes": boxes, "labels": ["x"] * len(boxes), "scores": [0.9] * len(boxes)} for boxes in frames]
    }


# ----- files


def test_questions_get_their_answers_and_videos(files):
    task = load(files)
    assert [(q.key, q.prompt, q.answer, q.box_key) for q in task.questions] == [
        (number, question, answer, video) for number, (video, question, answer) in enumerate(QUESTIONS)
    ]
    assert [task.find_image(question).name for question in task.questions] == ["vid1.avi", "vid2.mp4", "vid1.avi"]
    assert load_task("msvd-qa", files[0]).num_frames == 8  # as in the original
    # Answers without ids are in the order of the questions.
    files[1].write_text(json.dumps([{"answer": answer} for *_, answer in QUESTIONS]))
    assert [question.answer for question in load(files).questions] == [answer for *_, answer in QUESTIONS]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"answer": "a"}], "must have an answer for each of the 3 rows, got 1"),
        ([{"answer": "a", "question_id": 1}] * 2, "two answers for the question_id '1'"),
        ([{"question_id": 1}], "nor a list of answers"),
        ("a", "or a list of answers"),
    ],
)
def test_answers_that_do_not_fit(files, answers, said):
    files[1].write_text(json.dumps(answers))
    with pytest.raises(EvaluationError, match=said):
        load(files)


def test_bad_rows_are_named(files, tmp_path):
    rows = json.loads(files[0].read_text())
    rows += [
        {"question_id": 3, "video_name": "vid9", "question": "?"},
        {"question_id": 4, "question": "?"},
        {"question_id": 5, "video_name": "../vid1", "question": "?"},
        {"question_id": 6, "video_name": "broken", "question": "?"},
    ]
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "vid2.mp4").read_bytes()[:400])
    files[0].write_text(json.dumps(rows))
    files[1].write_text(json.dumps([{"answer": "man"}] * len(rows)))
    task = load(files)
    said = [bad.reason for bad in task.bad_rows]
    assert len(said) == 3 and said[0].startswith("its video") and said[0].endswith("vid9 does not exist")
    assert said[1] == "it has no video_name or video or video_path" and "outside the folder" in said[2]
    # A damaged one is found when it is decoded: stop, or skip it.
    with pytest.raises(EvaluationError, match=r"row 7 \(id 6\) cannot be asked: its video cannot be read"):
        run(task, tmp_path / "stop")
    answers = run(task, tmp_path / "skip", on_error="skip")
    assert "video cannot be read" in answers[-1]["reason"] and len(answers) == 4
    summary = finish(task, answers, tmp_path / "skip", {}, "m")
    assert (summary.answered, summary.skipped) == (3, 4)


def test_options_of_images_and_videos_are_not_mixed_up(files, choices):
    with pytest.raises(EvaluationError, match="`num_frames` must be left out: Multiple choice has no videos"):
        load_task("multiple-choice", choices, num_frames=4)
    with pytest.raises(EvaluationError, match="`num_frames` must be at least 1"):
        load_task("msvd-qa", files[0], num_frames=0)
    assert load_task("msvd-qa", files[0], num_frames=1).num_frames == 1


def test_texts_with_placeholders_are_not_asked(files):
    task = load(files)
    object.__setattr__(task.questions[0], "prompt", "What is <video>?")
    asked = without_placeholders(task, ["<image>", "<video>"])
    assert len(asked.questions) == len(task.questions) - 1
    assert [row.reason for row in asked.bad_rows] == ["its text has <video>, which is a placeholder"]


# ----- answers and boxes


def test_sampled_frames_are_shown_and_boxes_found_once_per_video(files, tmp_path):
    echo = VideoEcho(lambda prompt, boxes: str(boxes))
    answers = run(load(files), tmp_path / "out", echo, DETECTOR, batch_size=2)
    assert echo.detected == [FRAMES] * 2 and echo.options == [{"box_limit": None}] * 2
    box = [0, 0, WIDTH // 2, HEIGHT // 2]
    assert [line["answer"] for line in answers] == [str([[box]] * FRAMES)] * 3
    assert answers[0]["frames"] == [{"boxes": [box], "labels": ["x"]}] * FRAMES
    # The first and the last frame of the video.
    wanted = make_frames(5)[[0, 4]]
    found = echo.shown[0].permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - wanted).mean() < 8


@pytest.mark.parametrize("names", [("vid1", "vid2"), ("vid1.avi", "vid2.mp4")])
def test_boxes_of_a_file_by_the_name_without_extension_or_as_detect_writes_it(files, tmp_path, names):
    frames = [[[1, 2, 3, 4]], []], [[[5, 6, 7, 8]], [[0, 0, 9, 9]]]
    file = BoxFile(list(names), [records(*of_video) for of_video in frames])
    seen = []
    echo = VideoEcho(lambda prompt, boxes: seen.append(boxes) or "A")
    run(load(files), tmp_path / "out", echo, Boxes(BoxSource.FILE, file, BoxChanges()))
    assert seen == [frames[0], frames[1], frames[0]]


def test_boxes_that_do_not_fit_are_named(files):
    file = BoxFile(["vid1", "vid2"], [records([], [], []), {"boxes": [], "labels": [], "scores": []}])
    task = with_boxes(load(files), Boxes(BoxSource.FILE, file, BoxChanges()))
    assert [bad.reason for bad in task.bad_rows] == [
        "it has boxes of 3 frames, but 2 are sampled (`num_frames`)",
        "the box file has boxes of an image for the id 'vid2'",
        "it has boxes of 3 frames, but 2 are sampled (`num_frames`)",
    ]


def test_true_boxes_of_the_column(files):
    rows = json.loads(files[0].read_text())
    rows[0]["boxes"], rows[1]["boxes"] = [[[1, 2, 3, 4]], []], [[]]
    files[0].write_text(json.dumps(rows))
    task = with_boxes(load(files), Boxes(BoxSource.ORACLE, None, BoxChanges()))
    assert [question.key for question in task.questions] == [0]
    assert "boxes of 1 frames" in task.bad_rows[0].reason and "no true boxes" in task.bad_rows[1].reason


def test_changes_are_drawn_per_frame(files, tmp_path):
    """Dropping with two seeds, moving, and boxes of the other video."""
    many = [[x, 0, x + 2, 2] for x in range(30)]
    file = BoxFile(["vid1", "vid2"], [records(many, many), records([], [[1, 1, 2, 2]])])
    seen = []
    echo = VideoEcho(lambda prompt, boxes: seen.append(boxes) or "A")
    run(load(files), tmp_path / "a", echo, Boxes(BoxSource.FILE, file, BoxChanges(drop=0.5)))
    first, second = seen[0]
    assert first != second and 5 < len(first) < 25 and seen[2] == seen[0]  # the same question's video, the same boxes
    seen.clear()
    run(load(files), tmp_path / "b", echo, Boxes(BoxSource.FILE, file, BoxChanges(shuffle=True)))
    assert seen == [[[], [[1, 1, 2, 2]]], [many, many], [[], [[1, 1, 2, 2]]]]


def test_an_interrupted_run_goes_on(files, tmp_path):
    def interrupt(prompt, boxes):
        if "walks" in prompt:
            raise KeyboardInterrupt
        return "man"

    with pytest.raises(KeyboardInterrupt):
        run(load(files), tmp_path / "out", VideoEcho(interrupt), batch_size=1)
    echo = VideoEcho(lambda prompt, boxes: "man")
    answers = run(load(files), tmp_path / "out", echo, batch_size=1, resume=True)
    assert len(echo.shown) == 2 and [line["answer"] for line in answers] == ["man"] * 3


# ----- scores, files, report


def test_scores_and_files(files, tmp_path):
    task = load(files)
    replies = {"what": "A man.", "who": "men", "is": "no"}
    echo = VideoEcho(lambda prompt, boxes: replies[prompt.split()[0]])
    answers = run(task, tmp_path / "out", echo, DETECTOR)
    result = finish(task, answers, tmp_path / "out", {"num_frames": FRAMES}, "m")
    assert result.main == "exact match" and result.scores["exact match"] == pytest.approx(100 / 3)
    assert result.scores["token F1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    content = json.loads((tmp_path / "out" / "video_qa_results.json").read_text())
    assert content[1] == {"id": 1, "question": "who walks?", "answer": "two men", "pred": "men"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure") == 3 and "1, 1 boxes" in page and "GPT-3.5" in page
    # Two frames side by side.
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as strip:
        assert strip.width / strip.height == pytest.approx(FRAMES * WIDTH / HEIGHT, rel=0.05)


def test_a_model_answers_through_the_command(repository, files, tmp_path):
    """From files to scores, with a converted model; the answers are those of the model alone."""
    output = tmp_path / "out"
    options = ["--benchmark", "msvd-qa", "--data", files[0], "--annotations", files[1], "--output", output]
    command = ["eval", repository, *options, "--num-frames", FRAMES, "--max-new-tokens", 3, "--limit", 2]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    from transformers import AutoModelForImageTextToText, AutoProcessor

    answerer = Answerer(
        AutoModelForImageTextToText.from_pretrained(repository), AutoProcessor.from_pretrained(repository), 3
    )
    lines = [json.loads(line) for line in (output / "answers.jsonl").open()]
    task = load(files)
    for line, question in zip(lines, task.questions, strict=False):
        block = {"type": "video", "path": str(task.find_image(question)), "boxes": [[]] * FRAMES}
        message = {"role": "user", "content": [block, {"type": "text", "text": question.prompt}]}
        assert answerer.answer_conversations([[message]], num_frames=FRAMES) == [line["answer"]]
    settings = json.loads((output / "settings.json").read_text())["settings"]
    assert settings["num_frames"] == FRAMES
    result = CliRunner().invoke(app, [*map(str, command), "--resume", "--num-frames", "3"])
    assert result.exit_code == 1 and "num_frames" in result.output


def test_models_that_cannot_are_refused_before_anything_is_asked(repository, files, tmp_path, monkeypatch):
    arguments = (str(repository), "msvd-qa", files[0], tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"has 11520 tokens.*context has 8192.*`num_frames`.*--max-positions"):
        evaluate(*arguments, num_frames=20)
    rows = json.loads(files[0].read_text())
    files[0].write_text(json.dumps([{**rows[0], "question": "What is <video>?"}, *rows[1:]]))
    with pytest.raises(EvaluationError, match=r"1 rows cannot be asked: .* its text has <video>"):
        evaluate(*arguments, num_frames=FRAMES)
    small = SimpleNamespace(config=LlamaForCausalLM.config_class(max_position_embeddings=100))
    check_context(small, 99)
    with pytest.raises(EvaluationError, match="has 100 tokens"):
        check_context(small, 100)
    from mgllava.processing import MGLlavaProcessor

    monkeypatch.setattr(MGLlavaProcessor, "takes_videos", False)
    with pytest.raises(EvaluationError, match=r"`model` takes no videos.*add_videos"):
        evaluate(*arguments, num_frames=FRAMES)
    assert not (tmp_path / "out").exists()


def test_frames_repeat_in_a_short_video(tmp_path):
    (tmp_path / "a.mkv").write_bytes(write(make_frames(1)))
    film = open_video(tmp_path / "a.mkv", 3)
    assert len(film.frames) == 3 and film.size == (WIDTH, HEIGHT)
