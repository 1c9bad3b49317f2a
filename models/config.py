"""What to do with a collection, checked when it is said."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

# `timm/NAME` with a local weights file joins them.
BACKBONES = ("efficientnet_lite0", "resnet10_slim", "resnet18", "resnet34")
# Those whose pretrained weights come with a package.
PRETRAINED = ("efficientnet_lite0",)


class InputError(ValueError):
    """A bad setting or a collection that cannot be grouped; the message is for the user."""


class BackboneError(InputError):
    """A backbone that is unknown, or weights that are missing or do not fit it."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a method does where the user says nothing."""

    epochs: int
    restarts: int


# Method by method, the ways to train that it knows: `head` on frozen features, `finetune` that and then the backbone on
# what it found, `full` the backbone from the start.
METHODS: Mapping[str, Mapping[str, Defaults]] = MappingProxyType(
    {
        "scl": {
            "head": Defaults(epochs=8, restarts=24),
            "finetune": Defaults(epochs=1, restarts=24),
            "full": Defaults(epochs=100, restarts=24),
        },
        "kmeans": {"head": Defaults(epochs=300, restarts=10)},
        "kmeans_pixels": {"head": Defaults(epochs=300, restarts=10)},
        "temi": {"head": Defaults(epochs=40, restarts=16)},
        "scan": {"head": Defaults(epochs=40, restarts=10)},
        "simclr": {"full": Defaults(epochs=100, restarts=10)},
        "cc": {"full": Defaults(epochs=100, restarts=1)},
        "pica": {"full": Defaults(epochs=100, restarts=1)},
    }
)

# What a user may ask for in one word; single settings go before it.
PRESETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"fast": MappingProxyType({"image_size": 128, "restarts": 4})}
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to do with a collection.

    Raises:
        InputError: a value is outside its limits, or two values do not go together.

    """

    clusters: int | Literal["auto"]
    method: str = "scl"
    train: str = "head"
    backbone: str = "efficientnet_lite0"
    weights: str | None = None  # None: those that come with the backbone; "random"; else a file's path
    image_size: int = 224
    epochs: int | None = None
    seed: int = 0
    restarts: int | None = None

    def __post_init__(self) -> None:
        if self.clusters != "auto":
            check_range("clusters", self.clusters, 2, 4096)
        check_range("image_size", self.image_size, 32, 1024)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("epochs", self.epochs, 1, 10_000)
        check_range("restarts", self.restarts, 1, 100)
        check_choice("method", self.method, tuple(METHODS))
        check_choice("train", self.train, ("head", "finetune", "full"))
        if self.train not in METHODS[self.method]:
            raise InputError(
                f"method {self.method!r} does not train {self.train!r}; it trains: {', '.join(METHODS[self.method])}"
            )
        check_backbone(self.backbone, self.weights)
        if self.weights == "random" and self.train != "full":
            raise InputError(f"weights is 'random'; {self.train!r} needs a pretrained backbone, so train 'full'")

    @property
    def pretrained(self) -> bool:
        return self.weights != "random"

    def resolved(self) -> "Config":
        """The same with the method's defaults filled in."""
        defaults = METHODS[self.method][self.train]
        epochs = defaults.epochs if self.epochs is None else self.epochs
        restarts = defaults.restarts if self.restarts is None else self.restarts
        return replace(self, epochs=epochs, restarts=restarts)


def check_backbone(name: str, weights: str | None) -> None:
    if not re.fullmatch(r"timm/[A-Za-z0-9_.]+", name):
        check_choice("backbone", name, (*BACKBONES, "timm/NAME"))
    if weights is None and name not in PRETRAINED:
        raise BackboneError(
            f"backbone {name!r} comes without weights; name a weights file, or 'random' to train in full"
        )
    if weights not in (None, "random") and not Path(weights).is_file():
        raise BackboneError(f"weights is {weights!r}; there is no such file")


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
