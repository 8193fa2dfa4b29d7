"""Images of every kind, given in every way to the image processors of both packages, and errors for other inputs."""

import base64
import http.server
import io
import os
import resource
import struct
import threading
import zlib
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch

from mgllava import (
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
)
from mgllava.processing import images_common

SIDE = 16
RAW = {"do_rescale": False, "do_normalize": False}
OF_MGLLAVA = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
OF_RAM_PLUS = {"size": {"height": SIDE, "width": SIDE}, "do_exif_transpose": True}
PROCESSORS = [
    MGLlavaImageProcessorPil(**OF_MGLLAVA),
    MGLlavaImageProcessor(**OF_MGLLAVA),
    RamPlusImageProcessorPil(**OF_RAM_PLUS),
    RamPlusImageProcessor(**OF_RAM_PLUS),
]
with_each_processor = pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
PROCESSOR = PROCESSORS[1]  # all open images with the same function

GRAY = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
GRAY[0, 0], GRAY[0, 1] = 0, 255
COLORS = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
RGB = COLORS[..., :3]


def gray(levels):
    return np.repeat(np.asarray(levels)[..., None], 3, axis=2)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data):
    return np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def png_of_16_bits(pixels, color_type):
    """Write a PNG by hand, since Pillow cannot write 16-bit color."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(*entries):  # (tag, type, count, value), little endian
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def jpeg_with_exif(exif):
    app1 = b"Exif\0\0" + exif
    data = encoded(PIL.Image.fromarray(RGB), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + data[2:]


def pictures():
    """Return image files, each with its pixels in 8-bit RGB."""
    deep = GRAY.astype(np.uint16) * 257
    plain, rgba = PIL.Image.fromarray(GRAY), PIL.Image.fromarray(COLORS, "RGBA")
    palette = PIL.Image.fromarray(RGB).quantize(8)
    transparent = encoded(palette, transparency=bytes(range(8)))
    bits = plain.convert("1")
    turned = PIL.Image.Exif()
    turned[0x112] = 6
    jpeg = decoded(encoded(PIL.Image.fromarray(RGB), "JPEG"))
    cmyk = encoded(PIL.Image.fromarray(RGB).convert("CMYK"), "JPEG")
    pgm = b"P5\n%d %d\n65535\n" % (SIDE, SIDE) + deep.astype(">u2").tobytes()
    return {
        "gray": (encoded(plain), gray(GRAY)),
        "gray of 16 bits": (encoded(PIL.Image.fromarray(deep)), gray(GRAY)),
        "gray of 16 bits, TIFF": (encoded(PIL.Image.fromarray(deep), "TIFF"), gray(GRAY)),
        "gray of 16 bits, big endian": (encoded(PIL.Image.fromarray(deep.astype(">u2")), "TIFF"), gray(GRAY)),
        "gray of 16 bits, PGM": (pgm, gray(GRAY)),
        "gray of 32 bits": (encoded(PIL.Image.fromarray(deep.astype(np.int32)), "TIFF"), gray(GRAY)),
        "8 bits in 32": (encoded(PIL.Image.fromarray(GRAY.astype(np.int32)), "TIFF"), gray(GRAY)),
        "floats of 0..1": (encoded(PIL.Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), gray(GRAY)),
        "floats of 0..255": (encoded(PIL.Image.fromarray(GRAY.astype(np.float32)), "TIFF"), gray(GRAY)),
        "gray and alpha": (encoded(PIL.Image.fromarray(COLORS[..., :2], "LA")), gray(COLORS[..., 0])),
        "gray and alpha of 16 bits": (png_of_16_bits(COLORS[..., :2] * np.uint16(257), 4), gray(COLORS[..., 0])),
        "color of 16 bits": (png_of_16_bits(RGB * np.uint16(257), 2), RGB),
        "color and alpha": (encoded(rgba), RGB),
        "palette": (encoded(palette), np.array(palette.convert("RGB"))),
        "palette with transparency": (transparent, np.array(palette.convert("RGB"))),
        "one bit": (encoded(bits), gray(np.where(np.array(bits), 255, 0).astype(np.uint8))),
        "CMYK": (cmyk, decoded(cmyk)),
        "animation": (
            encoded(palette, "GIF", save_all=True, append_images=[palette.transpose(0)]),
            np.array(palette.convert("RGB")),
        ),
        "turned": (jpeg_with_exif(tiff((0x112, 3, 1, 6))), np.rot90(jpeg, -1)),
        "no TIFF header in the EXIF": (jpeg_with_exif(b"XX*\0garbage"), jpeg),
        "turned, and an entry of another type": (
            jpeg_with_exif(tiff((0x112, 3, 1, 6), (0x11A, 2, 1, 65))),
            np.rot90(jpeg, -1),
        ),
        "an orientation that does not exist": (jpeg_with_exif(tiff((0x112, 3, 1, 77))), jpeg),
        "an orientation that is text": (jpeg_with_exif(tiff((0x112, 2, 2, 0x36))), jpeg),
        "cut EXIF": (jpeg_with_exif(tiff((0x112, 3, 1, 6), (0x11A, 5, 1, 4000))[:-6]), np.rot90(jpeg, -1)),
        "gray of 16 bits, turned": (encoded(PIL.Image.fromarray(deep), exif=turned), np.rot90(gray(GRAY), -1)),
    }


PICTURES = pictures()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, (data, _) in enumerate(PICTURES.values()):
        (folder / f"{number}.img").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with (
        pytest.MonkeyPatch.context() as patch,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server,
    ):
        patch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def levels(processor, images):
    return [np.asarray(pixels).transpose(1, 2, 0) for pixels in processor(images, **RAW)["pixel_values"]]


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency", "ignore:Corrupt EXIF data")
def test_an_image_is_the_same_however_it_is_given(kind, folder, site):
    data, expected = PICTURES[kind]
    path = folder / f"{list(PICTURES).index(kind)}.img"
    text = base64.b64encode(data).decode()
    with path.open("rb") as file:
        ways = {
            "path": path,
            "text of the path": str(path),
            "PIL": PIL.Image.open(path),
            "bytes": data,
            "bytearray": bytearray(data),
            "memory file": io.BytesIO(data),
            "file": file,
            "base64": text,
            "base64 in lines": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
            "base64 of URLs without padding": text.translate(str.maketrans("+/", "-_")).rstrip("="),
            "data URL": f"data:image/png;base64,{text}",
            "data URL between spaces": f" data:image/png;base64,{text}\n",
            "URL": f"{site}/{path.name}",
            "URL between spaces": f" {site}/{path.name}\n",
            "stored by datasets": {"bytes": data, "path": "elsewhere.png"},
            "not stored by datasets": {"bytes": None, "path": str(path)},
            "block with a path": {"type": "image", "path": str(path)},
            "block with base64": {"type": "image", "base64": text},
            "block with an image": {"type": "image", "image": PIL.Image.open(path)},
            "block of OpenAI": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        }
        found = levels(PROCESSOR, list(ways.values()))
    for way, pixels in zip(ways, found, strict=True):
        np.testing.assert_array_equal(pixels, expected, err_msg=way)


@with_each_processor
def test_arrays_are_read_alike(processor):
    first = np.moveaxis(RGB, -1, 0)
    for given in (
        RGB,
        COLORS,  # alpha is dropped
        np.asarray(PIL.Image.fromarray(RGB)),  # read-only
        RGB[::-1].copy()[::-1],  # negative strides
        np.array(first),
        torch.from_numpy(RGB),
        RGB.astype(np.int64),
        RGB.astype(np.uint32),
        RGB.astype(">i2"),
        RGB * np.uint16(257),
        (RGB * np.uint16(257)).astype(">u2"),
        torch.from_numpy(RGB * np.uint16(257)),
        RGB.astype(np.float32),
        (RGB / 255).astype(np.float16),
        torch.from_numpy(RGB / 255).to(torch.float64).requires_grad_(),
        RGB / 255 * 1.0005 - 0.0002,  # rounding errors
        np.stack([RGB]),
    ):
        (pixels,) = levels(processor, given)
        np.testing.assert_array_equal(pixels, RGB, err_msg=str(given)[:200])
    for given in (GRAY, GRAY / 255, GRAY * np.uint16(257), torch.from_numpy(GRAY), GRAY[..., None], GRAY[None]):
        np.testing.assert_array_equal(levels(processor, given)[0], gray(GRAY))
    np.testing.assert_array_equal(levels(processor, GRAY > 100)[0], gray((GRAY > 100) * np.uint8(255)))


@with_each_processor
def test_a_batch_of_floats_has_one_range(processor):
    batch = np.stack([RGB, np.zeros_like(RGB)]).astype(np.float32)
    batch[1] += 0.75  # nearly black, since its neighbor is in 0..255
    assert levels(processor, batch)[1].max() == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_prompt_may_have_an_empty_batch(dtype):
    np.testing.assert_array_equal(levels(PROCESSOR, [np.zeros((0, SIDE, SIDE, 3), dtype), [RGB]]), [RGB])


def test_images_may_be_nested_in_any_sequence(folder):
    names = [str(folder / "0.img"), str(folder / "11.img")]
    expected = [gray(GRAY), RGB]
    for given in (tuple(names), (name for name in names), np.array(names), np.array([*names, None], object)[:2]):
        np.testing.assert_array_equal(levels(PROCESSOR, given), expected)
    mixed = [names[0], [PIL.Image.fromarray(RGB), [np.stack([RGB, RGB])]], ()]
    np.testing.assert_array_equal(levels(PROCESSOR, mixed), [gray(GRAY), RGB, RGB, RGB])


def test_files_are_opened_one_by_one(folder):
    names = sorted(os.listdir("/proc/self/fd"), key=int) if os.path.isdir("/proc/self/fd") else []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(names[-1]) + 8 if names else 256, hard))
    try:
        opened = PROCESSOR.fetch_images([folder / "0.img"] * 300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(opened) == 300


def test_opening_twice_turns_once():
    data, expected = PICTURES["turned"]
    processor = PROCESSORS[0]
    twice = processor.fetch_images(processor.fetch_images([data]))
    np.testing.assert_array_equal(np.array(twice[0]), expected)


def test_a_file_that_was_just_written_is_read_from_its_beginning():
    file = io.BytesIO()
    PIL.Image.fromarray(RGB).save(file, "PNG")
    np.testing.assert_array_equal(levels(PROCESSORS[0], [file, file]), [RGB, RGB])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("absent", "no such file. Check the path"),
        ("folder", "got the folder .* Pass its files"),
        ("text", "not in a format that Pillow knows"),
        ("cut", "can be decoded.*damaged"),
        ("empty", "not in a format that Pillow knows"),
    ],
)
def test_files_that_are_not_images_are_named(make, said, tmp_path):
    path = tmp_path / "picture.png"
    if make == "folder":
        path.mkdir()
    elif make != "absent":
        whole = encoded(PIL.Image.fromarray(RGB))
        path.write_bytes({"text": b"not an image" * 9, "cut": whole[: len(whole) // 2], "empty": b""}[make])
    good = PIL.Image.fromarray(RGB)
    for given in (path, str(path), {"path": str(path)}):
        for error in (ValueError, OSError):
            with pytest.raises(error, match=rf"(?s)`images\[1\]`.*{said}") as caught:
                PROCESSOR([good, given])
            assert "picture.png" in str(caught.value) and "padding" not in str(caught.value)
    with pytest.raises(ValueError, match=r"`images\[0\]\[1\]`"):
        PROCESSOR([[good, path]])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("", ValueError, "got an empty string"),
        ("no/such/file.png", ValueError, "got 'no/such/file.png', and there is no such file"),
        ("a" * 5000, ValueError, r"which is not in a format|5,000 characters"),
        ("data:image/png;base64,%%%", ValueError, "must be a data URL like"),
        ("data:image/png", ValueError, "must be a data URL like"),
        ("http://127.0.0.1:9/a.png", ValueError, "cannot be downloaded from 'http://127.0.0.1:9/a.png'.*Connect"),
        ("https://[bad", ValueError, r"cannot be downloaded from 'https://\[bad'"),
        (b"text", ValueError, "got 4 bytes, which is not in a format"),
        (io.StringIO("text"), TypeError, "opened in binary mode"),
        ({"type": "image"}, TypeError, r"got none under the keys \['type'\]"),
        ({"url": "a.png", "path": "b.png"}, TypeError, "must have one image, .* got url, path"),
        ({1, 2}, TypeError, "got set"),
        (3, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        (np.array([1 + 2j] * 4).reshape(2, 2), TypeError, "got an array of complex128"),
        (np.zeros(5), TypeError, r"got an array of shape \(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((0, 5), np.uint8), ValueError, "at least one pixel"),
        (np.full((5, 5, 3), np.nan), ValueError, "values from 0 to 255.*got nan"),
        (np.full((5, 5, 3), -1.0), ValueError, "got -1.0 to -1.0.*normalized already"),
        (np.linspace(0, 1.2, 75).reshape(5, 5, 3), ValueError, "a little above 1. Clip them to 0..1"),
        (np.full((5, 5, 3), 300), ValueError, "got 300 to 300"),
        (np.zeros((7, 7, 5), np.uint8), ValueError, r"shape \(7, 7, 5\): neither end"),
        (PIL.Image.fromarray(np.full((5, 5), -3, np.int32)), ValueError, "must hold values from 0 to 255"),
        (PIL.Image.fromarray(np.full((5, 5), 70000, np.int32)), ValueError, "from 0 to 65535.*70000"),
        (PIL.Image.fromarray(np.full((5, 5), np.nan, np.float32)), ValueError, "got nan"),
    ],
)
def test_what_is_not_an_image_is_named(given, error, said):
    with pytest.raises(error, match=f"(?s)`images.*{said}"):
        PROCESSOR([given])


def test_errors_do_not_print_the_data():
    text = base64.b64encode(b"not an image" * 5000).decode()
    for given in (text, f"data:image/png;base64,{text}", b"not an image" * 5000, {"base64": text}):
        with pytest.raises(ValueError, match="not in a format") as caught:
            PROCESSOR([given])
        assert len(str(caught.value)) < 400


def test_a_download_stops_behind_its_limit(site, folder):
    data = (folder / "0.img").read_bytes()
    read = partial(images_common.binary_file, f"{site}/0.img", "image")
    assert read(len(data)).read() == data
    assert len(data) > 100 and 100 < len(read(100).read()) <= len(data)
    with pytest.raises(ValueError, match=f"`image` cannot be downloaded from '{site}/absent.png'.*404"):
        images_common.binary_file(f" {site}/absent.png", "image", 100)


def test_a_url_without_a_picture_is_named(site):
    for processor in PROCESSORS:
        with pytest.raises(
            ValueError, match=rf"`images\[0\]` cannot be downloaded from '{site}/absent.png' \(status 404"
        ):
            processor([f"{site}/absent.png"])


def test_a_decompression_bomb_is_named(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=r"`images\[0\]`.*raise PIL.Image.MAX_IMAGE_PIXELS"):
        PROCESSORS[0]([PICTURES["gray"][0]])


def test_16_bits_that_are_nearly_black_give_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr(images_common.logger, "warning_once", messages.append)
    images_common.as_rgb(RGB.astype(np.uint16))
    assert len(messages) == 1 and "65535 is white" in messages[0]
    images_common.as_rgb(RGB * np.uint16(257))
    assert len(messages) == 1
