"""Small odd videos, written with PyAV."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

WIDTH, HEIGHT = 32, 24


def make_frames(count=10, width=WIDTH, height=HEIGHT, gray=False):
    """Frames of smooth colors, each of another color, with a mark in the upper left corner."""
    y, x = np.mgrid[:height, :width]
    frames = np.zeros((count, height, width, 3), np.uint8)
    for index in range(count):
        level = 30 + 18 * (index % 11)
        frames[index] = np.stack([level + 0 * x, 60 + 2 * x, 200 - level // 2 + y], axis=-1)
        frames[index, : height // 3, : width // 3] = (230, 230, 40)
    return np.repeat(frames[..., :1], 3, axis=-1) if gray else frames


def write(
    frames,
    codec="ffv1",
    pix_fmt="bgr0",
    container="matroska",
    times=None,
    audio=False,
    streams=1,
    file=None,
    **options,
):
    """Encode frames, and return the bytes of the file; `times` are in units of 1/30 s."""
    file = io.BytesIO() if file is None else file
    muxer = {name: options.pop(name) for name in ("movflags", "live", "flush_packets") if name in options}
    with av.open(file, "w", format=container, options={name: str(value) for name, value in muxer.items()}) as output:
        tracks = []
        for _ in range(streams):
            track = output.add_stream(codec, rate=30, options={name: str(value) for name, value in options.items()})
            track.width, track.height, track.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
            track.codec_context.time_base = Fraction(1, 30)
            tracks.append(track)
        sound = output.add_stream("pcm_s16le", rate=8000, layout="mono") if audio else None
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.rate, silence.pts = 8000, 0
            output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
        for index, pixels in enumerate(frames):
            for track in tracks:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
                frame.pts = index if times is None else times[index]
                frame.time_base = Fraction(1, 30)
                output.mux(track.encode(frame))
        for track in tracks:
            output.mux(track.encode(None))
    return file.getvalue()


class Unseekable(io.BytesIO):
    """A stream: what was written cannot be completed later, so headers have no counts."""

    def seekable(self):
        return False

    seek = None


def write_sound(with_cover=False):
    """A file with sound alone, or with a picture that belongs to it."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        sound = output.add_stream("flac", rate=8000, layout="mono")
        if with_cover:
            cover = output.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            output.mux(cover.encode(av.VideoFrame.from_ndarray(make_frames(1)[0], format="rgb24")))
            output.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        silence.rate = 8000
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    return file.getvalue()


def rotate(data, degrees):
    """Set the matrix of an MP4 track, by which players turn its frames clockwise."""
    place = data.index(b"tkhd") + 4 + 40
    matrices = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (value * 0x10000 for value in matrices[degrees])
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    return data[:place] + matrix + data[place + 36 :]


def claim_frames(data, count):
    """Change the number of frames in the header of an AVI file."""
    place = data.index(b"avih") + 8 + 16
    return data[:place] + struct.pack("<I", count) + data[place + 4 :]


def write_animation(frames, kind):
    """Write an animation with Pillow."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    images[0].save(file, kind, save_all=True, append_images=images[1:], duration=100, loop=0, **options)
    return file.getvalue()
