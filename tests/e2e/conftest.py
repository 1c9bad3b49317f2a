"""One running service for all end-to-end tests of a worker process."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser, sync_playwright

from app.config import Settings
from app.up import running_service
from tests.e2e.browser import ARGUMENTS, CHROMIUM


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the whole stack, started as a user starts it, on a data folder of its own."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("service"), port=free_port(), database_url=None, broker_url=None
    )
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:  # `make test` gives its own processes one core each
            patch.delenv("OMP_NUM_THREADS", raising=False)
            patch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
            url = running.enter_context(running_service(settings))
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
