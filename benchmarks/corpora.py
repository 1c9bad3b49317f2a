"""Image corpora that packages ship, through the real upload and the real ingest.

    pip download --no-binary pillow --no-deps pillow==13.0.0     # Pillow's own test images
    pip download --no-binary :all: --no-deps pypng               # PngSuite, inside `pngsuite.py`
    apt-get download gdk-pixbuf-tests                            # Debian's, on Debian or Ubuntu
    python -m benchmarks.corpora FOLDER                          # where these lie

Every file is sent, whatever its name: no process dies, no file lies outside the data folder, each file has its row
in the ledger. Prints how many were accepted, duplicates and rejected, by reason.
"""

import argparse
import io
import os
import re
import subprocess
import tarfile
import tempfile
import threading
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import select

from app.config import settings
from app.db.migrate import upgrade
from app.db.session import open_session
from app.db.tables import UploadFile
from app.embedded import running_servers
from app.main import create_app
from worker.ingest import ingest

Files = dict[str, bytes]


def pillow(path: Path) -> Files:
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: read.read()
            for member in archive
            if member.isreg() and "/Tests/images/" in member.name and (read := archive.extractfile(member))
        }


def debian(path: Path) -> Files:
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name.removeprefix("./usr/libexec/installed-tests/"): read.read()
            for member in archive
            if member.isreg() and "installed-tests" in member.name and (read := archive.extractfile(member))
        }


def pngsuite(path: Path) -> Files:
    """pypng keeps the suite as hexadecimal text in a Python source, which is read and not run."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith("/code/pngsuite.py") and (read := archive.extractfile(member)):
                found = re.findall(
                    r"""['"](\w+)['"]: _dehex\(b?["']{3}(.*?)["']{3}\)""", read.read().decode(), re.DOTALL
                )
                return {f"pngsuite/{name}.png": bytes.fromhex(digits) for name, digits in found}
    return {}


SOURCES = {"pillow-*.tar.gz": pillow, "gdk-pixbuf-tests_*.deb": debian, "pypng-*.tar.gz": pngsuite}


def corpora(folder: Path) -> Iterator[tuple[str, Files]]:
    for pattern, read in SOURCES.items():
        for path in sorted(folder.glob(pattern)):
            yield path.name, read(path)


def send(files: Files, root: Path) -> tuple[Counter[str], float]:
    """Outcomes and reasons of every file, and the seconds that the ingest took; checks what is left on the disk."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    outside = {path for path in root.iterdir() if path.name != "data"}
    with TestClient(create_app(), base_url="http://localhost") as api:
        collection = api.post("/v1/collections", json={"name": "corpus"}).json()["id"]
        answer = api.post(
            f"/v1/collections/{collection}/uploads", files={"file": ("corpus.zip", buffer.getvalue())}
        ).json()
        started = time.perf_counter()
        ingest(uuid.UUID(answer["id"]), threading.Event())
        seconds = time.perf_counter() - started
        upload = api.get(answer["links"]["self"]).json()
    assert upload["state"] == "succeeded", upload["problem"]
    with open_session() as session:
        rows = session.scalars(select(UploadFile).where(UploadFile.upload_id == upload["id"])).all()
    assert len(rows) + upload["counts"]["ignored"] == len(files)
    assert all(row.reason for row in rows if row.outcome == "rejected")
    assert {path for path in root.iterdir() if path.name != "data"} == outside
    kept = [path for path in (root / "data").rglob("*") if path.is_file()]
    assert len(kept) == 2 * upload["counts"]["accepted"]
    found = Counter(row.outcome if row.reason_code is None else f"rejected: {row.reason_code}" for row in rows)
    if upload["counts"]["ignored"]:
        found["ignored"] = upload["counts"]["ignored"]
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_servers(Path(folder) / "servers") as urls:
        upgrade(urls.database_url)
        for name, files in corpora(chosen.folder):
            root = Path(folder) / name
            root.mkdir()
            os.environ |= {
                "KINDRED_DATABASE_URL": urls.database_url,
                "KINDRED_BROKER_URL": urls.broker_url,
                "KINDRED_DATA_DIR": str(root / "data"),
            }
            settings.cache_clear()
            found, seconds = send(files, root)
            print(f"{name}: {len(files)} files in {seconds:.1f} s")
            for outcome, count in sorted(found.items()):
                print(f"  {outcome:32} {count}")


if __name__ == "__main__":
    main()
