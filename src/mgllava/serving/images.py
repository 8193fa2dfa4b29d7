"""Images from untrusted clients: from bytes to pixels."""

import base64
import binascii
import io
import math

import PIL.Image

from mgllava.processing.images_common import load_upright

from .errors import RequestError
from .limits import ServingLimits

# Few decoders, as each of them reads untrusted bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def read_data_url(url: str, param: str, limits: ServingLimits, kind: str = "image") -> bytes:
    """Return the file in a data URL of the form `data:image/...;base64,...`; `param` is the field that held it.

    `kind` is `"image"` or `"video"`; a video may also be an animated image.
    """
    head, comma, payload = url.partition(",")
    starts = {f"data:{kind}/", "data:image/"}
    most = limits.image_bytes if kind == "image" else limits.video_bytes
    if not comma or not head.lower().startswith(tuple(starts)) or not head.lower().endswith(";base64"):
        raise RequestError(
            f"`{param}` must start with 'data:{kind}/...;base64,', got {head[:60]!r}.", param, f"invalid_{kind}_url"
        )
    payload = "".join(payload.split())  # `base64` and mail programs break lines
    payload += "=" * (-len(payload) % 4)
    size = len(payload) * 3 // 4 - payload[-2:].count("=")
    if size > most:
        raise RequestError(
            f"`{param}` must have at most {most:,} bytes (`--max-{kind}-bytes`), got {size:,}.",
            param,
            f"{kind}_too_large",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"`{param}` must be encoded as base64: {error}.", param, f"invalid_base64_{kind}") from None


def decode_image(data: bytes, param: str, limits: ServingLimits, pixels_left: int) -> PIL.Image.Image:
    """Decode an image file to RGB and turn it upright; refuse it if its header promises too many pixels.

    `pixels_left` is what the earlier images of the request have left of `limits.pixels`.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        side: float = max(image.size)
        if side <= min(limits.image_side, math.isqrt(pixels_left)):
            upright: PIL.Image.Image = load_upright(image)
            return upright
    except PIL.Image.DecompressionBombError:
        side = math.inf
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on broken files, struct.error and IndexError included
        known = ", ".join(_FORMATS)
        raise RequestError(
            f"`{param}` must be an image ({known}), got {len(data):,} bytes that cannot be read: "
            f"{error.__cause__ or error}",
            param,
            "invalid_image",
        ) from None
    if side > limits.image_side:
        got = "far more" if side == math.inf else side
        message = f"`{param}` must be at most {limits.image_side} pixels wide and high, got {got}."
    else:
        message = (
            f"The images of a request must have at most {limits.pixels:,} pixels together, each counted as the square "
            f"of its longer side. `{param}` has {side**2:,}, and the images before it left {pixels_left:,}."
        )
    raise RequestError(message, param, "image_too_large")


__all__ = ["decode_image", "read_data_url"]
