"""The only place where the service is wired together."""

from importlib.metadata import version

from fastapi import FastAPI

from app.access import Rates
from app.api import clusters, collections, health, images, keys, labels, problems, runs, uploads
from app.api.body_limit import BodyLimit
from app.api.head import HeadAsGet
from app.api.observe import Observe
from app.config import settings
from app.headers import SecurityHeaders
from app.logs import configure_logs
from app.web import pages

_DESCRIPTION = """
Kindred groups an image collection by what the pictures show, without labels.

Send an archive to `POST /v1/cluster`, poll the `Location` of the answer until `state` is `succeeded`, then
read `labels.csv`. Errors are RFC 9457 problem details.
"""


def create_app() -> FastAPI:
    configure_logs()
    app = FastAPI(title="Kindred", version=version("kindred"), description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.rates = Rates(settings().requests_per_minute)
    problems.install(app)
    for module in (collections, uploads, images, runs, clusters, labels, keys, health):
        app.include_router(module.router)
    app.include_router(health.guarded)
    pages.install(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Observe)
    return app
