"""The child process that touches pixels: decodes a file completely and writes its thumbnail.

    python -m worker.decode MEMORY_BYTES MAX_PIXELS THUMBNAIL_PIXELS TIMEOUT_S

Requests come as JSON lines `[[source, thumbnail], …]`, answers leave as JSON lines `[answer, …]` in the same
order, where an answer is `{"width", "height", "format"}` or `{"code", "reason"}`. Answers to small files are
gathered for a moment. The process ends with its standard input, that is, with its parent.
"""

import io
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from typing import IO, Any, cast

from PIL import BmpImagePlugin as _bmp  # noqa: F401 - the plugins of the formats that are read, and no others
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import GifImagePlugin as _gif  # noqa: F401
from PIL import JpegImagePlugin as _jpeg  # noqa: F401
from PIL import PngImagePlugin as _png  # noqa: F401
from PIL import TiffImagePlugin as _tiff  # noqa: F401
from PIL import WebPImagePlugin as _webp  # noqa: F401

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NOT_AN_IMAGE = "It is not a picture in a format that is read: JPEG, PNG, WebP, GIF, BMP, TIFF."
_QUALITY = 85
_GATHER_S = 0.02
_ALARM_SLACK_S = 5

# The limit on pixels is ours, and refuses; Pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None


class RejectedError(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def picture(source: IO[bytes], *, max_pixels: int, thumbnail_pixels: int) -> tuple[dict[str, Any], bytes]:
    """Check a picture to its last byte: its size and format, and a JPEG of at most `thumbnail_pixels` a side.

    Raises `RejectedError` for whatever is no picture that we read.
    """
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        raise RejectedError("not-an-image", NOT_AN_IMAGE) from None
    with image:
        if image.width * image.height > max_pixels:
            raise RejectedError(
                "too-many-pixels",
                f"It has {image.width} x {image.height} pixels; at most {max_pixels} in all are read.",
            )
        # Pillow turns TIFFs itself, and gives the size of the turned picture.
        orientation = 1 if image.format == "TIFF" else _orientation(image)
        width, height = image.size if orientation < 5 else image.size[::-1]
        found = "JPEG" if image.format == "MPO" else str(image.format)
        # The whole stream is read all the same; only fewer pixels are computed.
        image.draft(None, (thumbnail_pixels, thumbnail_pixels))
        image.load()
        small = _upright(_small_rgb(image, thumbnail_pixels), orientation)
    return {"width": width, "height": height, "format": found}, _jpeg_bytes(small)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; looked for only where there can be one, since most small files have none."""
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken metadata is no reason to refuse a good picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn the thumbnail, not the picture: that is cheaper."""
    if orientation == 1:
        return image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.info = {"exif": exif.tobytes()}
    return ImageOps.exif_transpose(image)


def _small_rgb(image: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels each way; any mode to RGB, what is transparent becomes white, more bits become 8."""
    image = _eight_bits(image)
    transparent = image.has_transparency_data
    if transparent and image.mode not in ("RGBA", "LA"):
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side), reducing_gap=2.0)
    if transparent:
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits lose their lower half; wider and floating numbers are stretched from darkest to brightest."""
    if image.mode.startswith("I;16"):
        low, high, top = 0.0, 65535.0, 65535.0
        image = image.convert("I")
    elif image.mode in ("I", "F"):
        low, high = cast("tuple[float, float]", image.getextrema())
        top = 65535.0 if image.mode == "I" and low >= 0 and high <= 65535 and image.format == "PNG" else high
    else:
        return image
    if top == 65535.0 and low >= 0:
        low, high = 0.0, 65535.0
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RejectedError("damaged", "The picture is damaged: it has values that are no finite numbers.")
    scale = 255.0 / (high - low) if high > low else 0.0
    offset = -low * scale
    return image.point(lambda value: value * scale + offset).convert("L")


def _jpeg_bytes(image: Image.Image) -> bytes:
    # Pillow would copy a comment of the original.
    image.info = {}
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def decode(source: str, thumbnail: str, *, max_pixels: int, thumbnail_pixels: int) -> dict[str, Any]:
    """The answer for one file, whatever it holds; writes `thumbnail` for a picture."""
    try:
        with open(source, "rb") as file:  # noqa: PTH123 - a path object costs more than the call
            answer, small = picture(file, max_pixels=max_pixels, thumbnail_pixels=thumbnail_pixels)
    except RejectedError as error:
        return {"code": error.code, "reason": str(error)}
    except MemoryError:
        return {"code": "too-much-memory", "reason": "It takes more memory to decode than is allowed."}
    except Exception as error:  # noqa: BLE001 - a decoder's surprise is the file's fault, not ours
        return _broken(error)
    try:
        descriptor = os.open(thumbnail, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with os.fdopen(descriptor, "wb", buffering=0, closefd=False) as out:
                if out.write(small) != len(small):
                    raise OSError("short write")
        finally:
            os.close(descriptor)
    except OSError as error:
        return {"errno": error.errno or 28}
    return answer


def _broken(error: Exception) -> dict[str, Any]:
    message = str(error) or type(error).__name__
    truncated = isinstance(error, EOFError) or "truncated" in message.lower()
    if truncated:
        return {"code": "truncated", "reason": f"The picture is cut short: {message}."}
    return {"code": "damaged", "reason": f"The picture is damaged: {message[:200]}."}


def main() -> None:
    memory_bytes, max_pixels, thumbnail_pixels, timeout_s = map(int, sys.argv[1:5])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    gathered: list[dict[str, Any]] = []
    _tell(gathered)  # it is there: from here on a sudden end is a file's doing
    for line in sys.stdin:
        told = time.monotonic()
        for source, thumbnail in json.loads(line):
            now = time.monotonic()
            if gathered and now - told > _GATHER_S:
                _tell(gathered)
                told = now
            # The parent kills a slow decoder earlier; this ends one whose parent is gone.
            signal.alarm(timeout_s + _ALARM_SLACK_S)
            gathered.append(decode(source, thumbnail, max_pixels=max_pixels, thumbnail_pixels=thumbnail_pixels))
        signal.alarm(0)
        _tell(gathered)


def _tell(gathered: list[dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps(gathered) + "\n")
    sys.stdout.flush()
    gathered.clear()


if __name__ == "__main__":
    main()
