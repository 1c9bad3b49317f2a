"""Backbones that turn pixels into features, in the fastest runtime of the machine.

On a CPU EfficientNet-Lite runs in ONNX Runtime: on two AVX-512 cores it gave 170-200 images/s where torch gave 23-29
(float32, channels last), 70-96 (bfloat16) and 113-138 (bfloat16, traced and frozen); the last two also lose
digits. Other backbones, and all on CUDA, run in torch. The ONNX graph is written node by node from the torch
modules, batch normalisation folded into the convolutions: torch's own exporter leaves the padding as graphs of
slices that ONNX Runtime cannot fold.
"""

from collections.abc import Callable
from threading import Lock, Semaphore
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from efficientnet_lite_pytorch import EfficientNet
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models import networks, views
from models.networks import EfficientNetLite, Network

# uint8 pixels of shape (B, size, size, 3) in, float32 features of shape (B, D) out; several threads may call it.
Encoder = Callable[[np.ndarray], np.ndarray]

# Batches of 224 pixels a side that ONNX Runtime has in work at once, or fewer of more pixels. Each has threads of its
# own, which do not wait for the others' after every layer, and takes memory: 0.3 GB for 32 images.
BATCHES_AT_ONCE = 4


def encoder(name: str, *, weights: str | None, image_size: int, threads: int, device: str) -> Encoder:
    """The backbone as a function from pixels to features; name and weights as in `networks.network`.

    Raises:
        BackboneError: an unknown name, or weights that do not fit it.

    """
    network = networks.network(name, weights=weights, image_size=image_size).eval()
    fast = fast_encoder(network, image_size=image_size, threads=threads, device=device)
    return fast or torch_encoder(network, device=device)


def fast_encoder(network: Network, *, image_size: int, threads: int, device: str) -> Encoder | None:
    """The network as it is now in a faster runtime than torch, where there is one for it."""
    if device != "cpu" or not isinstance(network.body, EfficientNetLite):
        return None
    return onnx_encoder(to_onnx(network.body.layers), image_size=image_size, threads=threads)


def torch_encoder(network: Network, *, device: str) -> Encoder:
    """In bfloat16 on CUDA; on a CPU in float32, which keeps the digits. One batch at a time."""
    network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    turn = Lock()

    @torch.inference_mode()
    def encode(pixels_BHWC: np.ndarray) -> np.ndarray:
        host = torch.from_numpy(pixels_BHWC)
        if device.startswith("cuda"):
            host = host.pin_memory()
        kind = device.split(":", maxsplit=1)[0]
        with turn, torch.autocast(kind, dtype=torch.bfloat16, enabled=device != "cpu"):
            x_BCHW = views.plain(host.to(device, non_blocking=True), mean=network.mean, std=network.std)
            features_BD: np.ndarray = network(x_BCHW).float().cpu().numpy()
        return features_BD

    return encode


def onnx_encoder(graph: onnx.ModelProto, *, image_size: int, threads: int) -> Encoder:
    at_once = max(1, min(BATCHES_AT_ONCE, int(BATCHES_AT_ONCE * (224 / image_size) ** 2)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads // at_once)
    options.inter_op_num_threads = 1
    # Its threads otherwise spin between batches and take the cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    turn = Semaphore(at_once)

    def encode(pixels_BHWC: np.ndarray) -> np.ndarray:
        with turn:
            features_BD: np.ndarray = session.run(None, {"pixels": pixels_BHWC})[0]
        return features_BD

    return encode


def to_onnx(network: EfficientNet, *, power: int = networks.POWER) -> onnx.ModelProto:
    """EfficientNet-Lite up to the pooled features as an ONNX graph that reads `uint8` pixels, channels last."""
    graph = _Graph()
    x = graph.add("Cast", ["pixels"], to=TensorProto.FLOAT)
    x = graph.add("Transpose", [x], perm=[0, 3, 1, 2])
    x = graph.add("Mul", [x, graph.constant(np.float32(2 / 255))])
    x = graph.add("Sub", [x, graph.constant(np.float32(1))])
    x = graph.relu6(graph.convolution(x, network._conv_stem, network._bn0))  # noqa: SLF001  # the package names
    for block in network._blocks:  # noqa: SLF001  # its layers so
        x = graph.block(x, block)
    x = graph.relu6(graph.convolution(x, network._conv_head, network._bn1))  # noqa: SLF001
    powers = x
    for _ in range(power - 1):  # several times as fast as the operator for any power
        powers = graph.add("Mul", [powers, x])
    mean = graph.add(
        "Max", [graph.add("GlobalAveragePool", [powers]), graph.constant(np.float32(networks.POOLED_FLOOR))]
    )
    root = graph.add("Pow", [mean, graph.constant(np.float32(1 / power))])
    graph.add("Flatten", [root], output="features")
    return graph.model()


class _Graph:
    """Nodes and weights of an ONNX graph in the making; every method returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], *, output: str | None = None, **attributes: Any) -> str:
        output = output or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, value: np.ndarray | np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def convolution(self, x: str, layer: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a batch normalisation without running statistics cannot be folded")
        weight, bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # TensorFlow's "same" padding is uneven for strides of two: a layer of its own in torch.
        left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
        return self.add(
            "Conv",
            [x, self.constant(weight.detach().numpy()), self.constant(bias.detach().numpy())],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            group=layer.groups,
            pads=[top, left, bottom, right],
        )

    def relu6(self, x: str) -> str:
        return self.add("Clip", [x, self.constant(np.float32(0)), self.constant(np.float32(6))])

    def block(self, x: str, block: Any) -> str:
        """Expand, filter each channel, project; the input is added where the shapes agree (MobileNet v2)."""
        settings = block._block_args  # noqa: SLF001  # as above
        y = x
        if settings.expand_ratio != 1:
            y = self.relu6(self.convolution(y, block._expand_conv, block._bn0))  # noqa: SLF001
        y = self.relu6(self.convolution(y, block._depthwise_conv, block._bn1))  # noqa: SLF001
        y = self.convolution(y, block._project_conv, block._bn2)  # noqa: SLF001
        if block.id_skip and settings.stride == 1 and settings.input_filters == settings.output_filters:
            y = self.add("Add", [y, x])
        return y

    def model(self) -> onnx.ModelProto:
        pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", "H", "W", 3])
        features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", "D"])
        graph = helper.make_graph(self.nodes, "backbone", [pixels], [features], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
