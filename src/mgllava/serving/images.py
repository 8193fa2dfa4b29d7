"""Images from untrusted clients: bytes to pixels."""

import base64
import binascii
import io

import PIL.Image

from mgllava.processing.images_common import load_upright
from mgllava.serving.errors import RequestError
from mgllava.serving.limits import ServingLimits

# Few decoders, as each of them reads what strangers send.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def read_data_url(url: str, param: str, limits: ServingLimits) -> bytes:
    """Decode a data URL.

    Args:
        url (`str`): `data:image/...;base64,...`.
        param (`str`): The field of the request that held it.
        limits ([`ServingLimits`]): How large it may be.

    Returns:
        `bytes`: The image file; not yet known to be one.

    Raises:
        RequestError: If it is no data URL of an image, or too large.
    """
    head, comma, payload = url.partition(",")
    kind = head.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise RequestError(
            f"`{param}` must start with 'data:image/...;base64,', got {head[:60]!r}.", param, "invalid_image_url"
        )
    payload = "".join(payload.split())  # `base64` and mail programs break lines
    payload += "=" * (-len(payload) % 4)
    size = len(payload) * 3 // 4  # padding included
    if size > limits.image_bytes + 2:
        raise RequestError(
            f"`{param}` must be an image of at most {limits.image_bytes:,} bytes, got about {size:,}.",
            param,
            "image_too_large",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"`{param}` must be encoded as base64: {error}.", param, "invalid_base64_image") from None


def decode_image(data: bytes, param: str, limits: ServingLimits) -> PIL.Image.Image:
    """Decode an image file whose header promises a bearable size, and turn it upright.

    Args:
        data (`bytes`): The file.
        param (`str`): The field of the request that held it.
        limits ([`ServingLimits`]): How many pixels it may have.

    Returns:
        `PIL.Image.Image`: The image, decoded, RGB.

    Raises:
        RequestError: If it is no image of a known format, broken, or too large.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        side = max(image.size)
        if side <= limits.image_side:
            upright: PIL.Image.Image = load_upright(image)
            return upright
    except PIL.Image.DecompressionBombError:
        side = None
    except MemoryError:
        raise
    except Exception as error:  # broken files make decoders raise whatever comes, struct.error and IndexError included
        known = ", ".join(_FORMATS)
        raise RequestError(
            f"`{param}` must be an image ({known}), got {len(data):,} bytes that cannot be read: "
            f"{error.__cause__ or error}",
            param,
            "invalid_image",
        ) from None
    raise RequestError(
        f"`{param}` must be at most {limits.image_side} pixels wide and high, got {side or 'far more'}.",
        param,
        "image_too_large",
    )
