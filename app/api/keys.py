import uuid
from datetime import datetime, timedelta
from typing import Annotated, Self, cast

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.access import AdminRoute
from app.api.deps import Cursor, DatabaseSession, Limit
from app.api.problems import responses
from app.api.schemas import PageOf
from app.db.tables import ApiKey
from app.services import keys
from app.services.keys import Scope

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=AdminRoute)

_MAX_LIFE_S = 10 * 365 * 24 * 3600


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$"),
        Field(description="What it is for; for people.", examples=["nightly import"]),
    ]
    scope: Annotated[Scope, Field(description="`admin` may all that `write` may, and that all that `read` may.")] = (
        "write"
    )
    expires_in_s: Annotated[
        int | None, Field(ge=1, le=_MAX_LIFE_S, description="How long it is good for; unset: until it is revoked.")
    ] = None


class KeyOut(BaseModel):
    id: uuid.UUID
    name: str
    prefix: str = Field(description="How the key begins, after `kindred_`.")
    scope: Scope
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    links: dict[str, str]

    @classmethod
    def of(cls, row: ApiKey, **more: str) -> Self:
        return cls(
            id=row.id,
            name=row.name,
            prefix=row.prefix,
            scope=cast("Scope", row.scope),
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
            last_used_at=row.last_used_at,
            links={"self": f"/v1/keys/{row.id}"},
            **more,
        )


class KeyMade(KeyOut):
    key: str = Field(description="The key itself, which is shown this once and kept nowhere.")


@router.post("", status_code=201, responses=responses(400, 413, 422))
def create_key(new: NewKey, response: Response, session: DatabaseSession) -> KeyMade:
    """Make a key. The answer is the only place where it can be read."""
    lasts = None if new.expires_in_s is None else timedelta(seconds=new.expires_in_s)
    row, key = keys.create(session, new.name, new.scope, lasts=lasts)
    session.commit()
    made = KeyMade.of(row, key=key)
    response.headers["Location"] = made.links["self"]
    response.headers["Cache-Control"] = "no-store"
    return made


@router.get("", responses=responses(422))
def list_keys(session: DatabaseSession, limit: Limit = 50, cursor: Cursor = None) -> PageOf[KeyOut]:
    """Every key that was made, newest first."""
    page = keys.list_page(session, limit, cursor)
    return PageOf(items=[KeyOut.of(row) for row in page.items], next=page.next)


@router.get("/{key_id}", responses=responses(404, 422))
def get_key(key_id: uuid.UUID, session: DatabaseSession) -> KeyOut:
    return KeyOut.of(keys.get(session, key_id))


@router.post("/{key_id}/revoke", responses=responses(404, 422))
def revoke_key(key_id: uuid.UUID, session: DatabaseSession) -> KeyOut:
    """From the next request on, the key opens nothing, nor do the browsers that signed in with it."""
    row = keys.revoke(session, key_id)
    session.commit()
    return KeyOut.of(row)
