"""Settings outside of their limits are refused by name, whichever method they belong to."""

import math
from typing import Any

import pytest

from models.baselines.cc import CcConfig
from models.baselines.pica import PicaConfig
from models.baselines.scan import ScanConfig
from models.baselines.simclr import SimclrConfig
from models.baselines.temi import TemiConfig
from models.full import FullConfig as EngineConfig
from models.heads import HeadConfig
from models.scl import FullConfig, SclConfig
from models.views import Augmentation

POSITIVE, NOT_NEGATIVE, SHARE, BELOW_ONE = "above 0", "at least 0", "from 0 to 1", "at least 0 and below 1"
OUTSIDE = {
    POSITIVE: (0, -1, math.nan),
    NOT_NEGATIVE: (-0.01, math.nan),
    SHARE: (-0.01, 1.01, math.nan),
    BELOW_ONE: (-0.01, 1.0, math.nan),
}
WITHIN = {POSITIVE: (1,), NOT_NEGATIVE: (0.0, 2.0), SHARE: (0.0, 1.0), BELOW_ONE: (0.0, 0.99)}
SETTINGS = [
    (SclConfig, "contrast_temperature", POSITIVE),
    (SclConfig, "contrast_weight", NOT_NEGATIVE),
    (SclConfig, "momentum", BELOW_ONE),
    (HeadConfig, "learning_rate", POSITIVE),
    (HeadConfig, "neighbours", POSITIVE),
    (HeadConfig, "shrinkage", SHARE),
    (FullConfig, "dimensions", POSITIVE),
    (FullConfig, "start", SHARE),
    (EngineConfig, "pretrained_learning_rate", POSITIVE),
    (EngineConfig, "weight_decay", NOT_NEGATIVE),
    (EngineConfig, "warmup", BELOW_ONE),
    (Augmentation, "gray", SHARE),
    (Augmentation, "saturation", SHARE),
    (CcConfig, "cluster_temperature", POSITIVE),
    (PicaConfig, "balance_weight", NOT_NEGATIVE),
    (ScanConfig, "entropy_weight", NOT_NEGATIVE),
    (ScanConfig, "label_epochs", POSITIVE),
    (ScanConfig, "threshold", BELOW_ONE),
    (SimclrConfig, "rounds", POSITIVE),
    (TemiConfig, "bottleneck", POSITIVE),
    (TemiConfig, "teacher_momentum", BELOW_ONE),
]


@pytest.mark.parametrize(("config", "name", "limits"), SETTINGS)
def test_a_setting_outside_of_its_limits_is_refused_by_name(config: Any, name: str, limits: str) -> None:
    for value in OUTSIDE[limits]:
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must be {limits}$"):
            config(**{name: value})
    for value in WITHIN[limits]:
        assert getattr(config(**{name: value}), name) == value
