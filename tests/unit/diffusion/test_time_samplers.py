import pytest
import torch

from lit_methods.diffusion import (
    EDM,
    DiscreteTimes,
    FlowMatching,
    KarrasGrid,
    KarrasTimes,
    LambdaGrid,
    LogitNormal,
    LognormalSigma,
    ShiftedTimes,
    TimeSampler,
    UniformGrid,
    UniformLambda,
    UniformTimes,
)
from lit_methods.diffusion.grids import GRIDS, Grid, as_grid, check_path
from lit_methods.diffusion.processes import as_process
from lit_methods.diffusion.time_samplers import TIME_SAMPLERS, as_time_sampler
from tests.unit.diffusion.closed_forms import PROCESSES

U = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", TIME_SAMPLERS)
def test_times_lie_within_the_process(name: str, sampler: str) -> None:
    process = as_process(name)
    generator = torch.Generator().manual_seed(0)
    t = as_time_sampler(sampler).sample(1000, process, generator, stratified=True)
    assert t.shape == (1000,)
    assert process.t_min <= float(t.min()) <= float(t.max()) <= process.t_max * (1 + 1e-6)
    assert len(t.unique()) > 100


def test_quantiles() -> None:
    fm, normal = FlowMatching(), torch.special.ndtri(U)
    torch.testing.assert_close(UniformTimes().quantile(U, fm), U)
    torch.testing.assert_close(LogitNormal(0.5, 2.0).quantile(U, fm), torch.sigmoid(0.5 + 2 * normal))
    torch.testing.assert_close(LognormalSigma().quantile(U, EDM()), (-1.2 + 1.2 * normal).exp())
    torch.testing.assert_close(ShiftedTimes(3.0).quantile(U, fm), 3 * U / (1 + 2 * U))
    torch.testing.assert_close(UniformLambda().quantile(U, EDM()), 0.002 * 40000**U)
    assert DiscreteTimes(10).quantile(U, fm).tolist() == pytest.approx([0.2, 0.6, 1.0])


def test_karras_times_are_on_the_grid_of_karras() -> None:
    grid = KarrasGrid().noisy_times(EDM(), 1000).flip(0)
    drawn = KarrasTimes(1000, skip=0.002).quantile(torch.linspace(0.0001, 0.9999, 5000, dtype=torch.float64), EDM())
    torch.testing.assert_close(drawn.unique(), grid[2:999], rtol=1e-9, atol=0)


def test_a_stratified_batch_has_one_time_in_each_stratum() -> None:
    t = UniformTimes().sample(50, FlowMatching(), torch.Generator().manual_seed(0), stratified=True)
    assert sorted((t * 50).floor().tolist()) == list(range(50))
    assert t.tolist() != sorted(t.tolist())
    loose = UniformTimes().sample(50, FlowMatching(), torch.Generator().manual_seed(0))
    assert sorted((loose * 50).floor().tolist()) != list(range(50))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_pure_noise_to_the_data(name: str, grid: str) -> None:
    process = as_process(name)
    for steps in range(1, 16):
        times = as_grid(grid, process).times(process, steps)
        assert len(times) == steps + 1
        assert float(times[0]) == pytest.approx(process.t_max, rel=1e-12)
        assert float(process.sigma(times[-1])) == 0
        assert float(process.alpha(times[-1])) == pytest.approx(1)
        assert bool((times.diff() < 0).all())


def test_grids_of_the_literature() -> None:
    assert KarrasGrid().times(EDM(), 3).tolist() == pytest.approx([80.0, 2.515190, 0.002, 0.0], rel=1e-4)
    assert UniformGrid().times(FlowMatching(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert UniformGrid(3.0).times(FlowMatching(), 4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    lam = EDM().lam(LambdaGrid().noisy_times(EDM(), 5))
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(4))


def test_bad_arguments() -> None:
    assert issubclass(UniformTimes, TimeSampler)
    assert issubclass(KarrasGrid, Grid)
    for build, message in (
        (lambda: LogitNormal(std=0.0), "std must be"),
        (lambda: LognormalSigma(std=-1.0), "std must be"),
        (lambda: ShiftedTimes(0.0), "shift must be"),
        (lambda: KarrasTimes(1), "steps must be >= 2, got 1"),
        (lambda: KarrasTimes(rho=0.0), "rho must be"),
        (lambda: UniformTimes(low=0.5, high=0.5), "low and high must be 0 <= low < high <= 1"),
        (lambda: KarrasTimes(skip=0.5), "skip must be"),
        (lambda: DiscreteTimes(0), "steps must be"),
        (lambda: UniformGrid(0.0), "shift must be"),
        (lambda: KarrasGrid(rho=-1.0), "rho must be"),
        (lambda: LambdaGrid(sigma_min=0.0), "sigma_min and sigma_max must be"),
        (lambda: UniformGrid().times(FlowMatching(), 0), "steps must be >= 1, got 0"),
        (lambda: as_grid("cosine", EDM()), "grid must be one of"),
        (lambda: as_time_sampler("beta"), "time_sampler must be one of"),
        (lambda: check_path([0.1, 0.5], FlowMatching()), "times must be two or more falling numbers"),
        (lambda: check_path([1.5, 0.5], FlowMatching()), r"t must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_uniform_times_may_leave_out_the_ends() -> None:
    times = UniformTimes(0.25, 0.75).quantile(U, FlowMatching())
    torch.testing.assert_close(times, 0.25 + 0.5 * U)
    assert float(UniformTimes(0.0, 0.5).quantile(torch.zeros(1), EDM())) == pytest.approx(0.002)
