"""Numbers that must be finite are refused by public classes that are no pieces (those: check_refuses_numbers_...)."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from lit_methods.optim import MDPO
from lit_methods.vi import PVRNN, MarkovFBM
from tests.contract.pieces import kind_of, public_objects, real_arguments

REQUIRED: dict[str, dict[str, Any]] = {
    "Autoguidance": {"weak": None},
    "Ball": {"radius": 1.0},
    "ClassifierGuidance": {"log_prob": None},
    "Denoiser": {"net": nn.Identity()},
    "DiT": {"model": nn.Identity()},
    "EASE": {"histories": None, "num_items": 2},
    "EnsembleJudge": {"judges": [print, print]},
    "HTTPJudge": {"url": "http://localhost"},
    "Labels": {"num_classes": 2},
    "ErrorRegression": {"network": PVRNN(1)},
    "FractionalSDE": {"drift": nn.Identity(), "diffusion": 1.0, "control": None, "noise": MarkovFBM(), "state_dim": 1},
    "LossGuidance": {"loss": None},
    "MDPOStepSize": {"optimizer": MDPO([nn.Parameter(torch.ones(1))]), "schedule": "constant"},
    "PVRNN": {"output_size": 1},
    "PointDiscriminator": {"dim": 1},
    "RatioNormalizer": {"t_min": 0.0, "t_max": 1.0},
    "RegressionModel": {"num_features": 2, "num_data": 3},
    "RewardModelJudge": {"model": "of no matter"},
    "ScoreJudge": {"score": lambda prompt, text: 0.0},
    "SinkhornNewton": {"eta": 1.0},
    "SoftmaxCode": {"low": 0.0, "high": 1.0},
    "StaticRegret": {"loss": "logistic", "dim": 2},
    "Sequences": {"length": 2, "features": 3},
    "UNet2D": {"model": nn.Identity()},
    "UNet2DCondition": {"model": nn.Identity()},
    "Vectors": {"features": 2},
    "WeightGuide": {"num_features": 2},
}
MAY_BE_INFINITE = {
    ("Box", "low"),
    ("Box", "high"),
    ("RatioNormalizer", "clip"),
    ("StaticRegret", "radius"),
}
NOT_NUMBERS = {("FunctionJudge", "function"), ("ScoreJudge", "score")}  # functions that return one
CLASSES = [
    obj
    for path, obj in public_objects().items()
    if inspect.isclass(obj) and kind_of(obj) == "other" and not inspect.isabstract(obj)
    if path != "lit_methods.optim.FisherInverse"  # built by from_gradients, whose unit test it is
    if path != "lit_methods.games.SmallGainCertificate"  # a result
    if path != "lit_methods.vi.HurstFit"  # a result
    if path != "lit_methods.llm.VLLMSampler"  # vLLM checks its own arguments
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_numbers_that_are_not_finite_are_refused(kind: type) -> None:
    for name, many in real_arguments(kind).items():
        if (kind.__name__, name) in NOT_NUMBERS:
            continue
        for bad in (math.inf, -math.inf, math.nan):
            if math.isinf(bad) and (kind.__name__, name) in MAY_BE_INFINITE:
                continue
            with pytest.raises(ValueError, match=name):
                kind(**{**REQUIRED.get(kind.__name__, {}), name: [bad, 0.5] if many else bad})
