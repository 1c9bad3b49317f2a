from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app.main import create_app


@pytest.fixture
def api(database: None) -> Iterator[TestClient]:
    # As the service takes it before there are keys: by a name of its own machine.
    with TestClient(create_app(), base_url="http://localhost") as client:
        yield client
