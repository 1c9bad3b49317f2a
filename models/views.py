"""Augmented views of images, made for a whole batch at once on the device that trains.

Letters in shapes: B batch, H and W pixels, C colours, T tries. Crops are drawn as SimCLR's (Chen et al. 2020,
appendix A), but from 0.2 of the picture on, as in the public code of SCAN and PICA, in place of 0.08. Its colour
changes are all linear in a pixel's colours, so they are multiplied into one 3x3 matrix an image: the pixels are read
once, and colours are cut to their range once at the end instead of after each change. Hue is turned in YIQ, where it
is linear too, instead of in HSV.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from models.limits import check_share
from models.networks import Colour
from models.objective import Strength

GRAY = (0.299, 0.587, 0.114)
# Y is the luma of GRAY; I and Q of the NTSC standard.
TO_YIQ = (GRAY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(TO_YIQ)).tolist()))
TRIES = 10  # draws of a crop that may stick out of the image before all of the image is taken


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far views are from their image; probabilities and ranges as in torchvision's transforms."""

    area: tuple[float, float] = (0.2, 1.0)  # of the crop, as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height of the crop
    flip: float = 0.5
    jitter: float = 0.8  # probability that the next four apply
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # of a full turn
    gray: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    def __post_init__(self) -> None:
        check_share(self, "flip", "jitter", "gray", "blur", "brightness", "contrast", "saturation")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; it must be from 0 to 0.5 of a turn")
        for name, most in (("area", 1.0), ("ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} is {(low, high)}; it must be two rising numbers above 0, at most {most}")


def augmentation(strength: Strength, *, image_size: int) -> Augmentation:
    """The augmentation of a view; blur only where there are pixels to blur (Chen et al. use none on CIFAR)."""
    if strength == "strong":
        return Augmentation(blur=0.5 if image_size > 64 else 0.0)
    plain = Augmentation(area=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0)
    if strength == "plain":
        return plain
    return Augmentation(area=(0.6, 1.0), flip=0.5, jitter=0.0, gray=0.0)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random choices for one view of a batch."""

    box_B4: Tensor  # top, left, height, width of the crop, as shares of the image
    flipped_B: Tensor  # bool
    brightness_B: Tensor  # factors, 1 for none
    contrast_B: Tensor
    saturation_B: Tensor
    hue_B: Tensor  # of a full turn, 0 for none
    gray_B: Tensor  # bool
    sigma_B: Tensor | None  # pixels, 0 for no blur; None where nothing is ever blurred

    def __getitem__(self, rows: slice) -> "Draw":
        """The choices for some of the images."""
        return self.each(lambda value: value[rows])

    def to(self, device: torch.device | str) -> "Draw":
        return self.each(lambda value: value.to(device, non_blocking=True))

    def copy(self, other: "Draw") -> None:
        """Take over the choices of another for as many images."""
        for name, value in vars(self).items():
            if value is not None:
                value.copy_(getattr(other, name), non_blocking=True)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Draw":
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in vars(self).items()}
        return Draw(**changed)


def draw(augmentation: Augmentation, images: int, generator: torch.Generator) -> Draw:
    """Choices for every image of a batch, on the CPU, so that every device makes the same views."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*(shape or (images,)), generator=generator)

    jittered_B = uniform(0, 1) < augmentation.jitter

    def factor(range_: float) -> Tensor:
        return torch.where(jittered_B, uniform(1 - range_, 1 + range_), 1.0)

    area_BT = uniform(*augmentation.area, images, TRIES)
    ratio_BT = uniform(math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1]), images, TRIES).exp()
    width_BT, height_BT = (area_BT * ratio_BT).sqrt(), (area_BT / ratio_BT).sqrt()
    fits_BT = (width_BT <= 1) & (height_BT <= 1)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)
    fits_B = fits_BT.any(dim=1)
    width_B = torch.where(fits_B, width_BT.gather(1, first_B1)[:, 0], 1.0)
    height_B = torch.where(fits_B, height_BT.gather(1, first_B1)[:, 0], 1.0)
    return Draw(
        box_B4=torch.stack(
            [(1 - height_B) * uniform(0, 1), (1 - width_B) * uniform(0, 1), height_B, width_B],
            dim=1,
        ),
        flipped_B=uniform(0, 1) < augmentation.flip,
        brightness_B=factor(augmentation.brightness),
        contrast_B=factor(augmentation.contrast),
        saturation_B=factor(augmentation.saturation),
        hue_B=torch.where(jittered_B, uniform(-augmentation.hue, augmentation.hue), 0.0),
        gray_B=uniform(0, 1) < augmentation.gray,
        sigma_B=torch.where(uniform(0, 1) < augmentation.blur, uniform(*augmentation.blur_sigma), 0.0)
        if augmentation.blur
        else None,
    )


def view(pixels_BHWC: Tensor, choices: Draw, *, mean: Colour, std: Colour) -> Tensor:
    """One view of each image: `uint8` pixels to normalised float32 of shape (B, C, H, W), channels last."""
    x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
    x_BCHW = recolour(crop(x_BCHW, choices), choices)
    if choices.sigma_B is not None:
        x_BCHW = blur(x_BCHW, choices.sigma_B)
    return normalise(x_BCHW, mean=mean, std=std)


def plain(pixels_BHWC: Tensor, *, mean: Colour, std: Colour) -> Tensor:
    """The images as they are: `uint8` pixels to normalised float32 of shape (B, C, H, W), channels last."""
    return normalise(pixels_BHWC.permute(0, 3, 1, 2).float() / 255, mean=mean, std=std)


def constant(values: tuple[Any, ...], like: Tensor) -> Tensor:
    """These numbers, nested as they are, beside `like`; a GPU is sent them once."""
    return _constant(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # whoever asks first may be in it, and what is made there stays there
        return torch.tensor(values, dtype=dtype, device=device)


def normalise(x_BCHW: Tensor, *, mean: Colour, std: Colour) -> Tensor:
    x_BCHW = (x_BCHW - constant(mean, x_BCHW)[:, None, None]) / constant(std, x_BCHW)[:, None, None]
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def crop(x_BCHW: Tensor, choices: Draw) -> Tensor:
    """The boxes, stretched to the size of the images by bilinear interpolation, mirrored where so chosen.

    What lies outside of a box is not looked at: pixels beyond its border are those on its border.
    """
    top_B, left_B, height_B, width_B = choices.box_B4.unbind(dim=1)
    side_B = torch.where(choices.flipped_B, -width_B, width_B)
    nil_B = torch.zeros_like(top_B)
    # From -1..1 in the output to -1..1 in the input.
    across_B3 = torch.stack([side_B, nil_B, 2 * left_B + width_B - 1], dim=1)
    down_B3 = torch.stack([nil_B, height_B, 2 * top_B + height_B - 1], dim=1)
    grid_BHW2 = affine_grid(torch.stack([across_B3, down_B3], dim=1), list(x_BCHW.shape), align_corners=False)
    half_2 = constant((1 / x_BCHW.shape[3], 1 / x_BCHW.shape[2]), x_BCHW)
    low_B2 = torch.stack([2 * left_B - 1, 2 * top_B - 1], dim=1) + half_2
    high_B2 = torch.stack([2 * (left_B + width_B) - 1, 2 * (top_B + height_B) - 1], dim=1) - half_2
    grid_BHW2 = grid_BHW2.clamp(low_B2[:, None, None], high_B2[:, None, None])
    return grid_sample(x_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)


def recolour(x_BCHW: Tensor, choices: Draw) -> Tensor:
    """Brightness, contrast, saturation, hue, then gray: one matrix an image, cut to 0..1."""
    matrix_BCC, offset_BC = colour_map(x_BCHW.mean(dim=(2, 3)), choices)
    b, c, h, w = x_BCHW.shape
    # Contiguous pixels a colour: the multiplication by 3x3 matrices is several times faster so.
    coloured = torch.baddbmm(offset_BC[:, :, None], matrix_BCC, x_BCHW.reshape(b, c, h * w))
    return coloured.clamp_(0, 1).view(b, c, h, w)


def colour_map(mean_BC: Tensor, choices: Draw) -> tuple[Tensor, Tensor]:
    """The matrix and the offset that all colour changes together amount to, for images of these mean colours."""
    eye_CC = torch.eye(3, device=mean_BC.device)
    gray_C = constant(GRAY, mean_BC)
    gray_CC = gray_C.expand(3, 3)
    matrix_BCC = choices.brightness_B[:, None, None] * eye_CC
    # Contrast mixes with the image's mean gray.
    level_B = (choices.brightness_B[:, None] * mean_BC) @ gray_C
    matrix_BCC = choices.contrast_B[:, None, None] * matrix_BCC
    offset_B = (1 - choices.contrast_B) * level_B  # gray, so what follows leaves it as it is
    saturation_B11 = choices.saturation_B[:, None, None]
    matrix_BCC = (saturation_B11 * eye_CC + (1 - saturation_B11) * gray_CC) @ matrix_BCC
    matrix_BCC = hue_turn(choices.hue_B) @ matrix_BCC
    matrix_BCC = torch.where(choices.gray_B[:, None, None], gray_CC @ matrix_BCC, matrix_BCC)
    return matrix_BCC, offset_B[:, None].expand(-1, 3)


def hue_turn(turn_B: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn the colours around the gray axis of YIQ by a share of a full turn."""
    angle_B = turn_B * (2 * math.pi)
    cosine_B, sine_B = angle_B.cos(), angle_B.sin()
    nil_B, one_B = torch.zeros_like(angle_B), torch.ones_like(angle_B)
    # From red over yellow to green, as in HSV, is against the direction from I to Q.
    turn_BCC = torch.stack([one_B, nil_B, nil_B, nil_B, cosine_B, sine_B, nil_B, -sine_B, cosine_B], dim=1)
    return constant(FROM_YIQ, turn_B) @ turn_BCC.view(-1, 3, 3) @ constant(TO_YIQ, turn_B)


def blur(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur over a tenth of the image's side, as SimCLR's; a sigma of 0 leaves the image as it is."""
    b, c, h, w = x_BCHW.shape
    reach = max(1, min(h, w) // 20)
    offset_T = torch.arange(-reach, reach + 1, device=x_BCHW.device)
    kernel_BT = torch.exp(-0.5 * (offset_T / sigma_B.clamp_min(1e-3)[:, None]) ** 2)
    kernel_BT = (kernel_BT / kernel_BT.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    x = pad(x_BCHW, (reach, reach, reach, reach), mode="reflect").reshape(1, b * c, h + 2 * reach, w + 2 * reach)
    x = conv2d(x, kernel_BT[:, None, :, None], groups=b * c)
    return conv2d(x, kernel_BT[:, None, None, :], groups=b * c).view(b, c, h, w)
