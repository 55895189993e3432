import math

import pytest
import torch

from lit_methods.diffusion import EDM, VE, FlowMatching, Process, SubVP, TrigFlow, VPCosine, VPLinear
from lit_methods.diffusion.processes import as_process, draw_noise, per_sample
from tests.unit.diffusion.closed_forms import PROCESSES


def inner_times(process: Process) -> torch.Tensor:
    low = max(process.t_min, 1e-3 * process.t_max)
    return torch.linspace(low, 0.98 * process.t_max, 23, dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_derivatives_are_those_of_alpha_and_sigma(name: str) -> None:
    process = as_process(name)
    t = inner_times(process).requires_grad_()
    (d_alpha,) = torch.autograd.grad((process.alpha(t) + 0 * t).sum(), t)
    (d_sigma,) = torch.autograd.grad(process.sigma(t).sum(), t)
    torch.testing.assert_close(process.d_alpha(t).detach(), d_alpha, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(process.d_sigma(t).detach(), d_sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_sde_is_that_of_lam(name: str) -> None:
    process = as_process(name)
    t = inner_times(process).requires_grad_()
    lam = process.lam(t)
    (d_lam,) = torch.autograd.grad(lam.sum(), t)
    torch.testing.assert_close(process.g2(t).detach(), (-2 * process.sigma(t) ** 2 * d_lam).detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(process.f(t).detach(), (process.d_alpha(t) / process.alpha(t)).detach())


@pytest.mark.parametrize("name", PROCESSES)
def test_t_from_lam_inverts(name: str) -> None:
    process = as_process(name)
    t = inner_times(process)
    torch.testing.assert_close(process.t_from_lam(process.lam(t)), t, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("process", "alpha", "sigma"),
    [
        (VPLinear(), math.exp(-0.25 * 0.09 * 19.9 - 0.015), None),
        (VPCosine(), math.cos(0.5 * math.pi * 0.308 / 1.008) / math.cos(0.5 * math.pi * 0.008 / 1.008), None),
        (SubVP(), math.exp(-0.25 * 0.09 * 19.9 - 0.015), 1 - math.exp(-0.5 * 0.09 * 19.9 - 0.03)),
        (VE(), 1.0, 0.01 * 5000**0.3),
        (EDM(), 1.0, 0.3),
        (FlowMatching(), 0.7, 0.3),
        (TrigFlow(2.0), math.cos(0.3), 2 * math.sin(0.3)),
    ],
)
def test_values(process: Process, alpha: float, sigma: float | None) -> None:
    assert float(process.alpha(0.3)) == pytest.approx(alpha, rel=1e-12)
    assert float(process.sigma(0.3)) == pytest.approx(sigma or math.sqrt(1 - alpha**2), rel=1e-12)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "sub_vp"])
def test_small_noise_does_not_cancel_in_float32(name: str) -> None:
    process = as_process(name)
    t = torch.tensor([1e-7, 1e-5, 1e-3])
    torch.testing.assert_close(process.sigma(t).double(), process.sigma(t.double()), rtol=1e-5, atol=0)


def test_times_in_bfloat16_are_computed_in_float32() -> None:
    t = torch.tensor([0.5], dtype=torch.bfloat16)
    assert VPLinear().sigma(t).dtype == torch.float32


@pytest.mark.parametrize("name", ["fm", "trigflow"])
def test_the_last_time_is_pure_noise(name: str) -> None:
    process = as_process(name)
    for dtype in (torch.float32, torch.float64):
        assert float(process.alpha(torch.tensor(process.t_max, dtype=dtype))) == 0


def test_a_time_belongs_to_a_row_and_never_to_a_column() -> None:
    t = torch.tensor([0.1, 0.2, 0.3, 0.9])
    noisy = FlowMatching().add_noise(torch.ones(4, 4), torch.zeros(4, 4), t)
    torch.testing.assert_close(noisy, (1 - t)[:, None].expand(4, 4))
    for shape in ((3, 3, 3), (2, 2, 2, 2)):
        t = torch.linspace(0.1, 0.9, shape[0])
        noisy = FlowMatching().add_noise(torch.ones(shape), torch.zeros(shape), t)
        assert all(bool((row == 1 - time).all()) for row, time in zip(noisy, t, strict=True))
    single = FlowMatching().add_noise(torch.ones(4, 4), torch.zeros(4, 4), torch.tensor(0.25))
    assert bool((single == 0.75).all())
    with pytest.raises(ValueError, match=r"t must have shape \(\) or \(4,\), .* got \(4, 1\)"):
        per_sample(torch.ones(4, 1), torch.ones(4, 4))


def test_times_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\] for FlowMatching.* got values from 0.5 to 1.5"):
        FlowMatching().add_noise(torch.ones(2), torch.ones(2), torch.tensor([0.5, 1.5]))


def test_prior_noise_has_the_process_scale_and_rows_have_their_own_generators() -> None:
    assert EDM().prior_std == 80
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    rows = draw_noise((3, 5), seeds)
    for i, row in enumerate(rows):
        assert torch.equal(row, draw_noise((1, 5), torch.Generator().manual_seed(i))[0])
    with pytest.raises(ValueError, match="generator must hold one generator for each of 4 samples, got 3"):
        draw_noise((4, 5), seeds)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VPLinear(beta_0=0.0), "beta_0 and beta_1 must be"),
        (lambda: SubVP(beta_1=0.05), "beta_0 and beta_1 must be"),
        (lambda: VPLinear(t_min=0.0), r"t_min must be in \(0, 1\), got 0.0"),
        (lambda: VPCosine(offset=-1.0), "offset must be"),
        (lambda: VPCosine(t_max=1.5), "t_max must be"),
        (lambda: VE(sigma_min=0.0), "sigma_min and sigma_max must be"),
        (lambda: EDM(sigma_max=0.001), "sigma_min and sigma_max must be"),
        (lambda: TrigFlow(0.0), "sigma_data must be > 0"),
        (lambda: as_process("ddpm"), r"process must be one of \['edm', 'fm', .*\] or a Process, got 'ddpm'"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
