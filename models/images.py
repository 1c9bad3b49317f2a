"""From a picture file to the square of pixels that a backbone reads.

The whole picture is squashed into the square. The usual alternative, resizing the short side and keeping the
centre, throws away a quarter of a 3:4 photo, and in an unlabelled collection nothing says that the subject
stands in the middle.
"""

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

# Part of the feature cache's address: change it whenever the pixels that `decode` returns change.
PREPROCESSING = "squash-bilinear-2"

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # multi-picture JPEGs open as JPEG

# Broken metadata, of which it warns, is no reason to refuse a good picture.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Pillow registers its formats when it first meets one it does not know: here, before several threads do.
Image.init()

# How a picture is turned upright, by EXIF's orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """A file that is missing, truncated, damaged, too large or no picture at all."""


def decode(path: Path, size: int) -> np.ndarray:
    """The picture as `uint8` of shape (size, size, 3).

    EXIF orientation is applied, transparency laid on white, every mode turned into RGB.

    Raises:
        UnreadableError: it is no picture in one of `FORMATS`.

    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # JPEG decoders scale by 1/2, 1/4 or 1/8 almost for free; never below the size asked for.
            image.draft("RGB", (size, size))
            pixels = to_rgb(upright(image)).resize((size, size), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except OSError as error:  # without the path, which is nobody's business where the picture was uploaded
        raise UnreadableError(error.strerror or str(error)) from error
    except Exception as error:  # bytes that are no picture can make decoders raise anything
        raise UnreadableError(str(error) or type(error).__name__) from error
    return np.asarray(pixels)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; broken metadata is no reason to refuse a good picture."""
    image.load()  # turns TIFFs, and finds what stands behind the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = TURNS.get(orientation)
    except Exception:  # noqa: BLE001  # what broken metadata raises can be anything
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, what is transparent on white; wider gray as `eight_bits` has it."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(eight_bits(np.asarray(image), sixteen=image.mode.startswith("I;16")))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def eight_bits(gray_HW: np.ndarray, *, sixteen: bool) -> np.ndarray:
    """Of 16 bits the upper eight; bytes in a wider type as they are; other numbers from the darkest to the brightest.

    Raises:
        ValueError: not all of them are finite.

    """
    gray_HW = gray_HW.astype(np.float64)
    low, high = float(gray_HW.min()), float(gray_HW.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it has values that are no finite numbers")
    whole = bool((gray_HW == np.floor(gray_HW)).all())
    if sixteen or (whole and low >= 0 and 255 < high <= 65535):
        gray_HW = gray_HW // 256
    elif not (whole and low >= 0 and high <= 255):
        gray_HW = (gray_HW - low) / (high - low) * 255 if high > low else np.zeros_like(gray_HW)
    return gray_HW.astype(np.uint8)
