import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_methods.datamodules import Mixture2DDataModule
from lit_methods.diffusion import Denoiser, Diffusion, TimeMLP, bits_per_dim, nll
from tests.unit.diffusion.closed_forms import POINTS, PROCESSES, STD, gaussian_denoiser

CENTRE = torch.zeros(2, dtype=torch.float64)  # with another mean, pure noise itself is not quite what it is taken for
EXACT = -torch.distributions.Normal(CENTRE, STD).log_prob(POINTS).sum(1)


@pytest.mark.parametrize("name", PROCESSES)
def test_gaussian_data_have_their_likelihood(name: str) -> None:
    got = nll(gaussian_denoiser(name, CENTRE), POINTS, steps=200, grid="karras", probes=None)
    torch.testing.assert_close(got, EXACT, rtol=0, atol=0.02)


def test_probes_estimate_without_bias_and_more_are_better() -> None:
    """For a rotated Gaussian the velocity mixes the coordinates, so that random probes err."""
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    plain = gaussian_denoiser("fm", torch.zeros(2).double())
    denoiser = Denoiser(lambda x, t: plain.x0(x @ rotation, t) @ rotation.T, "fm", "x0")
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(400, 2)
    exact = float(nll(denoiser, x[:1], probes=None))
    generator = torch.Generator().manual_seed(0)
    one, four = (nll(denoiser, x, steps=30, probes=n, generator=generator) for n in (1, 4))
    exact = float(nll(denoiser, x[:1], steps=30, probes=None))
    assert float(one.mean()) == pytest.approx(exact, abs=0.1)
    assert 0 < float(four.std()) < 0.7 * float(one.std())


def test_the_exact_model_of_a_mixture_has_the_exact_likelihood() -> None:
    data = Mixture2DDataModule(std=0.2)
    denoiser = Denoiser(lambda x, t: data.velocity(x, 1 - t, t, -1.0, 1.0), "fm", "flow")
    torch.testing.assert_close(nll(denoiser, POINTS, steps=200, probes=None), -data.log_prob(POINTS), rtol=0, atol=0.01)


def test_a_density_becomes_bits_by_the_width_of_a_level() -> None:
    zero = torch.zeros(1)
    for levels, value_range, bits in ((256, (-1, 1), 6.9944), (256, (0, 1), 7.9944), (17, (-1, 1), 3.0)):
        assert float(bits_per_dim(zero, 4, levels, value_range)) == pytest.approx(bits, abs=1e-4)
    # Uniform data over all levels have log2(levels) bits, up to the last level's width.
    uniform = torch.tensor([8 * torch.tensor(2.0).log()])
    assert float(bits_per_dim(uniform, 8, 17, (-1.0, 1.0))) == pytest.approx(4.0)


def test_works_in_inference_mode_where_lightning_tests() -> None:
    model = Diffusion(TimeMLP([2], width=8), seed=3)
    x = POINTS.float()
    outside = model.nll(x, steps=5)

    class Wrapper(LightningModule):
        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            assert torch.is_inference_mode_enabled()
            torch.testing.assert_close(model.nll(batch, steps=5), outside)

    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    trainer.test(Wrapper(), DataLoader(x, batch_size=3), verbose=False)


def test_bad_arguments() -> None:
    for build, message in (
        (lambda: nll(gaussian_denoiser("fm"), POINTS, probes=0), "probes must be >= 1"),
        (lambda: nll(gaussian_denoiser("fm"), POINTS, steps=0), "steps must be >= 1"),
        (lambda: bits_per_dim(EXACT, 0, 256, (-1, 1)), "dims must be"),
        (lambda: bits_per_dim(EXACT, 2, 1, (-1, 1)), "levels must be"),
        (lambda: bits_per_dim(EXACT, 2, 256, (1, -1)), "value_range must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
