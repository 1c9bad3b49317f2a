"""What can go wrong, in the words of the domain. HTTP status codes live in `app.api.problems`."""

from dataclasses import dataclass, field


@dataclass
class KindredError(Exception):
    """An error whose `detail` is written for the person who caused or met it.

    `code` is stable and names the kind of problem (`too-few-images`); `fields` says which inputs were wrong.
    """

    detail: str
    code: str = "error"
    fields: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail


class NotFound(KindredError):
    pass


class Conflict(KindredError):
    pass


class Invalid(KindredError):
    pass


class TooLarge(KindredError):
    pass


class Unauthenticated(KindredError):
    """Nobody knows whose request this is."""


class Forbidden(KindredError):
    """It is known whose request this is, and it may not do that."""


@dataclass
class TooMany(KindredError):
    """A limit that time lifts again: after `retry_after_s` seconds, as far as can be told."""

    retry_after_s: int = 1


class StorageFull(KindredError):
    pass


def not_found(noun: str, identity: object) -> NotFound:
    return NotFound(f"There is no {noun} {identity}.", code=f"{noun}-not-found")
