"""Who sent a request, and whether they may: asked once, before anything else of the request is read.

Routes of `GuardedRoute` answer nobody else. There is no other way to a tenant's rows: a session needs a caller.
"""

import ipaddress
import math
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from app.config import settings
from app.db.session import tenant_session
from app.db.tables import DEFAULT_TENANT
from app.errors import Forbidden, TooMany, Unauthenticated
from app.services import keys
from app.services.keys import SCOPES, Holder, Scope

# A browser takes a cookie of the second name only over https, and from this very host.
COOKIES = {"http": "kindred_session", "https": "__Host-kindred_session"}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whose request it is. `by`: a key, a browser that signed in, or somebody on this machine before any key."""

    tenant_id: uuid.UUID
    scope: Scope
    by: Literal["key", "browser", "machine"]
    key_id: uuid.UUID | None = None
    key_name: str | None = None

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class GuardedRoute(APIRoute):
    """A route that knows its caller. Reading takes the scope `read`, everything else `write`."""

    scope: ClassVar[Scope | None] = None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            needed: Scope = self.scope or ("read" if request.method in SAFE_METHODS else "write")
            request.state.caller = await run_in_threadpool(_admit, request, needed)
            return await inner(request)

        return guarded


class AdminRoute(GuardedRoute):
    scope = "admin"


def caller_of(request: Request) -> Caller:
    """As a dependency of guarded routes. Fails for others, where nobody has asked."""
    found = getattr(request.state, "caller", None)
    if not isinstance(found, Caller):
        raise Unauthenticated("This needs a key.", code="key-needed")
    return found


def authenticate(request: Request) -> Caller:
    """Whoever sent the request; `Unauthenticated` where that cannot be told."""
    with tenant_session(None) as session:
        sent = request.headers.get("authorization")
        if sent is not None:
            scheme, _, key = sent.partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthenticated("Send the key as `Authorization: Bearer KEY`.", code="unknown-key")
            return _caller(keys.recognise(session, key.strip()), "key")
        token = request.cookies.get(cookie_name(request))
        holder = keys.signed_in(session, token) if token else None
        if holder is not None:
            return _caller(holder, "browser")
        if settings().require_keys or keys.exist(session):
            raise Unauthenticated("Send a key as `Authorization: Bearer KEY`, or sign in.", code="key-needed")
    if not _from_this_machine(request):
        raise Unauthenticated(
            "Without keys this service answers its own machine only, as 127.0.0.1 or localhost; "
            "`kindred keys create NAME` makes a key.",
            code="key-needed",
        )
    return Caller(tenant_id=DEFAULT_TENANT, scope="admin", by="machine")


def cookie_name(request: Request) -> str:
    return COOKIES["https" if request.url.scheme == "https" else "http"]


def _caller(holder: Holder, by: Literal["key", "browser"]) -> Caller:
    if holder.stale:
        with tenant_session(holder.tenant_id) as session:
            keys.note_use(session, holder.key_id)
            session.commit()
    return Caller(tenant_id=holder.tenant_id, scope=holder.scope, by=by, key_id=holder.key_id, key_name=holder.name)


def _admit(request: Request, needed: Scope) -> Caller:
    caller = authenticate(request)
    if caller.by != "machine":
        rates: Rates = request.app.state.rates
        rates.count(caller.tenant_id)
    if caller.by == "browser" and request.method not in SAFE_METHODS and not _says_from_where(request):
        raise Forbidden("A write by a browser must say which page sent it.", code="cross-site-request")
    if not caller.may(needed):
        raise Forbidden(f"This takes a key of the scope {needed}; yours has {caller.scope}.", code="scope-missing")
    return caller


def _says_from_where(request: Request) -> bool:
    """Every browser does; where it comes from, `app.web.guard` has looked at."""
    return "origin" in request.headers or "sec-fetch-site" in request.headers


def _from_this_machine(request: Request) -> bool:
    """Whether both ends of the connection are this machine's, and the name that was asked for as well.

    The name: a page of another site may call itself by a name that leads to 127.0.0.1 (DNS rebinding).
    """
    server = request.scope.get("server")
    ends = (request.client.host if request.client else None, server[0] if server else None)
    if not all(end is None or _is_local(end, otherwise=True) for end in ends):
        return False
    return _is_local(request.url.hostname or "", otherwise=False)


def _is_local(host: str, *, otherwise: bool) -> bool:
    """`otherwise`: for what is no address, such as the path of a socket."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return otherwise
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class Rates:
    """A bucket of requests for each tenant, in memory: it must hold while every other server is away.

    The bucket is kept as the moment at which it would be full again (GCRA, ITU-T I.371).
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._full_at: dict[uuid.UUID, float] = {}
        self._lock = threading.Lock()

    def count(self, tenant_id: uuid.UUID) -> None:
        """Take one request out of the bucket; `TooMany` says when there will be one again."""
        if not self._per_minute:
            return
        each_s = 60.0 / self._per_minute
        with self._lock:
            now = self._clock()
            full_at = max(now, self._full_at.get(tenant_id, now)) + each_s
            wait_s = full_at - now - 60.0
            if wait_s <= 1e-9:
                self._full_at[tenant_id] = full_at
                return
        raise TooMany(
            f"At most {self._per_minute} requests a minute.", code="too-many-requests", retry_after_s=math.ceil(wait_s)
        )
