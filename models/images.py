"""From a picture file to the square of pixels that a backbone reads.

The whole picture is squashed into the square. The usual alternative, resizing the short side and keeping the
centre, throws away a quarter of a 3:4 photo, and in an unlabelled collection nothing says that the subject
stands in the middle.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Part of the feature cache's address: change it whenever the pixels that `decode` returns change.
PREPROCESSING = "squash-bilinear-1"

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # multi-picture JPEGs open as JPEG

# Pillow registers its formats when it first meets one it does not know: here, before several threads do.
Image.init()

# What decoders raise for a file that is missing, truncated, damaged, too large or no picture at all.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def decode(path: Path, size: int) -> np.ndarray:
    """The picture as `uint8` of shape (size, size, 3).

    EXIF orientation is applied, transparency laid on white, every mode turned into RGB.

    Raises one of `UNREADABLE` for what is no picture in one of `FORMATS`.
    """
    with Image.open(path, formats=FORMATS) as image:
        # JPEG decoders scale by 1/2, 1/4 or 1/8 almost for free; never below the size asked for.
        image.draft("RGB", (size, size))
        upright = ImageOps.exif_transpose(image)
        pixels = to_rgb(upright).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, what is transparent on white; 16-bit gray keeps its upper eight bits."""
    if image.mode.startswith("I"):
        gray_HW = np.asarray(image).astype(np.int64)
        if image.mode != "I" or gray_HW.max(initial=0) > 255:
            gray_HW = gray_HW >> 8
        image = Image.fromarray(gray_HW.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
