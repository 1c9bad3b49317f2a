from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app.main import create_app


@pytest.fixture
def api(database: None) -> Iterator[TestClient]:
    with TestClient(create_app()) as client:
        yield client
