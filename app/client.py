"""A client of the HTTP API: sends a folder or an archive as a stream, waits for runs, saves labels."""

import io
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from app.hosts import is_loopback

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_BLOCK = 1024 * 1024
_TAR_BLOCK = 512


class ClientError(Exception):
    """What went wrong, in one line for the person at the terminal."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Something to upload: its name, its size in bytes, and its bytes in blocks."""

    name: str
    size: int
    blocks: Callable[[], Iterator[bytes]]
    files: int | None = None
    skipped: tuple[str, ...] = ()  # suffixes of the files that are not sent


def payload_of(path: Path) -> Payload:
    """A folder becomes a tar of its images as it is sent; a file is sent as it is."""
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return Payload(name=path.name, size=path.stat().st_size, blocks=lambda: _read(path))
    raise ClientError(f"{path} is neither a folder nor a file")


def _folder(folder: Path) -> Payload:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ClientError(f"{folder} holds no images ({suffixes})")
    entries = [(path, _tar_header(folder, path), path.stat().st_size) for path in images]
    size = sum(len(header) + _padded(length) for _, header, length in entries) + 2 * _TAR_BLOCK

    def blocks() -> Iterator[bytes]:
        for path, header, length in entries:
            yield header
            sent = 0
            for block in _read(path):
                if sent + len(block) > length:
                    raise ClientError(f"{path} changed while it was being sent")
                sent += len(block)
                yield block
            if sent != length:
                raise ClientError(f"{path} changed while it was being sent")
            yield b"\0" * (_padded(length) - length)
        yield b"\0" * (2 * _TAR_BLOCK)

    return Payload(
        name=f"{folder.resolve().name or 'images'}.tar",
        size=size,
        blocks=blocks,
        files=len(images),
        skipped=tuple(path.suffix.lower() for path in found if path.suffix.lower() not in IMAGE_SUFFIXES),
    )


def _tar_header(folder: Path, path: Path) -> bytes:
    entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
    entry.size = path.stat().st_size
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(length: int) -> int:
    return -(-length // _TAR_BLOCK) * _TAR_BLOCK


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


class Client:
    """Kindred over HTTP. Raises `ClientError` for whatever keeps an answer from coming."""

    def __init__(self, server: str, key: str | None = None) -> None:
        """`key`: where the service asks for one. It goes to this server only: redirects are not followed."""
        self.server = server.rstrip("/")
        headers = {} if not key else {"Authorization": f"Bearer {key}"}
        # No proxy between us and ourselves.
        elsewhere = not is_loopback(urlsplit(self.server).hostname or "")
        self._http = httpx.Client(
            base_url=self.server, headers=headers, timeout=httpx.Timeout(60, read=600), trust_env=elsewhere
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def cluster(self, payload: Payload, fields: dict[str, str], sent: Callable[[int], None]) -> dict[str, Any]:
        """Send the one-shot request; `sent` hears how many bytes have left. The new run."""
        # A service that refuses an upload closes the connection, and we would still be sending.
        self._json("POST", "/v1/parameters", json={name: value for name, value in fields.items() if name != "name"})
        boundary = f"kindred-{uuid.uuid4().hex}"
        head = io.BytesIO()
        for name, value in fields.items():
            head.write(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
        filename = payload.name.replace('"', "%22").replace("\r", " ").replace("\n", " ")
        head.write(
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'.encode(
                "utf-8", "replace"
            )
        )
        tail = f"\r\n--{boundary}--\r\n".encode()

        def body() -> Iterator[bytes]:
            yield head.getvalue()
            done = 0
            for block in payload.blocks():
                yield block
                done += len(block)
                sent(done)
            yield tail

        return self._json(
            "POST",
            "/v1/cluster",
            content=body(),
            headers={
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Content-Length": str(len(head.getvalue()) + payload.size + len(tail)),
                "Idempotency-Key": uuid.uuid4().hex,
            },
        )

    def get(self, path: str, **params: str | int) -> dict[str, Any]:
        return self._json("GET", path, params=params)

    def watch(self, path: str, every_s: float = 0.5) -> Iterator[dict[str, Any]]:
        """The upload or run at `path`, again and again, the last time in its final state."""
        failures = 0
        while True:
            try:
                job = self.get(path)
                failures = 0
            except ClientError:
                # A restarting service is no reason to give up a long job.
                failures += 1
                if failures > 60:
                    raise
                time.sleep(every_s)
                continue
            yield job
            if job["state"] not in {"queued", "running"}:
                return
            time.sleep(every_s)

    def items(self, path: str) -> Iterator[dict[str, Any]]:
        cursor: str | None = None
        while True:
            page = self.get(path, limit=1000, **({"cursor": cursor} if cursor else {}))
            yield from page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def save(self, path: str, target: Path) -> None:
        """Write what is at `path` to `target`, which appears only when it is whole."""
        partial = _partial(target)
        try:
            with self._http.stream("GET", path) as answer, partial.open("wb") as file:
                answer.raise_for_status()
                for block in answer.iter_bytes():
                    file.write(block)
            partial.replace(target)
        except (httpx.HTTPError, OSError) as error:
            raise ClientError(f"cannot write {target}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def cancel(self, run: dict[str, Any]) -> None:
        self._json("POST", f"{run['links']['self']}/cancel")

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise ClientError(f"{self.server} cannot be reached: {error or type(error).__name__}") from error
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ClientError(f"{_detail(answer)} Set KINDRED_API_KEY to a key of {self.server}.")
        if answer.is_error:
            raise ClientError(_detail(answer))
        found: dict[str, Any] = answer.json()
        return found


def check_writable(target: Path) -> None:
    """Make the folder of a file that is to be written, and say now if it could not be."""
    if target.is_dir():
        raise ClientError(f"cannot write {target}: it is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _partial(target).touch()
        _partial(target).unlink()
    except FileExistsError as error:
        raise ClientError(f"cannot write {target}: {target.parent} is no folder") from error
    except OSError as error:
        raise ClientError(f"cannot write {target}: {error.strerror}") from error


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the service answered {answer.status_code} to {answer.request.method} {answer.request.url.path}"
