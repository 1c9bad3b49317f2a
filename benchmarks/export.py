"""Labels of a large run over HTTP beside PostgreSQL's own COPY: `python -m benchmarks.export --rows 1000000`.

Starts the embedded service on a folder of its own and writes a run of that many images straight into its database.
Then, in turn, takes `labels.csv` and `labels.json` from the API, whose requests are under row-level security, and the
same rows as the tables' owner by `COPY … TO STDOUT`. Prints seconds, their ratio, and the API's memory (Linux: VmHWM).
"""

import argparse
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg

from app.config import Settings
from app.embedded import postgres_server
from app.services.results import LABELS
from app.up import running_service
from benchmarks.upload import memory_mib

CLUSTERS = 100
Way = Callable[[], int]  # takes every byte, and counts them
ROWS = """
    INSERT INTO collections (id, name) VALUES (%(collection)s, 'many');
    INSERT INTO uploads (id, collection_id, bytes, state, finished_at)
    VALUES (%(upload)s, %(collection)s, 1, 'succeeded', now());
    INSERT INTO runs (id, collection_id, parameters, state, finished_at)
    VALUES (%(run)s, %(collection)s, '{}', 'succeeded', now());
    INSERT INTO clusters (run_id, cluster, name, size)
    SELECT %(run)s, k, 'Group ' || k, 1 FROM generate_series(0, %(clusters)s - 1) k;
    INSERT INTO images (id, collection_id, upload_id, sha256, filename, format, width, height, bytes)
    SELECT gen_random_uuid(), %(collection)s, %(upload)s, encode(sha256(n::text::bytea), 'hex'),
           'holidays/' || n %% 97 || '/IMG_' || n || '.jpg', 'JPEG', 4000, 3000, 3000000
    FROM generate_series(1, %(rows)s) n;
    INSERT INTO assignments
        (run_id, position, image_id, cluster, rank, confidence, runner_up, margin, consensus)
    SELECT %(run)s, number, id, number %% %(clusters)s, number, random(), 0, random(), number %% 5 > 0 FROM images;
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--port", type=int, default=8129)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kindred-export-", dir=os.environ.get("KINDRED_DATA_DIR")) as folder:
        settings = Settings(data_dir=Path(folder), port=options.port, database_url=None, broker_url=None)
        with running_service(settings) as url:
            database = postgres_server(Path(folder)).url.replace("postgresql+psycopg:", "postgresql:")
            run = written(database, options.rows)
            measure(f"{url}/v1/runs/{run}", database, run, options.rounds)


def written(database: str, rows: int) -> uuid.UUID:
    """The run, its images and their assignments, in the database."""
    ids = {name: uuid.uuid4() for name in ("collection", "upload", "run")}
    started = time.perf_counter()
    with psycopg.connect(database) as connection:
        with psycopg.ClientCursor(connection) as cursor:
            cursor.execute(ROWS, {**ids, "clusters": CLUSTERS, "rows": rows})
        connection.commit()
        connection.autocommit = True
        connection.execute("ANALYZE")
    print(f"{rows:,} rows written in {time.perf_counter() - started:.0f} s")
    return ids["run"]


def measure(path: str, database: str, run: uuid.UUID, rounds: int) -> None:
    ways: dict[str, Way] = {
        "COPY … TO STDOUT": lambda: copied(database, run),
        "labels.csv": lambda: downloaded(f"{path}/labels.csv"),
        "labels.json": lambda: downloaded(f"{path}/labels.json"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sizes: dict[str, int] = {}
    before = memory_mib()["API"]
    for _ in range(rounds):
        for way, take in ways.items():
            started = time.perf_counter()
            sizes[way] = take()
            seconds[way].append(time.perf_counter() - started)
    own = statistics.median(seconds["COPY … TO STDOUT"])
    for way, each in seconds.items():
        took = statistics.median(each)
        print(f"{way:<17} {took:6.2f} s  {sizes[way] / 2**20:4.0f} MiB  {own / took:.2f} times the speed of COPY")
    print(f"peak memory of the API: {memory_mib()['API']:.0f} MiB, {before:.0f} before")


def copied(database: str, run: uuid.UUID) -> int:
    with (
        psycopg.connect(database) as connection,
        connection.cursor() as cursor,
        cursor.copy(f"COPY ({LABELS}) TO STDOUT (FORMAT csv, HEADER)", {"run_id": run}) as copy,
    ):
        return sum(len(block) for block in copy)


def downloaded(url: str) -> int:
    with httpx.stream("GET", url, timeout=600, headers={"Accept-Encoding": "identity"}) as answer:
        answer.raise_for_status()
        return sum(len(block) for block in answer.iter_bytes())


if __name__ == "__main__":
    main()
