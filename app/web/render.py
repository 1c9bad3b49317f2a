"""Templates to answers, with the headers that every page carries."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app import storage
from app.access import Caller
from app.headers import HEADERS, PAGE_POLICY
from app.services import parameters, runs
from app.web import wording

HERE = Path(__file__).parent

# A page is looked at again by the back button, and by the browser's own cache for no longer.
_HEADERS = HEADERS | {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "private, no-cache"}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,  # file names and collection names are anybody's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (
        wording.ago, wording.agreement, wording.clarity, wording.count, wording.duration, wording.filesize,
        wording.moment, wording.percent, wording.stage, wording.time_left, wording.vote, wording.why_not,
    ):  # fmt: skip
        environment.filters[filter_.__name__] = filter_
    environment.globals |= {
        "STATES": wording.STATES,
        "METHODS": wording.METHODS,
        "TRAIN": wording.TRAIN,
        "TRAINED": wording.TRAINED,
        "TRAIN_OF_METHOD": parameters.TRAIN_OF_METHOD,
        "BACKBONES": parameters.BACKBONES,
        "weights_files": storage.weights_files,
        "clusters_of": runs.clusters_of,
        "CRITERIA": wording.CRITERIA,
        "OUTCOMES": wording.OUTCOMES,
    }
    return environment


_TEMPLATES = _environment()


def page(
    template: str,
    /,
    *,
    caller: Caller | None,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **context: Any,
) -> HTMLResponse:
    """`caller`: who looks at it, where that is known; `who` in templates, as macros have a `caller` of Jinja's own."""
    body = _TEMPLATES.get_template(template).render(who=caller, **context)
    # After the sign-out, the back button must find nothing.
    kept = {"Cache-Control": "no-store"} if caller and caller.by == "browser" else {}
    return HTMLResponse(body, status_code=status, headers={**(headers or {}), **_HEADERS, **kept})


class Static(StaticFiles):
    """Style and scripts, asked for anew with each page, so that a new version is never mixed with an old one."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response
