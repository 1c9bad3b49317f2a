"""A real browser against the real API: who gets in, and that nothing uploaded runs there."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import BrowserContext, Page, expect
from sqlalchemy import text

from app.db.session import open_session
from app.embedded import ServerUrls
from app.services import results
from tests.app.keys import bearer, make_key
from tests.e2e.browser import MARKS, archive, submit
from tests.e2e.conftest import free_port
from tests.e2e.test_compose import await_ready
from tests.pictures import picture, two_kinds, zip_of
from worker.ingest import ingest

pytestmark = MARKS

ATTACK = "parent.hacked=self.hacked=window.hacked=1;alert(1)"
NAMES = [
    f"<script>{ATTACK}</script>.png",
    f"<img src=x onerror={ATTACK}>.gif",
    f'"><svg onload="{ATTACK}">.jpg',
    f"'-{ATTACK}-'.png",
    f"javascript:{ATTACK}.png",
    "{{7*7}}${7*7}<%= 7*7 %>.png",
    "</title><script src=//evil.example></script>.png",
    "x.html",
]


def polyglots() -> dict[str, bytes]:
    """Pictures that are a page or a script to whoever takes them for one."""
    image = Image.open(io.BytesIO(picture(1)))
    html = f"<html><script>{ATTACK}</script></html>".encode()
    gif, jpeg, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    image.convert("P").save(gif, "GIF", comment=html)
    image.save(jpeg, "JPEG", comment=html)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("Comment", html.decode())
    Image.open(io.BytesIO(picture(2))).save(png, "PNG", pnginfo=chunk)
    # A GIF whose size reads as the opening of a comment is a script as well.
    script = bytearray(gif.getvalue() + f"*/=1;{ATTACK}//".encode())
    script[6:8] = b"/*"
    bodies = [gif.getvalue(), jpeg.getvalue(), png.getvalue(), bytes(script)]
    return {name: bodies[number % 4] + bytes([number]) for number, name in enumerate(NAMES)} | {
        "svg.png": f'<svg xmlns="http://www.w3.org/2000/svg" onload="{ATTACK}"/>'.encode(),
        "page.png": html,
    }


@pytest.fixture
def api_url(servers: ServerUrls, database: None, tmp_path: Path) -> Iterator[str]:
    """The API by itself, as a process; the tests do what workers would."""
    port = free_port()
    command = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port)]
    with (tmp_path / "api.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], env=os.environ, stdout=log, stderr=log)
    url = f"http://localhost:{port}"
    try:
        with httpx.Client(base_url=url) as http:
            await_ready(http, tmp_path / "api.log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def context(chromium, api_url: str) -> Iterator[BrowserContext]:
    context = chromium.new_context(base_url=api_url)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that must not open a dialog, which is what the attacks do."""
    page, opened = context.new_page(), []
    page.on("dialog", lambda dialog: (opened.append(dialog.message), dialog.dismiss()))
    yield page
    assert opened == []


def sign_in(page: Page, key: str) -> None:
    page.goto("/")
    expect(page).to_have_url(re.compile(r"/sign-in\?next=%2F$"))
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def hostile_collection(url: str, key: str) -> dict:
    """Everything that a person may name is an attack, and so is every file; with a finished run on it."""
    with httpx.Client(base_url=url, headers=bearer(key), timeout=60) as http:
        name = f"<script>{ATTACK}</script><img src=x onerror={ATTACK}>"
        collection = http.post("/v1/collections", json={"name": name}).raise_for_status().json()
        files = {"file": (f"<script>{ATTACK}</script>.zip", zip_of(polyglots()))}
        upload = http.post(collection["links"]["uploads"], files=files).raise_for_status().json()
        ingest(uuid.UUID(upload["id"]), threading.Event())
        images = http.get(collection["links"]["images"]).json()["items"]
        run = http.post(collection["links"]["runs"], json={"clusters": 2}).raise_for_status().json()
    ids = [uuid.UUID(image["id"]) for image in images]
    now = datetime.now(UTC)
    with open_session() as session:
        results.store(
            session,
            uuid.UUID(run["id"]),
            [
                results.ClusterRow(
                    cluster=number, name=name, size=len(ids) * (1 - number), confidence=0.5, cohesion=None,
                    representatives=ids if number == 0 else [],
                )
                for number in range(2)
            ],
            [
                results.AssignmentRow(
                    position=place, image_id=image_id, cluster=0, rank=place, confidence=0.5, runner_up=1, margin=0.1,
                    consensus=False,
                )
                for place, image_id in enumerate(ids)
            ],
        )  # fmt: skip
        metrics = {"sizes": [len(ids), 0], "warnings": [{"code": "x", "message": name}]}
        session.execute(
            text(
                "UPDATE runs SET state = 'succeeded', started_at = :now, finished_at = :now,"
                " metrics = CAST(:metrics AS jsonb) WHERE id = :id"
            ),
            {"now": now, "metrics": json.dumps(metrics), "id": run["id"]},
        )
        session.commit()
    return {"collection": collection["id"], "upload": upload["id"], "run": run["id"], "images": images}


def assert_unharmed(page: Page, path: str) -> None:
    assert page.evaluate("typeof window.hacked") == "undefined", path


def test_nothing_that_was_uploaded_runs_on_any_page(page: Page, api_url: str):
    key = make_key()
    made = hostile_collection(api_url, key)
    assert {image["filename"] for image in made["images"]} == {name.replace("//", "/") for name in NAMES}
    sign_in(page, key)
    paths = [
        "/",
        f"/collections/{made['collection']}",
        f"/uploads/{made['upload']}",
        f"/uploads/{made['upload']}?outcome=rejected",
        f"/runs/{made['run']}",
        f"/runs/{made['run']}/clusters/0",
        f"/<script>{ATTACK}</script>",
        f"/?after=<script>{ATTACK}</script>",
        f"/sign-in?next=/<script>{ATTACK}</script>",
        f"/v1/<script>{ATTACK}</script>",
        f"/v1/collections/{made['collection']}",
        f"/v1/uploads/{made['upload']}/files",
        f"/v1/images/{made['images'][0]['id']}/thumbnail",
        "/docs",
    ]
    for path in paths:
        page.goto(path)
        page.wait_for_load_state("networkidle")
        assert_unharmed(page, path)
    page.goto(f"/runs/{made['run']}/clusters/0")
    expect(page.locator(".members li")).to_have_count(len(NAMES))
    assert page.locator(".members img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0

    for image in made["images"]:
        with page.expect_download() as download:
            page.evaluate("path => location.assign(path)", f"/v1/images/{image['id']}/original")
        suggested = download.value.suggested_filename
        assert suggested.endswith((".png", ".gif", ".jpg")), suggested
    # On our own origin, by every element that would run it; the policy and `nosniff` stand in the way.
    outcomes = page.evaluate(
        """paths => Promise.all(paths.flatMap(path => ['script', 'link', 'iframe', 'object', 'embed'].map(kind => {
            const element = document.createElement(kind);
            const answered = new Promise(done => {
                element.onerror = () => done('refused');
                element.onload = () => done(`${kind} loaded`);
            });
            if (kind === 'link') element.rel = 'stylesheet';
            element[{ object: 'data', link: 'href' }[kind] ?? 'src'] = path;
            document.body.append(element);
            return kind === 'script' || kind === 'link' ? answered : 'refused';
        })))""",
        [f"/v1/images/{image['id']}/original" for image in made["images"]],
    )
    assert set(outcomes) == {"refused"}
    page.wait_for_load_state("networkidle")
    assert_unharmed(page, "elements")


class Elsewhere(BaseHTTPRequestHandler):
    """A page of another site that tries what it can with ours."""

    def do_GET(self) -> None:
        target = self.path.partition("?")[2]
        body = f"""<!doctype html><iframe src="{target}/"></iframe>
            <script src="{target}/v1/collections"></script><img src="{target}/static/icon.svg">
            <form id=f method=post action="{target}/sign-out"></form>""".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_another_site_reads_nothing_writes_nothing_and_shows_nothing(page: Page, api_url: str):
    sign_in(page, make_key())
    expect(page.get_by_role("heading", name="Group a new collection")).to_be_visible()
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/?{api_url}")
        assert page.evaluate("document.images[0].decode().then(() => 'shown', () => 'refused')") == "refused"
        frame = page.frames[1]
        assert frame.url.startswith("chrome-error:")
        read = "url => fetch(url, { credentials: 'include' }).then(() => 'read', () => 'refused')"
        assert page.evaluate(read, f"{api_url}/v1/collections") == "refused"
        write = "url => fetch(url, { method: 'POST', credentials: 'include', mode: 'no-cors', body: '{}' })"
        page.evaluate(f"url => ({write})(url).then(() => 0, () => 0)", f"{api_url}/v1/collections")
        page.evaluate("document.getElementById('f').submit()")
        page.wait_for_url("**/sign-out")
        server.shutdown()
    page.goto("/")
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    expect(page.get_by_text("Nothing here yet")).to_be_visible()


def test_one_signs_in_works_and_signs_out(page: Page, context: BrowserContext, tmp_path: Path):
    key = make_key(name="laptop of Ada")
    sign_in(page, "kindred_nonsense")
    expect(page.get_by_role("alert")).to_have_text("This is not a key of this service.")
    assert not context.cookies()
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Signed in as laptop of Ada")).to_be_visible()
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0

    submit(page, archive(two_kinds(4)), name="Mine")
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}$"))
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="This run was cancelled")).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    assert not context.cookies()
    page.go_back()
    expect(page.get_by_role("heading", name="Sign in to Kindred")).to_be_visible()
    expect(page.get_by_text("Mine")).to_have_count(0)


def test_a_page_that_waits_asks_to_sign_in_again_once_its_session_is_over(page: Page):
    sign_in(page, make_key(name="laptop"))
    submit(page, archive(two_kinds(4)), name="Mine")  # no worker is there, so it waits
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}$"))
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    with open_session() as session:
        session.execute(text("UPDATE web_sessions SET expires_at = now()"))
        session.commit()
    expect(page.get_by_role("heading", name="Sign in to Kindred")).to_be_visible(timeout=15_000)
    expect(page).to_have_url(re.compile(r"/sign-in\?next=%2Fruns%2F"))


@pytest.mark.parametrize("width", [360, 1280])
def test_the_pages_of_signing_in_fit_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    key = make_key(name="a key with a name that goes on and on and on")
    for path in ("/sign-in", "/docs", "/"):
        if path == "/":
            sign_in(page, key)
            expect(page.get_by_role("button", name="Sign out")).to_be_visible()
        else:
            page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        if shots := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(shots) / f"{path.strip('/') or 'home'}-{width}.png")
