import pytest
from fastapi.testclient import TestClient

from app.config import settings
from app.db.session import tenant_session
from app.db.tables import DEFAULT_TENANT
from app.errors import Conflict
from app.services import idempotency
from tests.app.test_api import archive, assert_problem, files_below, rows
from tests.pictures import picture, zip_of


def test_another_upload_with_the_same_key_is_refused(api: TestClient):
    headers = {"Idempotency-Key": "k-1"}
    api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}, headers=headers)
    other = ("pictures.zip", zip_of({"c/3.png": picture(3)}), "application/zip")
    answer = api.post("/v1/cluster", files={"file": other}, data={"clusters": "2"}, headers=headers)
    assert "'k-1'" in assert_problem(answer, 409, "idempotency-key-reused")["detail"]
    assert rows("uploads") == len(files_below(settings().data_dir)) == 1


def test_of_two_requests_at_the_same_moment_one_is_told_to_come_again(database: None):
    answer = {"status": 201, "location": "/v1/collections/x", "body": {}}
    with tenant_session(DEFAULT_TENANT) as first, tenant_session(DEFAULT_TENANT) as second:
        for session in (first, second):
            assert idempotency.recall(session, "k-1", "digest") is None
        idempotency.remember(first, "k-1", "digest", **answer)
        first.commit()
        with pytest.raises(Conflict, match="is being answered at this moment") as caught:
            idempotency.remember(second, "k-1", "digest", **answer)
    assert caught.value.code == "idempotency-key-in-use"
