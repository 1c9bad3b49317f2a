"""The dashboard in a real browser, on the real stack."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.browser import MARKS, archive, submit
from tests.pictures import picture, two_kinds

WORK_MS = 200_000

pytestmark = MARKS


@pytest.fixture
def page(chromium: Browser, service: str) -> Iterator[Page]:
    """A fresh page; whatever the browser complains of on its console fails the test."""
    context = chromium.new_context(base_url=service)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.expected_complaints = 0
    yield page
    context.close()
    assert len(complaints) == page.expected_complaints, complaints


def is_shown(image: Locator) -> bool:
    return bool(image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)"))


def test_an_archive_becomes_clusters_that_are_deleted_again(page: Page, tmp_path: Path):
    files = {**two_kinds(60), "again/copy.png": two_kinds(1)["stripes/000.png"], "bad <i>.png": b"no picture"}
    page.goto("/")
    page.get_by_label("Folder names are true labels").check()
    page.locator("#files").set_input_files(archive(files))
    expect(page.locator("#chosen")).to_contain_text("pictures.zip")
    page.get_by_role("textbox", name="Name").fill("Journey <b>")
    page.get_by_role("spinbutton", name="Clusters").fill("2")
    page.get_by_role("combobox", name="Method").select_option("kmeans")
    page.get_by_role("button", name="Upload and group").click()
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}$"))
    expect(page.get_by_role("heading", level=1)).to_contain_text("2 clusters")
    expect(page.locator(".card")).to_have_count(2, timeout=WORK_MS)
    run_page = page.url

    assert is_shown(page.locator(".card .thumbnail").first)
    expect(page.locator(".quality")).to_contain_text("ACC")
    expect(page.locator(".figures")).to_contain_text("60")
    with page.expect_download() as download:
        page.get_by_role("link", name="labels.csv").click()
    download.value.save_as(tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open() as rows:
        labels = list(csv.DictReader(rows))
    assert {row["filename"] for row in labels} == set(two_kinds(60))
    with page.expect_download() as download:
        page.get_by_role("link", name="labels.json").click()
    download.value.save_as(tmp_path / "labels.json")
    assert len(json.loads((tmp_path / "labels.json").read_text())["items"]) == 60

    page.locator(".card h3 a").first.click()
    page.wait_for_url("**/clusters/0")
    largest = sum(row["cluster"] == "0" for row in labels)
    expect(page.locator(".members li")).to_have_count(largest)
    assert is_shown(page.locator(".members .thumbnail").first)

    page.goto(run_page)
    page.get_by_text("Run again with other parameters").click()
    page.get_by_role("spinbutton", name="Clusters").fill("3")
    page.get_by_label("Folder names are true labels").uncheck()
    page.get_by_role("button", name="Start run").click()
    page.wait_for_url(lambda url: url != run_page)
    expect(page.locator(".card")).to_have_count(3, timeout=WORK_MS)
    page.goto("/")  # one run with true labels, one without
    expect(page.locator("article", has_text="Journey <b>").locator(".run-line", has_text="ACC")).to_have_count(1)
    page.go_back()

    page.locator(".breadcrumb a").nth(1).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Journey <b>")
    expect(page.locator(".run-line")).to_have_count(2)
    page.get_by_role("link", name="1 rejected").click()
    expect(page.locator(".ledger tbody tr")).to_have_count(1)
    expect(page.locator(".ledger")).to_contain_text("bad <i>.png")
    page.go_back()
    page.get_by_role("button", name="Delete this collection").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/")
    expect(page.get_by_text("Journey <b>")).to_have_count(0)


def test_what_is_no_archive_is_refused_in_words_and_the_form_stays(page: Page):
    page.expected_complaints = 1  # the browser logs every answer with an error status
    submit(page, [{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}], name="Kept")
    expect(page.get_by_role("alert").first).to_contain_text("notes.txt is not an archive")
    expect(page.get_by_role("textbox", name="Name")).to_have_value("Kept")
    expect(page.get_by_role("button", name="Upload and group")).to_be_visible()


def test_a_run_that_cannot_be_says_why(page: Page):
    submit(page, archive(two_kinds(4)), name="Too few", clusters=9)
    page.wait_for_url(re.compile(r"/runs/"))
    expect(page.get_by_role("heading", name="This run has failed")).to_be_visible(timeout=WORK_MS)
    expect(page.locator(".failure")).to_contain_text("9 clusters need at least 9 images")


def test_a_run_is_cancelled_from_its_page(page: Page):
    page.goto("/")
    page.locator("#files").set_input_files(archive({f"{n}.png": picture(n) for n in range(600)}))
    page.get_by_role("spinbutton", name="Clusters").fill("10")
    page.get_by_text("More settings").click()
    page.get_by_label("Image size").fill("448")
    page.get_by_role("button", name="Upload and group").click()
    page.wait_for_url(re.compile(r"/runs/"))
    expect(page.locator("#step-run")).to_contain_text("Looking at every image", timeout=WORK_MS)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="This run was cancelled")).to_be_visible(timeout=30_000)


def test_a_dropped_folder_keeps_its_names(page: Page, service: str):
    page.goto("/")
    # A drop as the browser makes it, but for the folder: scripts cannot make directory entries.
    page.evaluate(
        """() => {
            const file = (name) => ({ isFile: true, fullPath: `/pets/${name}`,
                file: (resolve) => resolve(new File(['x'.repeat(1000)], name)) });
            const batches = [[file('a.png')], [file('ü'.repeat(90) + '😀.png')], []];
            const readEntries = (resolve) => resolve(batches.shift());
            const folder = { isFile: false, createReader: () => ({ readEntries }) };
            const event = new Event('drop', { bubbles: true, cancelable: true });
            event.dataTransfer = { types: ['Files'], items: [{ webkitGetAsEntry: () => folder }] };
            document.getElementById('drop').dispatchEvent(event);
        }"""
    )
    expect(page.locator("#chosen")).to_have_text("2 files, 2.0 kB")
    with page.expect_request("**/v1/cluster") as request:
        page.get_by_role("button", name="Upload and group").click()
    page.wait_for_url(re.compile(r"/runs/"))
    assert request.value.method == "POST"
    expect(page.get_by_role("heading", name="This run has failed")).to_be_visible(timeout=WORK_MS)
    page.get_by_role("link", name="What became of each uploaded file").click()
    expect(page.locator(".ledger")).to_contain_text("pets/a.png")
    expect(page.locator(".ledger")).to_contain_text(f"pets/{'ü' * 90}😀.png")


def test_loose_pictures_and_archives_go_together(page: Page):
    pictures = [
        {"name": f"{n} ö.png", "mimeType": "image/png", "buffer": picture(n, size=(50 + n, 40))} for n in range(5)
    ]
    submit(page, [*pictures, *archive(two_kinds(4))], name="")
    page.wait_for_url(re.compile(r"/runs/"))
    run = page.request.get(page.url.replace("/runs/", "/v1/runs/")).json()
    expect(page.locator(".card")).to_have_count(2, timeout=WORK_MS)
    collection = page.request.get(run["links"]["collection"]).json()
    assert (collection["name"], collection["images"]) == ("5 images", 9)
    found = page.request.get(collection["links"]["images"]).json()["items"]
    sent = {image["filename"]: image for image in found}
    assert {file["name"] for file in pictures} <= set(sent)
    original = page.request.get(sent["3 ö.png"]["links"]["original"]).body()
    assert original == pictures[3]["buffer"]


def test_the_number_of_clusters_and_the_network_are_left_to_kindred_or_not(page: Page):
    page.goto("/")
    page.locator("#files").set_input_files(archive(two_kinds(4)))
    number = page.get_by_role("spinbutton", name="Clusters")
    auto = page.get_by_role("switch", name="Find the number of clusters")
    auto.check()
    expect(number).to_be_disabled()
    auto.uncheck()
    expect(number).to_be_enabled()
    auto.check()
    page.get_by_text("More settings").click()
    page.get_by_label("Image size").fill("64")
    page.get_by_label("Training").select_option("full")
    page.get_by_role("button", name="Upload and group").click()
    page.wait_for_url(re.compile(r"/runs/"))
    run = page.request.get(page.url.replace("/runs/", "/v1/runs/")).json()
    asked = {name: run["parameters"][name] for name in ("clusters", "method", "train", "backbone", "weights")}
    assert asked == {
        "clusters": "auto", "method": "scl", "train": "full", "backbone": "efficientnet_lite0", "weights": None,
    }  # fmt: skip
    page.request.post(run["links"]["cancel"])


def test_a_combination_that_cannot_be_is_refused_in_words(page: Page):
    page.expected_complaints = 1
    page.goto("/")
    page.locator("#files").set_input_files(archive(two_kinds(4)))
    page.get_by_text("More settings").click()
    page.get_by_label("Weights").select_option("random")
    sent: list[str] = []
    page.on("request", lambda request: request.method == "GET" or sent.append(request.url))
    page.get_by_role("button", name="Upload and group").click()
    expect(page.get_by_role("alert").first).to_contain_text("to train head takes a pretrained backbone")
    assert [url.rpartition("/")[2] for url in sent] == ["parameters"]  # and not one picture
    page.get_by_label("Weights").select_option("")
    page.get_by_role("spinbutton", name="Clusters").fill("2")
    page.get_by_role("button", name="Upload and group").click()
    page.wait_for_url(re.compile(r"/runs/"))


def test_images_are_added_to_a_collection_on_its_page(page: Page):
    made = page.request.post("/v1/collections", data={"name": "Grows"}).json()
    page.goto(f"/collections/{made['id']}")
    page.locator("#files").set_input_files(archive({"notes.txt": b"no picture"}))
    page.get_by_role("button", name="Upload").click()
    expect(page.locator(".why")).to_contain_text("holds no picture that can be read", timeout=WORK_MS)
    expect(page.locator("#images")).to_have_text("0 images")

    page.get_by_role("heading", name="Add images").click()
    page.locator("#files").set_input_files(archive(two_kinds(4)))
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#images")).to_have_text("4 images", timeout=WORK_MS)
    expect(page.get_by_role("heading", name="Start a run on these images")).to_be_visible(timeout=WORK_MS)

    page.get_by_role("heading", name="Add images").click()
    page.locator("#files").set_input_files(archive(two_kinds(6)))
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#images")).to_have_text("6 images", timeout=WORK_MS)
    expect(page.locator("main")).not_to_have_attribute("data-open", re.compile(""), timeout=WORK_MS)
    expect(page.get_by_role("link", name="4 duplicate")).to_be_visible()


def test_what_is_wrong_in_a_closed_part_of_the_form_is_shown(page: Page):
    page.goto("/")
    page.locator("#files").set_input_files(archive(two_kinds(4)))
    page.get_by_text("More settings").click()
    seed = page.get_by_label("Seed")
    seed.fill("-5")
    page.get_by_text("More settings").click()
    expect(seed).to_be_hidden()
    page.get_by_role("button", name="Upload and group").click()
    expect(seed).to_be_visible()
    expect(seed).to_be_focused()


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_no_page_is_wider_than_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/", *page_links(page)):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def page_links(page: Page) -> list[str]:
    """The pages that the first page leads to, and those behind them."""
    seen: list[str] = []
    for path in ("/", *links(page, "/")):
        seen += [found for found in links(page, path) if found not in seen]
    return seen


def links(page: Page, path: str) -> list[str]:
    page.goto(path)
    found = page.locator("main a[href^='/']:not([href^='/v1'])").evaluate_all("all => all.map(a => a.pathname)")
    return sorted(set(found))[:6]
