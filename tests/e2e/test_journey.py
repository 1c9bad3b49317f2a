"""The journey over HTTP on the real stack, where the quickstart does not go."""

import time

import httpx
import pytest

from tests.pictures import picture, two_kinds, zip_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("service")]


def wait(http: httpx.Client, path: str, timeout_s: float = 200) -> dict:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = http.get(path).raise_for_status().json()
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"{path} is still {job['state']}")


@pytest.fixture
def http(service: str):
    with httpx.Client(base_url=service, timeout=60) as client:
        yield client


def test_good_bad_and_doubled_files_each_get_their_row(http: httpx.Client):
    good = two_kinds(10)
    jpeg = picture(99, size=(200, 200), encoding="JPEG")
    files = {
        **good,
        "__MACOSX/._x": b"junk",
        ".DS_Store": b"junk",
        "again/copy of 000.png": good["stripes/000.png"],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "text.jpg": b"hello",
        "../escape.png": picture(100),
        "with space/\N{SNOWMAN}.png": picture(101),
        "n" * 296 + ".png": picture(102),
    }
    answer = http.post("/v1/cluster", files={"file": ("all.zip", zip_of(files))}, data={"clusters": "2"})
    run = answer.raise_for_status().json()
    upload = wait(http, run["links"]["upload"])
    assert upload["state"] == "succeeded"
    assert upload["counts"] == {"received": 16, "accepted": 12, "duplicate": 1, "rejected": 3, "ignored": 2}
    ledger = {row["filename"]: row for row in http.get(upload["links"]["files"]).json()["items"]}
    assert ledger["truncated.jpg"]["outcome"] == "rejected"
    assert ledger["truncated.jpg"]["reason_code"] == "truncated"
    assert ledger["text.jpg"]["outcome"] == "rejected"
    copy = ledger["again/copy of 000.png"]
    assert (copy["outcome"], copy["image_id"]) == ("duplicate", ledger["stripes/000.png"]["image_id"])
    assert "n" * 296 + ".png" in ledger
    assert ledger["escape.png"]["reason_code"] == "unsafe-name"
    assert all(".." not in name for name in ledger)
    run = wait(http, run["links"]["self"])
    assert run["state"] == "succeeded", run
    labels = http.get(run["links"]["labels_json"]).json()["items"]
    assert len(labels) == 12
    clusters = http.get(run["links"]["clusters"]).json()["items"]
    assert sum(cluster["size"] for cluster in clusters) == 12
    for cluster in clusters:
        members = http.get(cluster["links"]["images"]).json()["items"]
        assert len(members) == cluster["size"]
        assert [member["rank"] for member in members] == list(range(len(members)))
        chosen = [row["image_id"] for row in cluster["representatives"]]
        assert set(chosen) <= {member["image_id"] for member in members}
        thumbnail = http.get(members[0]["thumbnail"])
        assert thumbnail.headers["content-type"] == "image/jpeg"
    original = http.get(f"/v1/images/{labels[0]['image_id']}/original")
    assert original.content == files[labels[0]["filename"]]
    assert original.headers["content-disposition"].startswith("attachment")
    assert original.headers["x-content-type-options"] == "nosniff"
    tag = http.get(run["links"]["labels_csv"]).headers["etag"]
    assert http.get(run["links"]["labels_csv"], headers={"If-None-Match": tag}).status_code == 304


def test_a_second_run_uses_the_cached_features_and_a_deleted_collection_is_gone(http: httpx.Client):
    files = {"file": ("p.zip", zip_of(two_kinds(30)))}
    run = http.post("/v1/cluster", files=files, data={"clusters": "2"}).raise_for_status().json()
    first = wait(http, run["links"]["self"])
    collection = first["links"]["collection"]
    again = http.post(f"{collection}/runs", json={"clusters": 2}).raise_for_status().json()
    second = wait(http, again["links"]["self"])
    assert (first["state"], second["state"]) == ("succeeded", "succeeded")
    assert http.get(first["links"]["labels_csv"]).text == http.get(second["links"]["labels_csv"]).text
    assert http.delete(collection).status_code == 204
    assert http.get(collection).status_code == 404
    assert http.get(second["links"]["self"]).status_code == 404


def test_a_running_run_is_cancelled(http: httpx.Client):
    files = {"file": ("p.zip", zip_of({f"{n}.png": picture(n) for n in range(600)}))}
    fields = {"clusters": "10", "image_size": "448"}
    run = http.post("/v1/cluster", files=files, data=fields).raise_for_status().json()
    path = run["links"]["self"]
    deadline = time.monotonic() + 100
    while http.get(path).json()["stage"] != "features":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    asked = time.monotonic()
    assert http.post(f"{path}/cancel").status_code == 202
    over = wait(http, path)
    assert over["state"] == "cancelled"
    assert time.monotonic() - asked < 20
    assert http.get(f"{path}/clusters").status_code == 409
