"""Uploads that are not taken: each says why, and leaves nothing."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app import storage
from app.config import settings
from tests.app.test_api import archive, assert_problem, files_below, rows


@pytest.fixture(autouse=True)
def nothing_is_left(database: None) -> Iterator[None]:
    yield
    assert files_below(settings().data_dir) == []
    assert rows("collections") == 0


def test_an_upload_that_says_it_is_larger_than_the_disk(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_MAX_UPLOAD_BYTES", str(10**18))
    settings.cache_clear()
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}}
    answer = api.post("/v1/cluster", **request, headers={"Content-Length": str(10**17)})
    assert_problem(answer, 507, "storage-full")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_upload_for_which_there_is_no_room(api: TestClient, monkeypatch: pytest.MonkeyPatch, number: int):
    def full(_folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "make_durable", full)
    answer = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"})
    assert_problem(answer, 507, "storage-full")


def test_a_form_of_very_many_fields(api: TestClient):
    fields = {f"field-{number}": "x" for number in range(101)}
    answer = api.post("/v1/cluster", files={"file": archive()}, data=fields)
    assert "at most 100 fields" in assert_problem(answer, 422, "too-many-fields")["detail"]


def test_a_part_with_a_header_that_is_too_long(api: TestClient):
    name = "x" * 5000
    answer = api.post("/v1/cluster", files={"file": (name, archive()[1])}, data={"clusters": "2"})
    assert "header" in assert_problem(answer, 422, "broken-multipart")["detail"]
