import itertools
import math

import pytest
import torch

from lit_methods.diffusion import FlowMatching, VPLinear, convert
from lit_methods.diffusion.predictions import PREDICTIONS, combine, point_at
from lit_methods.diffusion.processes import as_process
from tests.unit.diffusion.closed_forms import POINTS, PROCESSES, gaussian_denoiser

X0 = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PROCESSES)
def test_every_pair_agrees_with_the_targets(name: str) -> None:
    process = as_process(name)
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64) * process.t_max
    x = process.add_noise(X0, EPS, t)
    targets = {kind: combine(X0, EPS, kind, point_at(process, t, X0), 0.7) for kind in PREDICTIONS}
    for src, dst in itertools.product(PREDICTIONS, PREDICTIONS):
        got = convert(targets[src], x, t, src, dst, process, sigma_data=0.7)
        torch.testing.assert_close(got, targets[dst], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PROCESSES)
def test_targets_are_those_of_the_literature(name: str) -> None:
    process = as_process(name)
    t = torch.tensor(0.4, dtype=torch.float64) * process.t_max
    alpha, sigma, d_alpha, d_sigma = process.at(t)
    x, sd = alpha * X0 + sigma * EPS, 0.7
    ratio = sigma / alpha
    skip, out = sd**2 / (ratio**2 + sd**2), ratio * sd / (ratio**2 + sd**2).sqrt()
    expected = {
        "x0": X0,
        "epsilon": EPS,
        "score": -EPS / sigma,
        "flow": d_alpha * X0 + d_sigma * EPS,
        "v_prediction": alpha * EPS - sigma * X0,
        "edm": (X0 - skip * x / alpha) / out,
    }
    for kind, value in expected.items():
        torch.testing.assert_close(convert(X0, x, t, "x0", kind, process, sd), value, rtol=1e-9, atol=1e-9)


def test_flow_of_flow_matching_is_noise_minus_data() -> None:
    t = torch.full((5,), 0.3, dtype=torch.float64)
    x = FlowMatching().add_noise(X0, EPS, t)
    torch.testing.assert_close(convert(X0, x, t, "x0", "flow", FlowMatching()), EPS - X0)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_flow_is_drift_minus_half_the_score(name: str) -> None:
    denoiser = gaussian_denoiser(name)
    process = denoiser.process
    t = 0.4 * process.t_max
    flow, score = denoiser.flow(POINTS, t), denoiser.score(POINTS, t)
    torch.testing.assert_close(flow, process.f(t) * POINTS - 0.5 * process.g2(t) * score)


def test_pure_noise_and_clean_data_stay_finite_where_they_are_determined() -> None:
    process = FlowMatching()
    noisiest = torch.ones(5, dtype=torch.float64)
    for kind in ("flow", "v_prediction", "edm"):
        target = combine(X0, EPS, kind, point_at(process, noisiest, X0))
        torch.testing.assert_close(convert(target, EPS, noisiest, kind, "x0", process), X0)
    cleanest = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(convert(EPS - X0, X0, cleanest, "flow", "epsilon", process), EPS)


def test_numbers_and_tensors_give_the_same_coefficients() -> None:
    process = VPLinear()
    as_number = convert(X0, EPS, 0.4, "v_prediction", "score", process)
    as_tensor = convert(X0, EPS, torch.full((5,), 0.4, dtype=torch.float64), "v_prediction", "score", process)
    torch.testing.assert_close(as_number, as_tensor, rtol=1e-14, atol=0)


def test_bfloat16_outputs_are_converted_in_float32() -> None:
    out = convert(X0.bfloat16(), EPS.float(), torch.full((5,), 0.5), "flow", "x0", FlowMatching())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, EPS.float() - 0.5 * X0.bfloat16().float())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"src must be one of \['x0', .*\], got 'noise'"):
        convert(X0, X0, 0.5, "noise", "x0", FlowMatching())
    with pytest.raises(ValueError, match=r"a prediction must have the shape of x, \(5, 2, 3\), got \(5, 2\)"):
        convert(X0[:, :, 0], X0, 0.5, "flow", "x0", FlowMatching())
    assert math.isfinite(float(convert(X0, X0, 0.0, "x0", "x0", FlowMatching()).sum()))
