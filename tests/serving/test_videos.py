"""Videos in requests: the answers of the model alone, limits, and hostile files."""

import asyncio
import base64
import io
import json
import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgllava.cli import app as commands
from mgllava.serving import server, videos
from tests.processing.videos import make_frames, write, write_animation, write_sound
from tests.serving.requests import as_data_url, call, image, text
from tests.tiny import NUM_FUSED_TOKENS
from tests.training.conftest import tiny_video_processor, words_model

FRAMES = 3
PICTURE = Image.fromarray(make_frames(1)[0])
LIMITS = {"bytes": 100_000, "seconds": 2, "frames": 40, "side": 200}


class OneBox:
    """A detector; `seen` counts the images of each call."""

    def __init__(self):
        self.seen = []

    def detect(self, images):
        self.seen.append(len(images))
        return [{"boxes": [[2.0, 3.0, 20.0, 18.0]], "labels": ["mark"], "scores": [0.9]} for _ in images]


@pytest.fixture(scope="module")
def processor():
    return tiny_video_processor(FRAMES)


@pytest.fixture(scope="module")
def model(processor):
    model = words_model(video_token_id=processor.video_token_id)
    model.generation_config.update(do_sample=False, repetition_penalty=1.5)
    return model


@pytest.fixture
def start(model, processor, monkeypatch):
    """Start `mgllava serve` up to its HTTP server, and return a function that sends requests to its application."""
    processor.box_detector = OneBox()
    apps = []
    monkeypatch.setattr(server, "load", lambda *_, **options: (model, processor))
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: apps.append(app))

    def run(*options):
        result = CliRunner().invoke(commands, ["serve", "tiny", *map(str, options)])
        assert result.exit_code == 0, result.output

        def post(body, path="/v1/chat/completions"):
            answered = call(apps[-1], path, json.dumps({"max_tokens": 6, "temperature": 0, **body}).encode())
            return asyncio.run(answered)

        post.app = apps[-1]
        return post

    return run


@pytest.fixture
def post(start):
    limits = [word for name, most in LIMITS.items() for word in (f"--max-video-{name}", most)]
    return start("--max-videos", 2, *limits)


def video_url(data, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def show(data, kind="video/mp4", **extra):
    return {"type": "video_url", "video_url": {"url": video_url(data, kind)}, **extra}


def ask(*content):
    return [{"role": "user", "content": [*content, text("What?")]}]


def refusal(answer, param="messages[0].content[0].video_url.url", code=None):
    status, body = answer
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, code), body
    return body["error"]["message"]


@pytest.fixture(scope="module")
def movie():
    return write(make_frames(10))


def alone(model, processor, content, **options):
    """The answer of the model and the number of tokens of its prompt, without a server."""
    inputs = processor.apply_chat_template(
        ask(*content),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6)
    return processor.decode(output[0, length:], skip_special_tokens=True).lstrip(), length


def answer_of(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


# ----- answers


BOXES = [[[1, 2, 20, 20]], [], [[3, 3, 9, 9], [0, 0, 32, 24]]]


@pytest.mark.parametrize("boxes", [None, [], BOXES, {"frames": BOXES}, [None, [], {"boxes": [[1, 2, 20, 20]]}]])
def test_answer_is_that_of_the_model_alone(post, model, processor, movie, boxes):
    """Images and videos in one conversation, with the boxes of the request or of the detector."""
    expected = alone(
        model,
        processor,
        [
            {"type": "image", "image": PICTURE, "boxes": [[1, 1, 9, 9]]},
            {"type": "video", "video": movie, "boxes": [[]] * FRAMES if boxes == [] else boxes},
        ],
    )
    extra = {} if boxes is None else {"boxes": boxes}
    content = [image(as_data_url(PICTURE), boxes=[[1, 1, 9, 9]]), show(movie, **extra)]
    assert answer_of(post({"messages": ask(*content)})) == expected
    # The field of the request: one entry for each image and video, in their order.
    content = [image(as_data_url(PICTURE)), show(movie)]
    assert answer_of(post({"messages": ask(*content), "boxes": [[[1, 1, 9, 9]], boxes]})) == expected


def test_two_videos_in_other_turns(post, movie):
    other = write_animation(make_frames(4), "GIF")
    messages = [
        {"role": "user", "content": [show(movie, boxes=[]), text("First?")]},
        {"role": "assistant", "content": "Yes."},
        *ask(show(other, "image/gif", boxes=[])),
    ]
    whole, length = answer_of(post({"messages": messages}))
    assert length > 2 * FRAMES * NUM_FUSED_TOKENS
    status, body = post({"input": messages, "max_output_tokens": 6, "max_tokens": None}, "/v1/responses")
    assert status == 200 and body["output"][0]["content"][0]["text"].strip() == whole.strip(), body


def test_requests_may_ask_for_fewer_frames(post, model, processor, movie):
    blocks = [{"type": "video", "video": movie, "boxes": [[], []]}]
    expected = alone(model, processor, blocks, num_frames=2)
    assert answer_of(post({"messages": ask(show(movie, num_frames=2, boxes=[[], []]))})) == expected
    inside = {"type": "video_url", "video_url": {"url": video_url(movie), "num_frames": 2, "boxes": []}}
    assert answer_of(post({"messages": ask(inside)})) == expected
    param = "messages[0].content[0].num_frames"
    message = refusal(post({"messages": ask(show(movie, num_frames=4))}), param)
    assert "must be at most 3 (`--num-frames`), got 4" in message
    for wrong in (0, -1, 1.5, True, "3"):
        assert "a whole number, at least 1" in refusal(post({"messages": ask(show(movie, num_frames=wrong))}), param)


def test_a_frame_that_is_sampled_twice_is_detected_once(post, processor):
    short = write(make_frames(2))
    assert post({"messages": ask(show(short))})[0] == 200
    assert processor.box_detector.seen == [2]


# ----- options


def test_videos_are_off_by_default(start, movie):
    message = refusal(start()({"messages": ask(show(movie))}), "messages[0].content[0]", "unsupported")
    assert message.endswith("this server takes no videos; its operator can allow them (`--max-videos`).")


def test_models_without_videos(start, processor, movie, monkeypatch):
    """Image models of MG-LLaVA that were saved before, and other families."""
    monkeypatch.setattr(type(processor), "takes_videos", False)
    message = refusal(start()({"messages": ask(show(movie))}), "messages[0].content[0]", "unsupported")
    assert message.endswith("must be absent: this model takes no videos.")
    result = CliRunner().invoke(commands, ["serve", "tiny", "--max-videos", "1"])
    assert result.exit_code == 1 and "--max-videos must be 0: this model takes no videos" in result.output


@pytest.mark.parametrize(
    "options, said",
    [
        (["--num-frames", "4"], "--num-frames must be left out without --max-videos"),
        (["--max-videos", "1", "--num-frames", "0"], "--num-frames must be a positive number"),
        (["--max-videos", "-1"], "--max-videos must be at least 0"),
        (["--max-videos", "1", "--max-video-side", "0"], "--max-video-side must be greater than 0"),
        (["--max-videos", "1", "--video-timeout", "nan"], "--video-timeout must be greater than 0"),
    ],
)
def test_options_that_do_not_fit(start, options, said):
    result = CliRunner().invoke(commands, ["serve", "tiny", *options])
    assert result.exit_code == 1 and said in " ".join(result.output.split()) and "Traceback" not in result.output


def test_frames_beyond_the_context_are_refused_at_the_start(start, model, monkeypatch):
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", FRAMES * NUM_FUSED_TOKENS)
    result = CliRunner().invoke(commands, ["serve", "tiny", "--max-videos", "1"])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and f"context of {FRAMES * NUM_FUSED_TOKENS} tokens" in said
    assert f"Sample at most {FRAMES - 1}." in said


def test_a_prompt_beyond_the_context_is_refused_before_any_video_is_decoded(start, model, movie, monkeypatch):
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 2 * FRAMES * NUM_FUSED_TOKENS)
    monkeypatch.setattr(videos, "decode_video", None)
    post = start("--max-videos", 2)
    body = {"messages": ask(show(movie), show(movie))}
    message = refusal(post(body), None, "context_length_exceeded")
    assert f"got at least {2 * FRAMES * NUM_FUSED_TOKENS} for the frames of videos" in message
    assert "fewer images or frames" in message


def test_without_a_decoder_the_server_does_not_start(start, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    result = CliRunner().invoke(commands, ["serve", "tiny", "--max-videos", "1"])
    assert result.exit_code == 1 and "--max-videos needs PyAV" in result.output


# ----- what is refused


def long_video(count, side=32):
    """Many frames in few bytes."""
    frames = np.zeros((count, side, side, 3), np.uint8)
    return write(frames, "mpeg4", "yuv420p", "mp4")


def test_limits_are_named_with_their_options(post, movie):
    noise = np.random.default_rng(0).integers(0, 256, (5, 199, 199, 3), dtype=np.uint8)
    slow = write(make_frames(3), times=[0, 40, 80])
    for data, limit in (
        (write(noise), "at most 100,000 bytes (`--max-video-bytes`)"),
        (long_video(41), "at most 40 frames, got 41 or more"),
        (slow, "at most 2.0 seconds, got 2."),
        (long_video(1, 256), "at most 200 pixels on its longer side, got 256 or more"),
        (write_animation(make_frames(2, 300, 30), "GIF"), "at most 200 pixels on its longer side, got 300 or more"),
        (write_animation(np.repeat(make_frames(5), 10, axis=0), "WEBP"), "at most 2.0 seconds, got 3"),
    ):
        message = refusal(post({"messages": ask(show(data))}), code="video_too_large")
        assert limit in message and "--max-video-" in message
        assert message.startswith("`messages[0].content[0].video_url.url` must have at most")


def bomb(side):
    """An AVI file whose header says 32 x 24 pixels, and whose second frame has many more."""
    large = io.BytesIO()
    Image.new("L", (side, side)).save(large, "JPEG")
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        track = output.add_stream("mjpeg", rate=30)
        track.width, track.height, track.pix_fmt = 32, 24, "yuvj420p"
        output.mux(track.encode(av.VideoFrame.from_ndarray(make_frames(1)[0], "rgb24").reformat(format="yuvj420p")))
        for index in (1, 2):
            packet = av.Packet(large.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = track, index, index, Fraction(1, 30)
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: b"no video at all", "must be a video that can be decoded"),
        (lambda: b"", "must be a video that can be decoded"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "is a playlist"),
        (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "is a playlist"),
        (lambda: b"[playlist]\nFile1=/etc/hostname\n", "must be a video that can be decoded"),
        (write_sound, "it has no video stream"),
        (lambda: write(make_frames(10))[:1500], "must be a video that can be decoded"),
        (lambda: bomb(1500), "must be a video that can be decoded"),
    ],
)
def test_what_is_no_video_is_an_error_of_the_request(post, make, said):
    message = refusal(post({"messages": ask(show(make()))}), code="invalid_video")
    assert said in message and "1,500 or more" not in message  # the large frames were not decoded


def test_a_video_that_takes_too_long_to_decode_is_given_up(start, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(videos, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    message = refusal(
        start("--max-videos", 1, "--video-timeout", 20)({"messages": ask(show(long_video(100)))}),
        code="video_too_large",
    )
    assert "must be decoded within 20 seconds (`--video-timeout`)" in message
    assert next(clock) < 40  # not all frames were decoded


def test_more_videos_than_allowed(post, movie):
    message = refusal(post({"messages": ask(*[show(movie)] * 3)}), "messages[0].content[2]")
    assert "at most 2 videos (`--max-videos`)" in message


def test_other_urls_are_refused(post, movie):
    code = "invalid_video_url"
    for url in ("file:///etc/hostname", "/etc/hostname", "rtsp://example.com/a", 5, None):
        part = {"type": "video_url", "video_url": {"url": url}}
        assert "an http(s) URL or a data URL" in refusal(post({"messages": ask(part)}), code=code)
    message = refusal(post({"messages": ask(show(movie, "text/plain"))}), code=code)
    assert "must start with 'data:video/...;base64,'" in message
    private = {"type": "video_url", "video_url": "http://127.0.0.1:9/a.mp4"}
    message = refusal(post({"messages": ask(private)}), "messages[0].content[0].video_url", code)
    assert "public address" in message and "Send the video itself" in message
    unknown = refusal(post({"messages": ask(show(movie, fps=2))}), "messages[0].content[0].fps")
    assert "boxes, num_frames" in unknown


@pytest.mark.parametrize(
    "boxes, place, said",
    [
        ([[]] * 2, "boxes", "one entry for each of the 3 sampled frames, got 2"),
        ([[]] * 4, "boxes", "one entry for each of the 3 sampled frames, got 4"),
        ({"frames": [[]]}, "boxes.frames", "one entry for each of the 3 sampled frames, got 1"),
        ("all", "boxes", "a list with one entry per sampled frame"),
        ({"boxes": []}, "boxes", "a list with one entry per sampled frame"),
        ([[1, 2, 3, 4]], "boxes[0][0]", "four numbers"),
        ([[], [], [[1, 2, 3]]], "boxes", r"boxes[2]` must have shape"),
        ([[], [[500, 2, 700, 9]], []], "boxes", r"boxes[1]"),
        ([[], [[0, 0, 9, 9]] * 1001, []], "boxes[1]", "at most 1000 boxes"),
    ],
)
def test_boxes_that_do_not_fit(post, movie, boxes, place, said):
    status, body = post({"messages": ask(show(movie, boxes=boxes))})
    assert status == 400 and said in body["error"]["message"], body
    assert body["error"]["param"].startswith("messages[0].content[0].boxes"), body


def test_videos_are_of_users_only(post, movie):
    message = refusal(post({"messages": [{"role": "system", "content": [show(movie)]}]}), "messages[0].content[0]")
    assert "only messages of the user" in message


def test_texts_cannot_hold_the_placeholder_of_videos(post, processor, movie):
    plain = answer_of(post({"messages": ask(show(movie, boxes=[]))}))[1]
    with_tag = answer_of(post({"messages": ask(show(movie, boxes=[]), text("<video>"))}))[1]
    assert plain < with_tag < plain + 20
    status, body = post({"prompt": "A <video> tag, an <image> tag"}, "/v1/completions")
    assert status == 200 and 3 < body["usage"]["prompt_tokens"] < 40, body
    message = refusal(post({"prompt": [1, processor.video_token_id]}, "/v1/completions"), "prompt")
    assert "stands for videos" in message


def test_images_do_not_wait_for_a_video(start, movie, monkeypatch):
    """A video that takes long to decode holds up neither images nor text."""
    decode, may_decode, finished = videos.decode_video, threading.Event(), []
    monkeypatch.setattr("mgllava.serving.prompts.decode_video", lambda *args: may_decode.wait(60) and decode(*args))
    app = start("--max-videos", 1).app

    async def send(name, *content):
        body = json.dumps({"messages": ask(*content), "max_tokens": 1, "temperature": 0}).encode()
        status, _ = await call(app, "/v1/chat/completions", body)
        finished.append((name, status))

    async def all_three():
        video = asyncio.ensure_future(send("video", show(movie)))
        await send("image", image(as_data_url(PICTURE)))
        await send("text")
        may_decode.set()
        await video

    asyncio.run(all_three())
    assert finished == [("image", 200), ("text", 200), ("video", 200)]
