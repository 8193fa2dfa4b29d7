"""Messages of requests, without a model: what becomes of them, and what is refused."""

import pytest

from mgllava.serving import messages as module
from mgllava.serving.errors import RequestError
from mgllava.serving.limits import ServingLimits
from mgllava.serving.messages import ImageSource, MessageReader, VideoSource
from tests.serving.requests import image, text, user

URL = "https://host.test/a.png"
BOXES = [[1, 2, 3, 4], [5, 6.5, 7, 8]]
PART = "messages[0].content[0]"


def read(messages, takes_boxes=True, no_videos=None, limits=None, **options):
    return MessageReader(limits or ServingLimits(videos=2), takes_boxes, no_videos).read(messages, **options)


def turns_of(conversation):
    """Roles with their blocks, in which texts are strings and images and videos their types in brackets."""
    return [
        (turn["role"], [block["text"] if block["type"] == "text" else [block["type"]] for block in turn["content"]])
        for turn in conversation.messages
    ]


def answer(content="b", **more):
    return {"role": "assistant", "content": content, **more}


def system(content, role="system"):
    return {"role": role, "content": content}


TURNS = {
    "text": ([user("a")], [("user", ["a"])]),
    "parts": ([user(text("a"), text("b"), image(URL), text("c"))], [("user", ["ab", ["image"], "c"])]),
    "all kinds of text": (
        [
            user(text("a"), {"type": "input_text", "text": "b"}),
            answer([{"type": "output_text", "text": "c"}, {"type": "refusal", "refusal": "d"}]),
            user("e"),
        ],
        [("user", ["ab"]), ("assistant", ["cd"]), ("user", ["e"])],
    ),
    "empty text": ([user("")], [("user", [""])]),
    "assistant first": ([answer(), user("a")], [("user", [""]), ("assistant", ["b"]), ("user", ["a"])]),
    "assistant last": ([user("a"), answer()], [("user", ["a"]), ("assistant", ["b"]), ("user", [""])]),
    "two of a role": ([user("a"), user("b"), user(image(URL), text(""))], [("user", ["a\nb", ["image"], ""])]),
    "an image and text": ([user(text(""), image(URL)), user("b")], [("user", ["", ["image"], "b"])]),
    "two answers": (
        [user("a"), answer(), answer("c"), user("d")],
        [("user", ["a"]), ("assistant", ["b\nc"]), ("user", ["d"])],
    ),
    "no text in an answer": (
        [user("a"), answer(None), answer([]), answer("c"), user("d")],
        [("user", ["a"]), ("assistant", ["c"]), ("user", ["d"])],
    ),
    "systems": (
        [user("a"), system("S"), system("T", "developer"), answer(), user("c")],
        [("system", ["S\nT"]), ("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])],
    ),
    "system alone": ([system("S")], [("system", ["S"]), ("user", [""])]),
    "system and assistant": (
        [system("S"), answer()],
        [("system", ["S"]), ("user", [""]), ("assistant", ["b"]), ("user", [""])],
    ),
    "keys without effect": (
        [
            {**user("a"), "name": "me", "id": "1", "status": "completed", "type": "message"},
            answer(tool_calls=[], refusal=None, audio={}, function_call=""),
            {**user("c"), "name": None, "type": None},
        ],
        [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])],
    ),
}


@pytest.mark.parametrize(("messages", "turns"), TURNS.values(), ids=TURNS)
def test_turns(messages, turns):
    assert turns_of(read(messages)) == turns


def test_instructions_are_a_system_message_that_comes_first():
    conversation = read([system("S"), user("a")], root="input", instructions="I")
    assert turns_of(conversation) == [("system", ["I\nS"]), ("user", ["a"])] and conversation.param == "input"


BLOCK = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
DATA = "data:image/png;base64,AAAA"
SOURCES = [
    (image(URL), ImageSource(URL, f"{PART}.image_url.url", None, f"{PART}.boxes")),
    (image(URL, boxes=BOXES), ImageSource(URL, f"{PART}.image_url.url", BOXES, f"{PART}.boxes")),
    (
        {"type": "image_url", "image_url": {"url": URL, "boxes": BOXES, "detail": "low"}},
        ImageSource(URL, f"{PART}.image_url.url", BOXES, f"{PART}.image_url.boxes"),
    ),
    (
        {"type": "input_image", "image_url": URL, "boxes": [], "detail": "original"},
        ImageSource(URL, f"{PART}.image_url", [], f"{PART}.boxes"),
    ),
    ({"type": "image", "url": URL}, ImageSource(URL, f"{PART}.url", None, f"{PART}.boxes")),
    (
        {**BLOCK, "boxes": BOXES, "source_type": "base64", "id": "1", "index": 0},
        ImageSource(DATA, f"{PART}.base64", BOXES, f"{PART}.boxes"),
    ),
    (
        {**BLOCK, "base64": None, "data": "AAAA", "extras": {"boxes": BOXES, "detail": "auto"}},
        ImageSource(DATA, f"{PART}.data", BOXES, f"{PART}.extras.boxes"),
    ),
    (
        {"type": "video_url", "video_url": {"url": URL, "boxes": [None, BOXES], "num_frames": 1}},
        VideoSource(
            *(URL, f"{PART}.video_url.url", [None, BOXES], f"{PART}.video_url.boxes"),
            num_frames=1,
            num_frames_param=f"{PART}.video_url.num_frames",
        ),
    ),
    (
        {"type": "video_url", "video_url": URL, "boxes": {"frames": [[]]}, "num_frames": 2},
        VideoSource(
            *(URL, f"{PART}.video_url", [[]], f"{PART}.boxes.frames"),
            num_frames=2,
            num_frames_param=f"{PART}.num_frames",
        ),
    ),
    (
        {"type": "video_url", "video_url": URL},
        VideoSource(URL, f"{PART}.video_url", None, f"{PART}.boxes", num_frames_param=f"{PART}.num_frames"),
    ),
]


@pytest.mark.parametrize(("part", "source"), SOURCES)
def test_images_and_videos_in_all_forms(part, source):
    conversation = read([user(part, text())])
    assert conversation.sources == [source]
    kind = "video" if isinstance(source, VideoSource) else "image"
    assert turns_of(conversation) == [("user", [[kind], "What is it?"])]
    assert conversation.videos == (conversation.sources if kind == "video" else [])


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original", None])
def test_detail_has_no_effect(detail):
    assert read([user(image(URL, detail=detail), text())]).sources[0].url == URL


@pytest.mark.parametrize("url", ["HTTP://h.test/", "https://h.test/", "DATA:image/png;base64,AAAA"])
def test_schemes_have_any_case(url):
    assert read([user(image(url), text())]).sources[0].url == url


DETECTED = {"boxes": BOXES, "labels": ["a", 3], "scores": [0.5, 1]}


@pytest.mark.parametrize(
    "boxes", [[], BOXES, DETECTED, {"boxes": []}, {"boxes": BOXES, "labels": None, "scores": [0.1]}]
)
def test_boxes_in_the_field_of_the_request(boxes):
    """The processor checks the rest, once it has the image."""
    parts = image(URL), {"type": "video_url", "video_url": URL}, image(URL), text()
    sources = read([user(*parts)], boxes=[boxes, [boxes], None]).sources
    assert [(source.boxes, source.boxes_param) for source in sources] == [
        *((boxes, "boxes[0]"), ([boxes], "boxes[1]")),
        (None, f"{PART.removesuffix('[0]')}[2].boxes"),
    ]


NO_URL = {"type": "image_url", "image_url": {"url": "data:,"}}
VIDEO = {"type": "video_url", "video_url": URL}
REFUSED = [
    # The messages themselves: what is sent, the name and the code of the error, and some of its words.
    *[(value, "messages", None, "a list with at least one message") for value in ([], {}, "a", None)],
    *[([value], "messages[0]", None, "role and content") for value in ("a", None, [])],
    *[([system("a", role)], "messages[0].role", None, "'developer'") for role in ("tool", None, ["user"], "User")],
    ([{**user("a"), "tool_calls": [1]}], "messages[0].tool_calls", None, "does not call tools"),
    ([{**user("a"), "x" * 99: 1}], f"messages[0].{'x' * 50}", None, "does not know it"),
    *[([{**user("a"), key: 3}], f"messages[0].{key}", None, "a string") for key in ("name", "id", "status")],
    ([{**user("a"), "type": "call"}], "messages[0].type", None, "'message'"),
    *[([system(value, "user")], "messages[0].content", None, "a list of parts") for value in (None, [], {}, 3)],
    ([system(None)], "messages[0].content", None, "a list of parts"),
    # Parts.
    *[([user(part, text())], PART, None, "an object with a type") for part in ("a", None, [])],
    *[([user({"type": kind}, text())], f"{PART}.type", None, "'video_url'") for kind in ("file", None, [], 3)],
    *[([user({"type": kind}, text())], f"{PART}.text", None, "a string") for kind in ("text", "input_text")],
    ([user({"type": "refusal", "text": "a"}, text())], f"{PART}.refusal", None, "a string"),
    ([user({**text(), "boxes": BOXES}, text())], f"{PART}.boxes", None, "does not know it"),
    ([answer([image(URL)])], PART, None, "only messages of the user"),
    ([system([VIDEO])], PART, None, "only messages of the user"),
    # URLs.
    *[
        ([user(image(url), text())], f"{PART}.image_url.url", "invalid_image_url", "an http(s) URL or a data URL")
        for url in ("ftp://h.test/", "/etc/hostname", "", 3, None, "httpx://h.test/")
    ],
    *[
        ([user({**VIDEO, "video_url": url}, text())], f"{PART}.video_url", "invalid_video_url", "an http(s) URL")
        for url in ("ftp://h.test/", 3, None)
    ],
    ([user({"type": "input_image"}, text())], f"{PART}.image_url", "invalid_image_url", "an http(s) URL"),
    *[
        ([user(image(URL, detail=detail), text())], f"{PART}.detail", None, "'original'")
        for detail in ("huge", 3, {"a": 1})
    ],
    *[
        ([user({"type": "image", **more}, text())], PART, None, "must have `url`, or `base64` with `mime_type`")
        for more in ({}, {"url": URL, "data": "AAAA"}, {"base64": 3}, {"url": URL, "base64": "AAAA"})
    ],
    ([user({**BLOCK, "mime_type": None}, text())], f"{PART}.mime_type", None, "'image/png'"),
    ([user({**BLOCK, "extras": [1]}, text())], f"{PART}.extras", None, "an object"),
    ([user({**BLOCK, "extras": {"x": 1}}, text())], f"{PART}.extras.x", None, "does not know it"),
    ([user({**BLOCK, "extras": {"detail": "x"}}, text())], f"{PART}.extras.detail", None, "'original'"),
    ([user({**BLOCK, "file_id": "x"}, text())], f"{PART}.file_id", None, "does not know it"),
    ([user({**NO_URL, "num_frames": 3}, text())], f"{PART}.num_frames", None, "does not know it"),
    *[
        (
            [user({"type": "image_url", "image_url": {"url": URL, **more}}, text())],
            f"{PART}.image_url.{name}",
            None,
            "",
        )
        for more, name in (({"detail": "x"}, "detail"), ({"size": 1}, "size"))
    ],
    ([user({**VIDEO, "video_url": {"url": URL, "fps": 2}}, text())], f"{PART}.video_url.fps", None, "num_frames"),
    ([user({**VIDEO, "detail": "low"}, text())], f"{PART}.detail", None, "does not know it"),
    ([user({**VIDEO, "url": URL}, text())], f"{PART}.url", None, "does not know it"),
    *[
        ([user({**VIDEO, "num_frames": number}, text())], f"{PART}.num_frames", None, "a whole number, at least 1")
        for number in (0, -1, 1.5, True, "3")
    ],
    # Two of what there may be one of.
    (
        [user({"type": "image_url", "image_url": {"url": URL, "boxes": []}, "boxes": []}, text())],
        *(f"{PART}.image_url.boxes", None, f"there is `{PART}.boxes` already"),
    ),
    (
        [user({**VIDEO, "video_url": {"url": URL, "num_frames": 1}, "num_frames": 1}, text())],
        *(f"{PART}.video_url.num_frames", None, f"there is `{PART}.num_frames` already"),
    ),
    # Boxes.
    *[
        ([user(image(URL, boxes=boxes), text())], f"{PART}.boxes{place}", None, words)
        for boxes, place, words in (
            *[(value, "", "a list of x1, y1, x2, y2") for value in ("all", 3, {"boxes": None}, {"labels": []})],
            *[([value], "", "four numbers") for value in ("all", 3, {}, ["1", 2, 3, 4], [True, 1, 2, 3], [1e39] * 4)],
            ({"boxes": [], "file": "x"}, "", "boxes, labels, scores"),
            *[({"boxes": [], "labels": value}, ".labels", "a list of strings") for value in ("a", [1.5], [None])],
            *[({"boxes": [], "scores": value}, ".scores", "a list of numbers") for value in ("a", ["1"], [True])],
            ([[0, 0, 1, 1]] * 1001, "", "at most 1000 boxes, got 1001"),
        )
    ],
    *[
        ([user({**VIDEO, "boxes": boxes}, text())], f"{PART}.boxes{place}", None, words)
        for boxes, place, words in (
            *[(value, "", "one entry per sampled frame") for value in ("all", 3, {"boxes": []})],
            ({"frames": 3}, ".frames", "one entry per sampled frame"),
            ({"frames": [None, "all"]}, ".frames[1]", "a list of x1, y1, x2, y2"),
            ([[], [[0, 0, 1, 1]] * 1001], "[1]", "at most 1000 boxes, got 1001"),
        )
    ],
]


@pytest.mark.parametrize(("messages", "param", "code", "words"), REFUSED)
def test_what_is_refused_is_named(messages, param, code, words):
    with pytest.raises(RequestError) as error:
        read(messages)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code), error.value.message
    assert error.value.message.startswith(f"`{param}") and words in error.value.message


@pytest.mark.parametrize(
    ("boxes", "param", "words"),
    [
        *[(value, "boxes", "one entry per image and video") for value in ("a", {}, [], [None], [None] * 3)],
        ([BOXES, BOXES], "boxes", f"`boxes[1]` must be null: there is `{PART.removesuffix('[0]')}[1].boxes` already"),
        (["all", None], "boxes[0]", "a list of x1, y1, x2, y2"),
    ],
)
def test_boxes_that_do_not_fit_the_images(boxes, param, words):
    with pytest.raises(RequestError) as error:
        read([user(image(URL), image(URL, boxes=BOXES), text())], boxes=boxes)
    assert error.value.param == param and words in error.value.message


@pytest.mark.parametrize("boxes", [[], BOXES, "all", {"boxes": []}])
def test_models_without_boxes_take_none(boxes):
    for part, options in ((image(URL, boxes=boxes), {}), (image(URL), {"boxes": [boxes]})):
        with pytest.raises(RequestError, match=r"must be absent: this model has no boxes\.") as error:
            read([user(part, text())], takes_boxes=False, **options)
        assert error.value.code == "unsupported"
    assert read([user(image(URL, boxes=None), text())], takes_boxes=False).sources[0].boxes is None


def test_models_without_videos_take_none():
    with pytest.raises(RequestError) as error:
        read([user(VIDEO, text())], no_videos="it is blind")
    assert (error.value.param, error.value.code) == (PART, "unsupported")
    assert error.value.message == f"`{PART}` must be absent: it is blind."
    assert read([user(image(URL), text())], no_videos="it is blind").sources


@pytest.mark.parametrize(("kind", "part"), [("image", image(URL)), ("video", VIDEO)])
def test_images_and_videos_are_counted_over_all_turns(kind, part):
    limits, other = ServingLimits(images=3, videos=3), VIDEO if kind == "image" else image(URL)
    turns = [user(part, part, other, text()), answer(), user(part, text())]
    assert len(read(turns, limits=limits).sources) == 4
    turns[2]["content"] = [other, part, part]
    with pytest.raises(RequestError) as error:
        read(turns, limits=limits)
    assert error.value.param == "messages[2].content[2]"
    assert f"at most 3 {kind}s (`--max-{kind}s`)" in error.value.message


def test_boxes_up_to_the_limit():
    assert read([user(image(URL, boxes=[[0, 0, 1, 1]] * 1000), text())]).sources[0].boxes


@pytest.mark.parametrize(
    ("limit", "fitting", "words"),
    [
        ("MAX_MESSAGES", [user("a")] * 6, "at most 6 messages, got 7"),
        ("MAX_PARTS", [user(*[text("")] * 3)] * 2, "at most 6 parts"),
        ("MAX_TEXT_CHARACTERS", [system("ab"), user(text("c"), image(URL), text("d")), answer("ef")], "got 7"),
    ],
)
def test_messages_parts_and_characters_have_limits(monkeypatch, limit, fitting, words):
    monkeypatch.setattr(module, limit, 6)
    read(fitting)
    with pytest.raises(RequestError) as error:
        read([*fitting, user("x")])
    code = "context_length_exceeded" if limit == "MAX_TEXT_CHARACTERS" else None
    assert error.value.param == "messages" and error.value.code == code and words in error.value.message
