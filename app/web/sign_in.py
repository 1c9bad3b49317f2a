"""A browser signs in with a key, once, and is known by a cookie from then on.

The cookie holds a random value and not the key. Scripts cannot read it (`HttpOnly`), and no other site's page can
make a browser send it (`SameSite=Strict`); `app.web.guard` refuses their writes besides.
"""

from typing import Annotated
from urllib.parse import quote, urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from app.access import COOKIES, authenticate, cookie_name
from app.config import settings
from app.db.session import tenant_session
from app.errors import Unauthenticated
from app.services import keys
from app.web import render

# Not guarded: whoever comes here is not known yet.
router = APIRouter(include_in_schema=False)


def ask(request: Request) -> Response:
    """Leads to the sign-in page, and back from there."""
    there = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/sign-in?next={quote(there, safe='')}", 303, headers={"Cache-Control": "no-store"})


@router.get("/sign-in")
def form(request: Request, next: str = "/") -> Response:  # noqa: A002 - the name in the address
    try:
        authenticate(request)
    except Unauthenticated:
        return _form(request, next)
    return RedirectResponse(_local(next), 303)


@router.post("/sign-in")
def sign_in(
    request: Request,
    key: Annotated[str, Form(max_length=200)] = "",
    next: Annotated[str, Form(max_length=2000)] = "/",  # noqa: A002 - as above
) -> Response:
    try:
        with tenant_session(None) as session:
            holder = keys.recognise(session, key.strip())
    except Unauthenticated as error:
        return _form(request, next, problem=error.detail if key.strip() else "Paste a key first.")
    with tenant_session(holder.tenant_id) as session:
        # A value of its own for each sign-in: one that somebody planted in this browser opens nothing.
        token = keys.sign_in(session, holder, settings().session_s)
        keys.note_use(session, holder.key_id)
        session.commit()
    response = RedirectResponse(_local(next), 303)
    name = cookie_name(request)
    response.set_cookie(
        name,
        token,
        max_age=int(settings().session_s),
        path="/",
        secure=name == COOKIES["https"],
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    name = cookie_name(request)
    token = request.cookies.get(name)
    if token:
        with tenant_session(None) as session:
            holder = keys.signed_in(session, token)
        if holder is not None:
            with tenant_session(holder.tenant_id) as session:
                keys.sign_out(session, token)
                session.commit()
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(name, path="/", secure=name == COOKIES["https"], httponly=True, samesite="strict")
    response.headers["Clear-Site-Data"] = '"cache"'  # the pictures that the browser keeps
    return response


def _form(request: Request, next_: str, problem: str | None = None) -> HTMLResponse:
    name = urlsplit(str(request.base_url)).netloc
    return render.page(
        "sign-in.html", caller=None, status=401 if problem else 200, next=_local(next_), problem=problem, name=name
    )


def _local(address: str) -> str:
    """An address of ours, or else the first page: a link to here must not lead elsewhere afterwards."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "/"
    plain = address.isprintable() and "\\" not in address
    ours = plain and address.startswith("/") and not address.startswith("//") and not (parts.scheme or parts.netloc)
    return address if ours else "/"
