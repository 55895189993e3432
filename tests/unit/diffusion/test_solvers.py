import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_methods.diffusion import (
    DDIM,
    EDM,
    Churn,
    Denoiser,
    DPMSolverPP,
    Euler,
    FlowMatching,
    Heun,
    Solver,
    TrigFlow,
    VPLinear,
    sample,
)
from lit_methods.diffusion.processes import as_process
from lit_methods.diffusion.solvers import SOLVERS, as_solver
from tests.unit.diffusion.closed_forms import MEAN, POINTS, PROCESSES, STD, gaussian_denoiser, gaussian_flow_map

ODE_SOLVERS = ["euler", "heun", "ddim", "dpmpp_2m"]


def on_lambda_grid(steps: int) -> Tensor:
    process = TrigFlow()
    return process.t_from_lam(torch.linspace(*(float(process.lam(t)) for t in (0.9, 0.05)), steps + 1).double())


@pytest.mark.parametrize(
    ("solver", "order", "last"),
    [
        (Euler(), 1, 0.0095),
        (DDIM(), 1, 0.0185),
        (DPMSolverPP(order=1), 1, 0.0185),
        (DPMSolverPP(), 2, 2.6e-4),
        (Heun(), 2, 1.3e-4),
        (Heun("edm"), 2, 4e-4),
    ],
)
def test_order_of_convergence(solver: Solver, order: int, last: float) -> None:
    denoiser = gaussian_denoiser("trigflow")
    exact = gaussian_flow_map(denoiser.process, POINTS, 0.9, 0.05)
    errors = [
        float((sample(denoiser, x_init=POINTS, solver=solver, times=on_lambda_grid(n)) - exact).abs().max())
        for n in (8, 16, 32, 64)
    ]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(slopes) >= (0.9 if order == 1 else 1.8), (errors, slopes)
    assert errors[-1] <= last


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_end_points_of_gaussian_data(name: str, solver: str) -> None:
    denoiser = gaussian_denoiser(name)
    process = denoiser.process
    x = POINTS * process.prior_std
    exact = gaussian_flow_map(process, x, process.t_max, process.t_clean)
    error = (sample(denoiser, x_init=x, solver=solver, steps=400, grid="karras") - exact).abs().max()
    assert float(error) < (0.11 if solver in ("euler", "ddim") else 2e-3)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_number_of_steps_is_finite_and_ends_with_the_prediction(name: str, solver: str) -> None:
    denoiser = gaussian_denoiser(name)
    for steps in (1, 2, 3, 15):
        predicted: list[Tensor] = []
        generator = torch.Generator().manual_seed(0)
        x = sample(
            denoiser,
            [4, 2],
            solver=solver,
            steps=steps,
            generator=generator,
            dtype=torch.float64,
            on_step=lambda t, x, x0, seen=predicted: seen.append(x0),
        )
        assert bool(x.isfinite().all())
        torch.testing.assert_close(x, predicted[-1])
        assert len(predicted) == (2 * steps - 1 if solver in ("heun", "edm_churn") else steps) or (
            # Out of pure noise, a step in sigma / alpha takes one call.
            solver == "edm_churn" and len(predicted) == max(2 * steps - 2, 1)
        )


def test_ddim_is_dpm_solver_1_and_euler_in_the_coordinates_of_edm() -> None:
    denoiser = gaussian_denoiser("vp_linear")
    process = denoiser.process
    times = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    x = POINTS.clone()
    for t, r in zip(times.tolist(), times.tolist()[1:], strict=False):
        ratio_t, ratio_r = (float(process.sigma(s) / process.alpha(s)) for s in (t, r))
        scaled = x / process.alpha(t)
        x = process.alpha(r) * (scaled + (ratio_r - ratio_t) * denoiser.eps(x, t))
    for solver in (DDIM(), DPMSolverPP(order=1)):
        torch.testing.assert_close(sample(denoiser, x_init=POINTS, solver=solver, times=times), x, rtol=1e-10, atol=0)


def test_second_order_weights_the_difference_by_half_the_ratio_of_steps() -> None:
    answers = {math.e: 0.0, 1.0: 1.0}
    denoiser = Denoiser(lambda x, t: torch.full_like(x, answers[round(float(t[0]), 12)]), EDM(), "x0")
    answers = {round(t, 12): value for t, value in answers.items()}
    x = torch.full((1, 1), math.e, dtype=torch.float64)
    out = sample(denoiser, x_init=x, times=[math.e, 1.0, math.exp(-0.5)])
    assert float(out) == pytest.approx(1.098367, abs=1e-6)


@pytest.mark.parametrize("solver", ["ancestral", "sde_dpmpp", "sde_dpmpp_2m", "edm_churn", DDIM(eta=0.5)])
@pytest.mark.parametrize("name", ["vp_linear", "fm", "edm"])
def test_noisy_solvers_keep_mean_and_spread(solver: str | Solver, name: str) -> None:
    out = sample(
        gaussian_denoiser(name),
        [10_000, 2],
        solver=solver,
        steps=120,
        grid="karras",
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    torch.testing.assert_close(out.mean(0), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(out.std(0), STD, rtol=0.06, atol=0)


def test_data_far_from_zero_stays_where_it_is() -> None:
    mean = torch.tensor([5.0, 5.0], dtype=torch.float64)
    out = sample(
        gaussian_denoiser("fm", mean), [4000, 2], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    torch.testing.assert_close(out.mean(0), mean, rtol=0, atol=0.1)


def test_one_model_gives_the_same_samples_under_every_process() -> None:
    denoiser = gaussian_denoiser("fm")
    exact = gaussian_flow_map(denoiser.process, POINTS, 1.0, 0.0)
    for name in ("vp_cosine", "trigflow", "edm", "ve"):
        process = as_process(name)
        out = sample(denoiser, x_init=POINTS * process.prior_std, process=name, grid="karras", steps=200)
        torch.testing.assert_close(out, exact, rtol=0, atol=0.03)


def test_rescaled_models_agree_with_those_made_for_the_process() -> None:
    denoiser, own = gaussian_denoiser("fm").under("vp_linear"), gaussian_denoiser("vp_linear")
    for t in (0.05, 0.5, 0.95):
        torch.testing.assert_close(denoiser.x0(POINTS, t), own.x0(POINTS, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(denoiser.flow(POINTS, t), own.flow(POINTS, t), rtol=1e-9, atol=1e-9)


def test_agrees_with_diffusers_on_the_same_grid() -> None:
    diffusers = pytest.importorskip("diffusers")
    denoiser = gaussian_denoiser("edm", torch.tensor([0.3]).double(), torch.tensor([0.5]).double())
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(6, 1) * 80
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    expected = x.clone()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x0 = denoiser.x0(expected, float(sigma))
        expected = scheduler.step(expected, t, expected, pred_original_sample=x0).prev_sample
    out = sample(denoiser, x_init=x, solver="euler", times=scheduler.sigmas.double())
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=1e-5, atol=1e-5)

    shifted = [1.0, 0.9, 0.75, 0.5]
    fm = gaussian_denoiser("fm", torch.tensor([0.3]).double(), torch.tensor([0.5]).double())
    for solver, scheduler in (
        ("euler", diffusers.FlowMatchEulerDiscreteScheduler()),
        (
            "dpmpp_2m",
            diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True,
                prediction_type="flow_prediction",
                final_sigmas_type="zero",
                lower_order_final=False,
                euler_at_final=True,
            ),
        ),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if solver == "euler":
                scheduler.set_timesteps(sigmas=shifted)
            else:
                scheduler.set_timesteps(4)
        grid = scheduler.sigmas.double()
        expected = (x / 80).float()
        for t, sigma in zip(scheduler.timesteps, grid, strict=False):
            flow = fm.flow(expected.double(), float(sigma)).float()
            expected = scheduler.step(flow, t, expected).prev_sample
        out = sample(fm, x_init=x / 80, solver=solver, times=grid)
        torch.testing.assert_close(out.float(), expected, rtol=2e-5, atol=2e-5)


def test_churn_zero_is_heun() -> None:
    denoiser = gaussian_denoiser("edm")
    x = POINTS * 80
    torch.testing.assert_close(
        sample(denoiser, x_init=x, solver=Churn(churn=0.0)), sample(denoiser, x_init=x, solver=Heun("edm"))
    )


def test_coefficients_are_computed_in_float64() -> None:
    seen: list[float] = []
    denoiser = Denoiser(lambda x, t: seen.append(float(t[0])) or x, FlowMatching(), "flow")
    sample(denoiser, [1, 2], steps=3, solver="euler")
    assert seen == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert VPLinear().at(0.5).alpha.dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DDIM(eta=-1.0), "eta must be >= 0, got -1.0"),
        (lambda: DPMSolverPP(order=3), "order must be 1 or 2, got 3"),
        (lambda: DPMSolverPP(eta=-0.1), "eta must be"),
        (lambda: Heun("lambda"), "coordinates must be"),
        (lambda: Churn(churn=-1.0), "churn must be"),
        (lambda: Churn(s_min=1.0, s_max=0.5), "s_min and s_max must be"),
        (lambda: Churn(s_noise=0.0), "s_noise must be"),
        (lambda: as_solver("dpm++"), "solver must be one of"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
