"""What PostgreSQL and Valkey have in common."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from app.processes import Child

ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}  # and none of ours: PGDATA and its like would mislead


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that can be started."""

    child: Child
    url: str = field(repr=False)
    """Holds a password; not for logs."""
    ask: Callable[[], None]
    """Raises while the server does not answer yet."""
