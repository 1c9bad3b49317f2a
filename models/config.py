"""What to do with a collection, checked when it is said."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

BACKBONES = ("efficientnet_lite0",)


class InputError(ValueError):
    """A bad setting or a collection that cannot be grouped; the message is for the user."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a method does where the user says nothing."""

    epochs: int
    restarts: int


METHODS = {
    "scl": Defaults(epochs=30, restarts=6),
    "kmeans": Defaults(epochs=300, restarts=10),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to do with a collection.

    Raises:
        InputError: a value is outside its limits.

    """

    clusters: int
    method: str = "scl"
    train: str = "head"
    backbone: str = "efficientnet_lite0"
    image_size: int = 224
    epochs: int | None = None
    seed: int = 0
    restarts: int | None = None

    def __post_init__(self) -> None:
        check_range("clusters", self.clusters, 2, 4096)
        check_range("image_size", self.image_size, 32, 1024)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("epochs", self.epochs, 1, 10_000)
        check_range("restarts", self.restarts, 1, 100)
        check_choice("method", self.method, tuple(METHODS))
        check_choice("train", self.train, ("head",))
        check_choice("backbone", self.backbone, BACKBONES)

    def resolved(self) -> "Config":
        """The same with the method's defaults filled in."""
        defaults = METHODS[self.method]
        epochs = defaults.epochs if self.epochs is None else self.epochs
        restarts = defaults.restarts if self.restarts is None else self.restarts
        return replace(self, epochs=epochs, restarts=restarts)


def check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is None and name in ("epochs", "restarts"):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if not least <= value <= most:
        raise InputError(f"{name} is {value}; it must be from {least} to {most}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of: {', '.join(choices)}")
