import shutil

import numpy as np
import pytest

from models import images, pixels
from models.features import Source, UnreadableImageError
from tests.models.conftest import finish

SIZE = 32


def run(sources, cache_dir, size=SIZE):
    return finish(pixels.gather(sources, image_size=size, cache_dir=cache_dir, threads=2))


def test_every_row_is_the_decoded_image_with_and_without_a_cache(sources, tmp_path):
    expected = np.stack([images.decode(source.path, SIZE) for source in sources])
    assert np.array_equal(run(sources, None)[1], expected)
    cached = run(sources, tmp_path)[1]
    assert isinstance(cached, np.memmap)
    assert np.array_equal(cached, expected)
    assert not cached.flags.writeable


def test_a_killed_decoding_goes_on_from_its_last_count(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "PART", 32)
    expected = run(sources, None)[1]
    steps = pixels.gather(sources, image_size=SIZE, cache_dir=tmp_path, threads=1)
    while next(steps).done < 32:
        pass
    steps.close()
    assert not list(tmp_path.rglob("*.npy"))
    steps, resumed = run(sources, tmp_path)
    assert steps[0].done == 32
    assert np.array_equal(resumed, expected)
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".npy", ".lock"}


def test_rows_without_their_count_are_decoded_again(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "PART", 32)
    steps = pixels.gather(sources, image_size=SIZE, cache_dir=tmp_path, threads=1)
    while next(steps).done < 32:
        pass
    steps.close()
    next(tmp_path.rglob("*.rows")).unlink()
    steps, resumed = run(sources, tmp_path)
    assert steps[0].done == 0
    assert np.array_equal(resumed, run(sources, None)[1])


def test_nothing_is_decoded_twice(sources, tmp_path):
    first = run(sources, tmp_path)[1]
    gone = [Source(key=source.key, path=tmp_path / "gone.png") for source in sources]
    steps, again = run(gone, tmp_path)
    assert [step.done for step in steps] == [60]
    assert np.array_equal(first, again)


def test_other_images_another_order_and_another_size_are_other_arrays(sources, tmp_path):
    run(sources, tmp_path)
    assert np.array_equal(run(sources[::-1], tmp_path)[1], run(sources, None)[1][::-1])
    assert run(sources[:5], tmp_path)[1].shape == (5, SIZE, SIZE, 3)
    assert run(sources[:5], tmp_path, size=48)[1].shape == (5, 48, 48, 3)
    assert len(list(tmp_path.rglob("*.npy"))) == 4


def test_copies_keep_their_rows(sources):
    found = run([sources[0], sources[1], sources[0]], None)[1]
    assert len(found) == 3
    assert np.array_equal(found[0], found[2])


def test_an_unreadable_image_is_named_and_costs_only_itself(sources, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(UnreadableImageError, match=r"image broken\.jpg cannot be read"):
        run([*sources, Source(key="k", path=broken)], tmp_path / "cache")
    shutil.copy(sources[0].path, broken)
    found = run([*sources, Source(key="k", path=broken)], tmp_path / "cache")[1]
    assert np.array_equal(found[60], found[0])


def test_one_at_a_time_writes_and_the_others_wait_for_it(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "WAIT_S", 0.0)
    options = {"image_size": SIZE, "cache_dir": tmp_path, "threads": 1}
    first = pixels.gather(sources, **options)
    next(first)
    second = pixels.gather([Source(key=source.key, path=tmp_path / "gone") for source in sources], **options)
    assert [next(second).done for _ in range(3)] == [0, 0, 0]
    expected = finish(first)[1]
    assert np.array_equal(finish(second)[1], expected)
