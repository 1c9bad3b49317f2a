import hashlib
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from models import backbones, features, networks
from models.config import BACKBONES, InputError
from tests.models.conftest import finish

TIMM = ("timm/test_resnet", "timm/test_vit", "timm/test_efficientnet")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A torchvision ResNet-18 with random statistics, and its file with the classifier in it."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("name", [*BACKBONES, *TIMM, "timm/mobilenetv3_small_050"])
def test_features_are_as_many_as_said(name):
    network = networks.network(name, weights="random", image_size=32).eval()
    h_BF = network(torch.zeros(2, 3, 32, 32))
    assert h_BF.shape == (2, network.feature_size)
    assert network.feature_size == networks.feature_size(name, image_size=32)


def test_a_torchvision_file_gives_torchvisions_features(resnet18):
    model, path = resnet18
    network = networks.network("resnet18", weights=str(path), image_size=96).eval()
    x_BCHW = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.fc, classifier = torch.nn.Identity(), model.fc
        expected = model(x_BCHW)
        model.fc = classifier
        torch.testing.assert_close(network(x_BCHW), expected)
    assert network.mean == (0.485, 0.456, 0.406)


def test_small_images_get_a_small_stem_unless_the_weights_bring_a_large_one(resnet18):
    assert networks.network("resnet18", weights="random", image_size=64).body.conv1.kernel_size == (3, 3)
    assert networks.network("resnet18", weights="random", image_size=65).body.conv1.kernel_size == (7, 7)
    assert networks.network("resnet18", weights=str(resnet18[1]), image_size=32).body.conv1.kernel_size == (7, 7)


def test_no_resnet_pools_small_images_away():
    maps = []
    network = networks.network("resnet34", weights="random", image_size=32).eval()
    network.body.layer4.register_forward_hook(lambda _layer, _inputs, output: maps.append(output.shape))
    network(torch.zeros(1, 3, 32, 32))
    assert maps == [(1, 512, 4, 4)]


@pytest.mark.parametrize("nested", ["state_dict", "model", None])
def test_what_training_scripts_save_is_understood(resnet18, tmp_path, nested):
    weights = {f"module.{name}": value for name, value in resnet18[0].state_dict().items()}
    path = tmp_path / "saved.pt"
    torch.save({nested: weights, "epoch": 3} if nested else weights, path)
    network = networks.network("resnet18", weights=str(path), image_size=96)
    assert torch.equal(network.body.layer4[1].conv2.weight, resnet18[0].layer4[1].conv2.weight)


def test_a_safetensors_file_is_understood(resnet18, tmp_path):
    path = tmp_path / "saved.safetensors"
    safetensors.torch.save_file(resnet18[0].state_dict(), path)
    network = networks.network("resnet18", weights=str(path), image_size=96)
    assert torch.equal(network.body.conv1.weight, resnet18[0].conv1.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", TIMM)
def test_a_timm_file_gives_timms_features(tmp_path, name, suffix):
    torch.manual_seed(0)
    short = name.removeprefix("timm/")
    settings = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(short, pretrained=False, **settings).eval()
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(model.state_dict(), path)
    network = networks.network(name, weights=str(path), image_size=64).eval()
    x_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(x_BCHW), pre_logits=True)
        torch.testing.assert_close(network(x_BCHW), expected)


def test_a_transformers_positions_are_stretched_to_the_image_size(tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)  # for 160 pixels
    network = networks.network("timm/test_vit", weights=str(path), image_size=64)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, network.feature_size)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            "resnet34",
            r"saved\.pth is of another architecture than 'resnet34': layer1\.2\.conv1\.weight is missing, and",
        ),
        ("efficientnet_lite0", r"another architecture than 'efficientnet_lite0': _conv_stem\.weight is missing, and"),
        ("timm/test_resnet", r"another architecture than 'timm/test_resnet': conv1\.weight has shape|is missing"),
    ],
)
def test_weights_of_another_architecture_are_one_clear_line(resnet18, tmp_path, backbone, message):
    path = tmp_path / "saved.pth"
    torch.save(resnet18[0].state_dict(), path)
    with pytest.raises(InputError, match=message) as caught:
        networks.network(backbone, weights=str(path), image_size=96)
    assert "\n" not in str(caught.value)


def test_a_deeper_network_that_contains_the_asked_one_is_another_architecture(tmp_path):
    path = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(InputError, match=r"layer1\.2\.conv1\.weight is not in the network"):
        networks.network("resnet18", weights=str(path), image_size=96)


def test_another_width_is_named_by_its_shape(resnet18, tmp_path):
    weights = dict(resnet18[0].state_dict())
    weights["layer2.0.conv1.weight"] = torch.zeros(256, 64, 3, 3)
    torch.save(weights, tmp_path / "wide.pth")
    message = r"layer2\.0\.conv1\.weight has shape \(256, 64, 3, 3\) for \(128, 64, 3, 3\)$"
    with pytest.raises(InputError, match=message):
        networks.network("resnet18", weights=str(tmp_path / "wide.pth"), image_size=96)


class Hostile:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.pth", b"no tensors here at all"),
        ("empty.pth", b""),
        ("noise.safetensors", b"no tensors here at all"),
        ("empty.safetensors", b""),
        ("hostile.pth", pickle.dumps(Hostile())),
        ("numbers.pth", None),
    ],
)
def test_what_is_no_file_of_tensors_is_one_clear_line(tmp_path, capsys, name, content):
    path = tmp_path / name
    if content is None:
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"weights file {name} is no file of tensors") as caught:
        networks.network("resnet18", weights=str(path), image_size=32)
    assert "\n" not in str(caught.value)
    assert "code of the file" not in capsys.readouterr().out


def test_a_cut_file_is_no_file_of_tensors(resnet18, tmp_path):
    for suffix, content in (
        (".pth", resnet18[1].read_bytes()),
        (".safetensors", safetensors.torch.save(resnet18[0].state_dict())),
    ):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="is no file of tensors"):
            networks.network("resnet18", weights=str(path), image_size=96)


def test_an_unknown_timm_name_comes_with_near_ones():
    with pytest.raises(InputError, match=r"backbone 'timm/resnet_18' is unknown to timm; did you mean resnet18"):
        networks.network("timm/resnet_18", weights="random", image_size=32)


def test_an_unknown_timm_tag_and_an_impossible_size_are_one_line():
    with pytest.raises(InputError, match=r"'timm/resnet18\.nonsense' cannot be built .*Invalid pretrained tag"):
        networks.network("timm/resnet18.nonsense", weights="random", image_size=32)


def test_missing_weights_are_said():
    with pytest.raises(InputError, match="comes without weights"):
        networks.network("resnet18", weights=None, image_size=32)
    with pytest.raises(InputError, match="there is no such file"):
        networks.network("resnet18", weights="/no/such/file", image_size=32)


def test_the_digest_is_that_of_the_file(resnet18, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(resnet18[1].read_bytes())
    assert networks.digest("resnet18", str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"other bytes")
    assert networks.digest("resnet18", str(path)) == hashlib.sha256(b"other bytes").hexdigest()
    assert networks.digest("resnet18", "random") == "random"


@pytest.mark.parametrize("name", ["resnet18", "timm/test_vit"])
def test_features_are_extracted_with_a_weights_file(sources, tmp_path, name):
    caches = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = networks.network(name, weights="random", image_size=96)
        path = tmp_path / f"{seed}.safetensors"
        safetensors.torch.save_file(made.body.state_dict(), path)
        options = {"image_size": 96, "threads": 1, "device": "cpu", "cache_dir": tmp_path / "cache"}
        found = finish(features.extract(sources[:3], backbone=name, weights=str(path), **options))[1]
        pixels_BHWC = np.stack([features.images.decode(source.path, 96) for source in sources[:3]])
        x_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 255
        x_BCHW = (x_BCHW - torch.tensor(made.mean)[:, None, None]) / torch.tensor(made.std)[:, None, None]
        with torch.inference_mode():
            expected = made.eval()(x_BCHW).numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
        caches.append(found)
    assert not np.allclose(*caches)


def test_encoder_names_bad_weights(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        backbones.encoder("resnet18", weights=str(tmp_path / "no"), image_size=32, threads=1, device="cpu")


def test_the_generalised_mean_favours_what_stands_out():
    even, peak, nothing = torch.full((7, 7), 2.0), torch.zeros(7, 7), torch.zeros(7, 7)
    peak[3, 3] = 2.0 * 49  # the same mean
    maps_BFHW = torch.stack([even, peak, nothing])[None].requires_grad_()
    pooled_BF = networks.generalised_mean(maps_BFHW)
    assert pooled_BF[0].tolist() == pytest.approx([2.0, 2.0 * 49 ** (2 / 3), 0.0], abs=1e-3)
    pooled_BF.sum().backward()
    assert maps_BFHW.grad.isfinite().all()
    halved_BF = networks.generalised_mean(maps_BFHW.detach().bfloat16())
    assert halved_BF.dtype == torch.float32


def test_only_the_last_layers_are_left_to_train():
    net = networks.network("efficientnet_lite0", weights=None, image_size=64)
    networks.freeze(net, trained_share=1 / 3)
    last = r"body\.layers\.(_blocks\.1[1-5]\.|_conv_head|_bn1)"
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == bool(re.match(last, name)), name
