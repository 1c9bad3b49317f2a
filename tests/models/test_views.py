import colorsys
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from models import views
from models.views import Augmentation, Draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw_of(images, **chosen):
    """No change, but for what is chosen: one value for all images."""
    nothing = {
        "box_B4": torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images, 1),
        "flipped_B": torch.zeros(images, dtype=torch.bool),
        "brightness_B": torch.ones(images),
        "contrast_B": torch.ones(images),
        "saturation_B": torch.ones(images),
        "hue_B": torch.zeros(images),
        "gray_B": torch.zeros(images, dtype=torch.bool),
        "sigma_B": None,
    }
    for name, value in chosen.items():
        nothing[name] = torch.full_like(nothing[name], value)
    return Draw(**nothing)


@pytest.fixture
def pictures():
    """Smooth random colours: (4, 3, 32, 32) in 0..1."""
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 32, 32), (4, 6, 20, 12), (11, 0, 7, 32), (31, 31, 1, 1)])
def test_a_crop_is_torchvisions_resized_crop(pictures, box, flipped):
    top, left, height, width = box
    choices = draw_of(4, flipped_B=flipped)
    choices.box_B4[:] = torch.tensor([top, left, height, width]) / 32
    expected = functional.resized_crop(pictures, top, left, height, width, [32, 32], antialias=False)
    expected = functional.horizontal_flip(expected) if flipped else expected
    torch.testing.assert_close(views.crop(pictures, choices), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "theirs"),
    [
        ("brightness_B", 0.6, lambda x: functional.adjust_brightness(x, 0.6)),
        ("brightness_B", 1.4, lambda x: functional.adjust_brightness(x, 1.4)),
        ("contrast_B", 0.7, lambda x: functional.adjust_contrast(x, 0.7)),
        ("contrast_B", 1.4, lambda x: functional.adjust_contrast(x, 1.4)),
        ("saturation_B", 0.5, lambda x: functional.adjust_saturation(x, 0.5)),
        ("saturation_B", 1.4, lambda x: functional.adjust_saturation(x, 1.4)),
        ("gray_B", True, lambda x: functional.rgb_to_grayscale(x, num_output_channels=3)),
    ],
)
def test_a_colour_change_is_torchvisions(pictures, field, value, theirs):
    # torchvision's weights of gray have four digits.
    torch.testing.assert_close(
        views.recolour(pictures, draw_of(4, **{field: value})), theirs(pictures), atol=2e-4, rtol=0
    )


def test_colour_changes_follow_each_other_as_torchvisions_do_where_nothing_is_cut(pictures):
    dim = 0.3 + 0.3 * pictures
    choices = draw_of(4, brightness_B=1.2, contrast_B=0.8, saturation_B=0.7)
    expected = functional.adjust_saturation(
        functional.adjust_contrast(functional.adjust_brightness(dim, 1.2), 0.8), 0.7
    )
    torch.testing.assert_close(views.recolour(dim, choices), expected, atol=2e-4, rtol=0)


def test_hue_turns_by_the_angle_in_yiq():
    # colorsys has the NTSC standard's YIQ, rounded to two digits.
    red, green, blue = 0.6, 0.4, 0.45
    pixel = torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    turned = views.recolour(pixel, draw_of(1, hue_B=0.1))[0, :, 0, 0].tolist()
    y, i, q = colorsys.rgb_to_yiq(red, green, blue)
    y_turned, i_turned, q_turned = colorsys.rgb_to_yiq(*turned)
    assert y_turned == pytest.approx(y, abs=0.01)
    assert math.hypot(i_turned, q_turned) == pytest.approx(math.hypot(i, q), abs=0.01)
    turn = math.atan2(i_turned * q - q_turned * i, i_turned * i + q_turned * q)
    assert turn == pytest.approx(0.1 * 2 * math.pi, abs=0.05)


def test_hue_turns_in_the_direction_of_torchvisions():
    pale_red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    ours = views.recolour(pale_red, draw_of(1, hue_B=0.1))[0, :, 0, 0]
    theirs = functional.adjust_hue(pale_red, 0.1)[0, :, 0, 0]
    # Towards yellow: green rises above blue.
    assert ours[1] > ours[2]
    assert theirs[1] > theirs[2]


def test_blur_is_torchvisions(pictures):
    wide = pictures.repeat(1, 1, 2, 2)  # 64 pixels: a kernel of 7
    expected = functional.gaussian_blur(wide, [7, 7], [1.3, 1.3])
    torch.testing.assert_close(views.blur(wide, torch.full((4,), 1.3)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.blur(wide, torch.zeros(4)), wide, atol=1e-6, rtol=0)


def test_every_image_has_its_own_choices(pictures):
    choices = draw_of(4)
    choices.brightness_B[2] = 0.5
    choices.flipped_B[1] = True
    choices.gray_B[3] = True
    made = views.recolour(views.crop(pictures, choices), choices)
    torch.testing.assert_close(made[0], pictures[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(made[1], pictures[1].flip(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[2], pictures[2] / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[3, 0], made[3, 2])


def test_without_changes_a_view_is_the_normalised_image():
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = functional.normalize(pixels.permute(0, 3, 1, 2) / 255, list(MEAN), list(STD))
    for made in (views.plain(pixels, mean=MEAN, std=STD), views.view(pixels, draw_of(3), mean=MEAN, std=STD)):
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
        assert made.is_contiguous(memory_format=torch.channels_last)


def test_draws_keep_to_their_ranges_and_rates():
    augmentation = Augmentation(blur=0.3)
    choices = views.draw(augmentation, 20_000, torch.Generator().manual_seed(0))
    top, left, height, width = choices.box_B4.unbind(1)
    area, ratio = height * width, width / height
    assert area.min() >= 0.2 - 1e-5
    assert ratio.min() >= 3 / 4 - 1e-5
    assert ratio.max() <= 4 / 3 + 1e-5
    assert top.min() >= 0
    assert (top + height).max() <= 1 + 1e-6
    assert (left + width).max() <= 1 + 1e-6
    assert choices.flipped_B.float().mean() == pytest.approx(0.5, abs=0.02)
    assert choices.gray_B.float().mean() == pytest.approx(0.2, abs=0.02)
    assert (choices.brightness_B != 1).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (choices.sigma_B > 0).float().mean() == pytest.approx(0.3, abs=0.02)
    for name, range_ in (("brightness_B", 0.4), ("contrast_B", 0.4), ("saturation_B", 0.4)):
        value = getattr(choices, name)
        assert value.min() == pytest.approx(1 - range_, abs=0.01)
        assert value.max() == pytest.approx(1 + range_, abs=0.01)
    assert choices.hue_B.abs().max() <= 0.1


def test_the_crops_are_spread_as_torchvisions():
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    theirs = RandomResizedCrop(1000, scale=(0.2, 1.0))
    image = torch.zeros(1, 1000, 1000)
    boxes = [theirs.make_params([image]) for _ in range(4000)]
    choices = views.draw(Augmentation(), 20_000, torch.Generator().manual_seed(0))
    for column, name in enumerate(("top", "left", "height", "width")):
        expected = np.quantile([box[name] / 1000 for box in boxes], [0.1, 0.5, 0.9])
        found = np.quantile(choices.box_B4[:, column].numpy(), [0.1, 0.5, 0.9])
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_same_generator_makes_the_same_views_also_in_parts():
    pixels = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = views.draw(Augmentation(), 6, torch.Generator().manual_seed(3))
    again = views.draw(Augmentation(), 6, torch.Generator().manual_seed(3))
    whole = views.view(pixels, first, mean=MEAN, std=STD)
    assert torch.equal(whole, views.view(pixels, again, mean=MEAN, std=STD))
    half = views.view(pixels[3:], again[slice(3, 6)], mean=MEAN, std=STD)
    torch.testing.assert_close(half, whole[3:], atol=1e-5, rtol=0)


def test_a_plain_view_changes_nothing():
    choices = views.draw(views.augmentation("plain", image_size=32), 8, torch.Generator().manual_seed(0))
    for name, value in vars(draw_of(8)).items():
        assert value is getattr(choices, name) is None or torch.equal(getattr(choices, name), value), name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, "flip is 1.5"),
        ({"contrast": -0.1}, "contrast is -0.1"),
        ({"hue": 0.7}, "hue is 0.7"),
        ({"area": (0.0, 1.0)}, "area is"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
    ],
)
def test_nonsense_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)


def test_choices_can_be_taken_over_in_place():
    strong = views.augmentation("strong", image_size=96)
    own, other = (views.draw(strong, 8, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    places = [value.data_ptr() for value in vars(own).values()]
    own.copy(other)
    assert places == [value.data_ptr() for value in vars(own).values()]
    for name, value in vars(other).items():
        assert torch.equal(getattr(own, name), value)
