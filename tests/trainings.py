"""A training of a whole network whose steps cost little on any processor: timm keeps this one for tests."""

WHOLE_NETWORK = {
    "method": "simclr", "backbone": "timm/test_resnet", "weights": "random", "image_size": 32, "restarts": 2,
}  # fmt: skip
