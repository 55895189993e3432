import pytest
import torch

from lit_methods.diffusion import (
    P2,
    SNR,
    Denoiser,
    EDMWeight,
    FlowMatching,
    Likelihood,
    MinSNR,
    SigmoidWeight,
    Uniform,
    VPLinear,
    Weighting,
    denoising_loss,
)
from lit_methods.diffusion.predictions import PREDICTIONS, convert
from lit_methods.diffusion.processes import as_process
from lit_methods.diffusion.weightings import WEIGHTINGS, as_weighting
from tests.unit.diffusion.closed_forms import PROCESSES


def times_of_snr(snr: list[float]) -> torch.Tensor:
    return VPLinear().t_from_lam(0.5 * torch.tensor(snr, dtype=torch.float64).log())


def test_min_snr_in_every_space() -> None:
    t = times_of_snr([0.25, 1.0, 10.0, 100.0])
    expected = {
        "epsilon": [1, 1, 0.5, 0.05],
        "x0": [0.25, 1, 5, 5],
        "v_prediction": [0.2, 0.5, 5 / 11, 5 / 101],
    }
    for space, values in expected.items():
        weight = MinSNR().in_space(space, VPLinear(), t)
        torch.testing.assert_close(weight, torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_min_snr_of_pure_noise() -> None:
    t = torch.ones(1)
    for space, value in {"epsilon": 1.0, "x0": 0.0, "v_prediction": 0.0}.items():
        assert float(MinSNR().in_space(space, FlowMatching(), t)) == value


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_a_loss_is_the_same_in_every_space(name: str, weighting: str) -> None:
    process = as_process(name)
    t = torch.linspace(0.2, 0.9, 4, dtype=torch.float64) * process.t_max
    x, a, b = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    losses = []
    for space in PREDICTIONS:
        error = convert(a, x, t, "x0", space, process) - convert(b, x, t, "x0", space, process)
        losses.append(as_weighting(weighting).in_space(space, process, t) * error.square().sum(1))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-7, atol=0)


def test_a_noise_network_and_a_data_network_with_snr_have_one_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    process = VPLinear()
    x0, eps = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator).unbind()
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x = process.add_noise(x0, eps, t)
    guess = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    gradients = []
    for kind, weighting in (("epsilon", "uniform"), ("epsilon", "snr"), ("x0", "snr")):
        parameter = guess.clone().requires_grad_()
        out = convert(parameter, x, t, "x0", kind, process)
        denoising_loss(Denoiser(lambda x, t, out=out: out, process, kind), x0, eps, t, weighting).mean().backward()
        gradients.append(parameter.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_weights_of_the_literature() -> None:
    process, t = VPLinear(), torch.tensor([0.2, 0.6], dtype=torch.float64)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    sigma2 = 1 / snr
    torch.testing.assert_close(SNR().in_space("x0", process, t), snr)
    torch.testing.assert_close(EDMWeight().in_space("x0", process, t), (sigma2 + 0.25) / (sigma2 * 0.25))
    torch.testing.assert_close(Likelihood().in_space("score", process, t), process.g2(t))
    torch.testing.assert_close(SigmoidWeight(2.0).in_space("epsilon", process, t), torch.sigmoid(2 - snr.log()))
    torch.testing.assert_close(P2(k=2.0, gamma=0.5).in_space("epsilon", process, t), (2 + snr) ** -0.5)
    assert Uniform().in_space("flow", process, t).tolist() == [1, 1]
    point = process.at(t)
    torch.testing.assert_close(Uniform("x0").in_space("epsilon", process, t), (point.sigma / point.alpha) ** 2)


def test_bad_arguments() -> None:
    assert issubclass(MinSNR, Weighting)
    for build, message in (
        (lambda: MinSNR(0.0), "gamma must be > 0, got 0.0"),
        (lambda: P2(k=0.0), "k must be"),
        (lambda: P2(gamma=-1.0), "gamma must be"),
        (lambda: as_weighting("snr5"), "weighting must be one of"),
        (lambda: Uniform("noise"), "space must be one of"),
        (lambda: Uniform().in_space("noise", VPLinear(), torch.ones(1)), "prediction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
