"""docker-compose.yml: parsed, and its very commands started as processes on real servers."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy import make_url

from app.config import Settings
from app.embedded import ServerUrls
from tests.e2e.conftest import free_port
from tests.pictures import two_kinds, zip_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
PASSWORDS = {"KINDRED_DB_PASSWORD": "d8f1", "KINDRED_REDIS_PASSWORD": "5a0c"}
OURS = ("migrate", "api", "ingest", "train", "train-cpu")


def interpolated(text: str, given: dict[str, str]) -> str:
    """`${NAME:?error}` and `${NAME:-default}` as Compose replaces them."""

    def value(found: re.Match[str]) -> str:
        name, operator, word = found.groups()
        if operator == ":?":
            return given[name]
        return given.get(name) or word

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", value, text)


COMPOSE = yaml.safe_load(interpolated(TEXT, PASSWORDS))
SERVICES = COMPOSE["services"]
# The text of each build stage by its name, without the name of its parent.
STAGES = {
    name: (parent, body)
    for parent, name, body in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL
    )
}


def image_says(target: str, instruction: str) -> str | None:
    """The last value of an instruction in an image, inherited ones included."""
    parent, body = STAGES[target]
    found = re.findall(rf"^{instruction} (.*(?:\\\n.*)*)", body, re.MULTILINE)
    if found:
        return str(found[-1])
    return image_says(parent, instruction) if parent in STAGES else None


def test_every_variable_is_a_setting():
    known = {f"KINDRED_{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        assert set(SERVICES[name]["environment"]) <= known


def test_the_urls_name_the_servers_beside_them():
    database = make_url(SERVICES["api"]["environment"]["KINDRED_DATABASE_URL"])
    postgres = SERVICES["postgres"]["environment"]
    assert SERVICES[database.host]["image"].startswith("pgvector/pgvector:")
    assert (database.username, database.password, database.database) == (
        postgres["POSTGRES_USER"],
        postgres["POSTGRES_PASSWORD"],
        postgres["POSTGRES_DB"],
    )
    broker = make_url(SERVICES["api"]["environment"]["KINDRED_BROKER_URL"])
    command = SERVICES[broker.host]["command"]
    assert command[command.index("--requirepass") + 1] == broker.password


def test_redis_keeps_what_it_takes():
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_passwords_must_be_given_and_only_the_api_is_reachable_from_this_machine_alone():
    for rest in re.findall(r"\$\{KINDRED_\w+PASSWORD([^}]*)\}", TEXT):
        assert rest.startswith(":?")
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8000:8000"]}


def test_every_service_that_stays_tells_its_health_and_has_time_to_stop():
    for name, service in SERVICES.items():
        if name == "migrate":
            continue
        own = service.get("healthcheck", {}).get("test")
        assert own or image_says(service["build"]["target"], "HEALTHCHECK"), name
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"] == "35s"
    # The image that ingest shares with the API asks for the API's port.
    assert "celery" in SERVICES["ingest"]["healthcheck"]["test"][1]


def test_every_image_runs_as_an_ordinary_user_on_its_own_data_folder():
    for name in OURS:
        target = SERVICES[name]["build"]["target"]
        assert image_says(target, "USER") == "kindred"
        assert image_says(target, "VOLUME") == SERVICES[name]["environment"]["KINDRED_DATA_DIR"]
        assert "user" not in SERVICES[name]


def test_an_image_alone_starts_what_compose_starts():
    for name in ("api", "train", "train-cpu"):
        assert yaml.safe_load(str(image_says(SERVICES[name]["build"]["target"], "CMD"))) == SERVICES[name]["command"]


def test_images_get_the_code_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == packages | {"pyproject.toml", "README.md", "LICENSE"}


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these requirements, on this machine."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        for asked in {"", *wanted.extras} - {extra for known, extra in found if known == name}:
            found.add((name, asked))
            try:
                waiting += [(Requirement(line), asked) for line in requires(name) or []]
            except PackageNotFoundError as error:
                raise AssertionError(f"{name} is required and not installed") from error
    return {name for name, _ in found}


@pytest.mark.slow
def test_the_image_of_the_api_holds_all_that_its_commands_import():
    """The API and the ingest worker, with every module hidden that is here only for training or development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = installed_with(project["dependencies"]) | {"kindred"}
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not there & {canonicalize_name(owner) for owner in owners}
    }
    assert "torch" in hidden
    script = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(hidden)!r}))
from app.main import create_app
from worker.celery_app import app
create_app()
app.loader.import_default_modules()
app.connection_for_read("redis://localhost").transport
import app.cli
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def started(name: str, environment: dict[str, str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service's own command; the one change is where the API listens, since the machine's 8000 may be taken."""
    replaced = {
        "0.0.0.0": "127.0.0.1",  # noqa: S104 - the other way round
        "8000": str(port),
    }
    command = [replaced.get(word, word) for word in SERVICES[name]["command"]]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield process
        process.terminate()
        # uvicorn ends well and then dies of the signal it was sent, as POSIX programs should.
        assert process.wait(35) in (0, -signal.SIGTERM), log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def await_ready(http: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if http.get("/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def is_healthy(name: str) -> bool:
    """Whether a service's own health check passes; ours look at the processes of the machine they run on."""
    kind, test = SERVICES[name]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    return subprocess.run(["/bin/sh", "-c", test], timeout=3).returncode == 0


def first_key(environment: dict[str, str]) -> str:
    """By the command that the file's head names, in the environment of the API."""
    said = re.search(r"docker compose run --rm api (kindred keys create .*)", TEXT)
    assert said
    kindred, *arguments = shlex.split(said[1])
    program = Path(sys.executable).with_name(kindred)
    made = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.mark.slow
@pytest.mark.xdist_group("service")
def test_its_commands_do_the_whole_job(servers: ServerUrls, database: None, tmp_path: Path):
    # What Compose gives the processes, but with servers and a folder of this test.
    ours = {
        "KINDRED_DATABASE_URL": servers.database_url,
        "KINDRED_BROKER_URL": servers.broker_url,
        "KINDRED_DATA_DIR": str(tmp_path / "data"),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KINDRED_")}
    environment = {name: clean | SERVICES[name]["environment"] | ours for name in OURS}
    assert {*ours, "KINDRED_REQUIRE_KEYS"} == SERVICES["api"]["environment"].keys()
    port = free_port()

    with started("migrate", environment["migrate"], port, tmp_path / "migrate.log") as migrate:
        assert migrate.wait(60) == 0, (tmp_path / "migrate.log").read_text()
    with (
        started("api", environment["api"], port, tmp_path / "api.log"),
        started("ingest", environment["ingest"], port, tmp_path / "ingest.log"),
        started("train", environment["train"], port, tmp_path / "train.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http,
    ):
        await_ready(http, tmp_path / "api.log")
        assert http.get("/v1/collections").status_code == httpx.codes.UNAUTHORIZED
        http.headers["Authorization"] = f"Bearer {first_key(environment['api'])}"
        sent = http.post(
            "/v1/cluster",
            files={"file": ("p.zip", zip_of(two_kinds(40)))},
            data={"clusters": "2", "method": "kmeans"},
        )
        assert sent.status_code == httpx.codes.ACCEPTED, sent.text
        deadline = time.monotonic() + 120
        while (run := http.get(sent.headers["Location"]).json())["state"] in ("queued", "running"):
            assert time.monotonic() < deadline, "\n".join(log.read_text() for log in tmp_path.glob("*.log"))
            time.sleep(0.3)
        assert run["state"] == "succeeded", run
        assert is_healthy("ingest")
        assert is_healthy("train")

        rows = list(csv.DictReader(http.get(f"{sent.headers['Location']}/labels.csv").text.splitlines()))
        groups = Counter((row["filename"].split("/")[0], row["cluster"]) for row in rows)
        # 20 pictures of each kind, each kind in a cluster of its own.
        assert sorted(groups.values()) == [20, 20]
        assert len({kind for kind, _ in groups}) == len({cluster for _, cluster in groups}) == 2
