"""What tests in a real browser share: when they run, and the ways through the dashboard."""

import shutil

import pytest
from playwright.sync_api import Page

from tests.pictures import zip_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
MARKS = [
    pytest.mark.slow,
    pytest.mark.xdist_group("service"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]


def submit(page: Page, files: list[dict], *, name: str, clusters: int = 2) -> None:
    page.goto("/")
    page.locator("#files").set_input_files(files)
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("spinbutton", name="Clusters").fill(str(clusters))
    page.get_by_role("combobox", name="Method").select_option("kmeans")
    page.get_by_role("button", name="Upload and group").click()


def archive(files: dict[str, bytes]) -> list[dict]:
    return [{"name": "pictures.zip", "mimeType": "application/zip", "buffer": zip_of(files)}]
