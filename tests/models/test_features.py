import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models import backbones, features, images, networks
from models.features import Source, UnreadableImageError
from tests.models.conftest import finish

SIZE = 64


def run(sources, cache_dir, size=SIZE, threads=2):
    options = {"backbone": "efficientnet_lite0", "image_size": size, "threads": threads, "device": "cpu"}
    return finish(features.extract(sources, cache_dir=cache_dir, **options))


@pytest.mark.parametrize("size", [64, 75, 224])
def test_the_onnx_graph_computes_what_the_torch_network_does(size):
    network = networks.network("efficientnet_lite0", weights=None, image_size=size).eval()
    pixels_BHWC = np.random.default_rng(0).integers(256, size=(2, size, size, 3), dtype=np.uint8)
    with torch.inference_mode():
        x_BCHW = (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        expected = network(x_BCHW).numpy()
    ours = backbones.onnx_encoder(backbones.to_onnx(network.body.layers), image_size=size, threads=1)(pixels_BHWC)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    torchs = backbones.torch_encoder(network, device="cpu")(pixels_BHWC)
    np.testing.assert_allclose(torchs, expected, atol=1e-4)


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="'resnet' is unknown; known are: efficientnet_lite0"):
        networks.digest("resnet", None)


def test_a_killed_extraction_resumes_where_its_last_part_ended(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)
    monkeypatch.setattr(features, "PART", 16)
    undisturbed = run(sources, None)[1]
    options = {"backbone": "efficientnet_lite0", "image_size": SIZE, "threads": 2, "device": "cpu"}
    steps = features.extract(sources, cache_dir=tmp_path, **options)
    while next(steps).done < 40:
        pass
    steps.close()
    steps, resumed = run(sources, tmp_path)
    assert steps[0].done == 32  # two parts of 16; the last batch of 8 was lost
    assert np.array_equal(resumed, undisturbed)


def test_a_second_run_computes_nothing_and_added_images_only_themselves(sources, tmp_path, monkeypatch):
    first = run(sources[:40], tmp_path)[1]
    again, second = run(sources[:40], tmp_path)
    assert [step.done for step in again] == [40]
    assert np.array_equal(first, second)
    steps, grown = run(sources, tmp_path)
    assert [step.done for step in steps] == [40, 60]
    assert np.array_equal(grown[:40], first)


def test_features_do_not_depend_on_the_company_or_the_order(sources):
    together = run(sources, None)[1]
    backwards = run(sources[::-1], None)[1]
    alone = run(sources[3:4], None)[1]
    assert np.array_equal(together, backwards[::-1])
    assert np.array_equal(together[3:4], alone)


@pytest.mark.parametrize("threads", [1, 3, 5])  # at most 4 batches are with the network at once
def test_features_do_not_depend_on_the_threads(sources, monkeypatch, threads):
    monkeypatch.setattr(features, "BATCH", 4)
    two = run(sources, None)[1]
    steps, found = run(sources, None, threads=threads)
    assert [step.done for step in steps] == list(range(0, 61, 4))
    assert np.array_equal(found, two)


def test_copies_are_computed_once(sources):
    steps, found = run([sources[0], sources[1], sources[0]], None)
    assert steps[-1].total == 2
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("damage", [lambda part: os.truncate(part, 200), lambda part: part.unlink()])
def test_what_is_damaged_in_the_cache_is_made_again(sources, tmp_path, damage):
    expected = run(sources, tmp_path)[1]
    for part in tmp_path.rglob("part-*.npy"):
        damage(part)
    steps, again = run(sources, tmp_path)
    assert steps[0].done == 0
    assert np.array_equal(again, expected)
    assert run(sources, tmp_path)[0][0].done == 60


def test_another_image_size_is_another_cache(sources, tmp_path):
    run(sources[:4], tmp_path)
    assert run(sources[:4], tmp_path, size=96)[0][0].done == 0


def test_features_without_their_keys_do_not_exist(sources, tmp_path):
    run(sources[:4], tmp_path)
    next(tmp_path.rglob("part-*.keys")).unlink()
    assert run(sources[:4], tmp_path)[0][0].done == 0


def test_an_unreadable_image_is_named(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(UnreadableImageError, match=r"image broken\.jpg cannot be read"):
        run([Source(key="k", path=broken)], None)


def test_the_camera_was_held_sideways(tmp_path):
    # Left half red; EXIF orientation 6 says: turn by 90 degrees clockwise, so red is on top.
    picture = Image.new("RGB", (32, 32), "blue")
    picture.paste("red", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = images.decode(tmp_path / "turned.png", 32)
    assert pixels[4, 16].tolist() == [255, 0, 0]
    assert pixels[28, 16].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    gray = np.full((20, 30), 200, np.uint8)
    if mode.startswith("I"):
        picture = Image.fromarray(gray.astype(np.uint16) * 256)
        picture = picture if mode == "I;16" else picture.convert("I")
    else:
        picture = Image.fromarray(gray).convert(mode)
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I") else "picture.png")
    picture.save(path)
    pixels = images.decode(path, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels.astype(int) - 200).max() <= 8


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (images.decode(tmp_path / "clear.png", 8) == 255).all()
    assert (images.decode(tmp_path / "palette.png", 8) == 255).all()


def test_the_whole_picture_is_seen(tmp_path):
    # A wide picture with red ends: a centre crop would lose them.
    picture = Image.new("RGB", (400, 100), "blue")
    picture.paste("red", (0, 0, 40, 100))
    picture.paste("red", (360, 0, 400, 100))
    picture.save(tmp_path / "wide.png")
    pixels = images.decode(tmp_path / "wide.png", 100)
    assert pixels[50, 3].tolist() == pixels[50, 96].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("turned.png", "turned.jpg", "turned.tif"):
        picture.save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as found:
            expected = ImageOps.exif_transpose(found).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(images.decode(tmp_path / name, 32), np.asarray(expected)), name


@pytest.mark.parametrize("exif", [b"MM\0*\0\0", b"XX\0*\0\0\0\x08", b"II*\0\xff\xff\xff\xff", b""])
def test_broken_metadata_spares_the_picture(tmp_path, exif):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    picture.save(tmp_path / "whole.png")
    picture.save(tmp_path / "broken.png", exif=exif)
    assert np.array_equal(images.decode(tmp_path / "broken.png", 32), images.decode(tmp_path / "whole.png", 32))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("float32", 0, 1), ("float32", -3, 1e6), ("int32", 0, 10**9), ("int32", -70_000, 5)]
)
def test_wide_numbers_are_stretched(tmp_path, kind, low, high):
    ramp_HW = np.linspace(low, high, 64 * 64).reshape(64, 64).astype(kind)
    Image.fromarray(ramp_HW).save(tmp_path / "wide.tif")
    gray_HW = images.decode(tmp_path / "wide.tif", 64)[:, :, 0].astype(int)
    assert gray_HW.min() == 0
    assert gray_HW.max() == 255
    assert np.abs(gray_HW - np.linspace(0, 255, 64 * 64).reshape(64, 64)).max() <= 1


def test_numbers_that_are_none_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(images.UnreadableError, match="no finite numbers"):
        images.decode(tmp_path / "nan.tif", 8)


def test_a_picture_that_is_gone_is_named_without_its_folder(tmp_path):
    with pytest.raises(UnreadableImageError) as caught:
        run([Source(key="k", path=tmp_path / "gone.jpg")], None)
    assert str(caught.value) == "image gone.jpg cannot be read: No such file or directory"
