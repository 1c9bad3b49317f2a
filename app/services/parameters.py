"""What a run can be asked to do.

The lists are those of `models/config.py`, which the service must not import; a test holds the two together.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError

from app import storage
from app.errors import Invalid

MAX_SEED = 2**31 - 1
MIN_CLUSTERS, MAX_CLUSTERS = 2, 4096
# A name of one file, and none that is hidden.
_FILE_NAME = r"^[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$"

Method = Literal["scl", "kmeans", "kmeans_pixels", "temi", "scan", "simclr", "cc", "pica"]
Train = Literal["head", "finetune", "full"]
# The ways to train that a method knows; the first is the usual one.
TRAIN_OF_METHOD: Mapping[str, tuple[Train, ...]] = MappingProxyType(
    {
        "scl": ("head", "finetune", "full"),
        "kmeans": ("head",),
        "kmeans_pixels": ("head",),
        "temi": ("head",),
        "scan": ("head",),
        "simclr": ("full",),
        "cc": ("full",),
        "pica": ("full",),
    }
)
BACKBONES = ("efficientnet_lite0", "resnet10_slim", "resnet18", "resnet34")
PRETRAINED = ("efficientnet_lite0",)


def _or_else(message: str) -> WrapValidator:
    """One message in plain words instead of the library's own."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise _wrong(message) from None

    return WrapValidator(validate)


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{message}", {"message": message})


class Parameters(BaseModel):
    """What a run is asked to do. What it left open is resolved when the run is created or starts."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    clusters: Annotated[
        Annotated[int, Field(ge=MIN_CLUSTERS, le=MAX_CLUSTERS)] | Literal["auto"],
        _or_else(f"must be a whole number from {MIN_CLUSTERS} to {MAX_CLUSTERS}, or auto"),
        Field(description="How many groups to form; `auto`: as many as the images show.", examples=[10, "auto"]),
    ]
    method: Annotated[
        Method,
        Field(
            description="`scl`, semantic contrastive clustering, or what it is measured against: `kmeans`, "
            "`kmeans_pixels`, `temi` and `scan` on a frozen backbone, `simclr`, `cc` and `pica` with a training one."
        ),
    ] = "scl"
    train: Annotated[
        Train | None,
        Field(
            description="`head`: the backbone is frozen and a clustering head is trained. `finetune`: then the "
            "backbone learns what it found, and a new head answers. `full`: the backbone trains from the start. "
            "Unset: the method's usual way."
        ),
    ] = None
    backbone: Annotated[
        str,
        Field(
            max_length=100,
            pattern=rf"^({'|'.join(BACKBONES)}|timm/[A-Za-z0-9_.]+)$",
            description=f"The network that turns images into features: {', '.join(f'`{name}`' for name in BACKBONES)}, "
            "or `timm/NAME` for an architecture of timm.",
        ),
        _or_else(f"must be one of {', '.join(BACKBONES)}, or timm/NAME"),
    ] = "efficientnet_lite0"
    weights: Annotated[
        str | None,
        Field(
            max_length=255,
            pattern=_FILE_NAME,
            description="What the backbone starts from. Unset: the weights that come with it; `random`: none, to train "
            "in full from nothing; else the name of a file in the service's weights folder.",
        ),
        _or_else("must be random, or the name of a file in the service's weights folder, without any folder"),
    ] = None
    image_size: Annotated[
        int, Field(ge=32, le=1024, description="Side of the square that the backbone sees, in pixels.")
    ] = 224
    epochs: Annotated[
        int | None, Field(ge=1, le=10_000, description="Passes over the images; unset: the method's default.")
    ] = None
    restarts: Annotated[
        int | None,
        Field(ge=1, le=64, description="Independent starts; the best third of them, four at least, answers together."),
    ] = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="The same seed gives the same labels.")] = 0
    truth: Annotated[
        Literal["folder"] | None,
        Field(description="`folder`: folder names are true labels, used only to report ACC, NMI and ARI."),
    ] = None

    @field_validator("train")
    @classmethod
    def _known_to_the_method(cls, train: Train | None, so_far: Info) -> Train | None:
        ways = TRAIN_OF_METHOD.get(so_far.data.get("method", ""))
        if ways is None:  # the method is wrong, which is said already
            return train
        if train is None:
            return ways[0]
        if train not in ways:
            raise _wrong(f"method {so_far.data['method']} trains {' or '.join(ways)} only")
        return train

    @field_validator("weights")
    @classmethod
    def _fit_for_the_training(cls, weights: str | None, so_far: Info) -> str | None:
        if weights == "random" and so_far.data.get("train") in ("head", "finetune"):
            raise _wrong(
                f"to train {so_far.data['train']} takes a pretrained backbone; with random weights, train full"
            )
        if weights == "random" and so_far.data.get("clusters") == "auto":
            raise _wrong("how many clusters there are is found on pretrained features; with random weights, say it")
        backbone = so_far.data.get("backbone", PRETRAINED[0])
        if weights is None and backbone not in PRETRAINED:
            raise _wrong(f"backbone {backbone} comes without weights: name a weights file, or random to train in full")
        return weights


def check_weights(weights: str | None) -> None:
    """Raise `Invalid` when a run names a weights file that the service does not have."""
    if weights in (None, "random"):
        return
    there = storage.weights_files()
    if weights not in there:
        known = ", ".join(there[:20]) if there else "the service's weights folder holds no files"
        raise Invalid(
            f"There is no weights file {weights!r} in the service's weights folder.",
            code="weights-not-found",
            fields={"weights": f"one of: {known}" if there else known},
        )


def least_images(clusters: int | Literal["auto"]) -> int:
    """The fewest images that can be grouped so."""
    return MIN_CLUSTERS if clusters == "auto" else clusters
