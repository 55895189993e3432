from collections.abc import Callable

import pytest
import torch

from lit_methods.diffusion import affine_generator, gaussian_mixture, sample

MEANS, STDS, WEIGHTS = [[-1.5, 0.0], [2.5, 1.0]], [0.5, 0.3], [0.7, 0.3]


def test_a_mixture_is_the_expected_clean_sample() -> None:
    """Its score is the derivative of the log-density of the noisy mixture."""
    denoiser = gaussian_mixture(MEANS, STDS, WEIGHTS).double()
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.full((20,), 0.8, dtype=torch.float64)
    parts = torch.distributions.Independent(
        torch.distributions.Normal(
            torch.tensor(MEANS).double(), (torch.tensor(STDS).double()[:, None] ** 2 + 0.64).sqrt().expand(2, 2)
        ),
        1,
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(WEIGHTS, dtype=torch.float64)), parts
    )
    (score,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(denoiser.score(x.detach(), t), score, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert denoiser.sample_shape == [2]


def test_samples_of_a_mixture_have_its_moments() -> None:
    out = sample(
        gaussian_mixture(MEANS, STDS, WEIGHTS),
        (4000, 2),
        solver="heun",
        steps=30,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(out.mean(0), torch.tensor([-0.3, 0.3]), rtol=0, atol=0.15)


def test_a_generator_scales_and_shifts_noise() -> None:
    generator = affine_generator([1.0, -1.0], 0.5, sigma_max=3.0)
    z = torch.randn(5, 2)
    torch.testing.assert_close(generator.x0(3.0 * z, 3.0).detach(), torch.tensor([1.0, -1.0]) + 0.5 * z)
    assert sum(p.numel() for p in generator.parameters() if p.requires_grad) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gaussian_mixture([], []), "means, stds and weights must be equally many"),
        (lambda: gaussian_mixture([[0.0], [1.0, 2.0]], [1.0, 1.0]), "means equally long"),
        (lambda: gaussian_mixture([[float("nan")]], [1.0]), "means must be finite"),
        (lambda: gaussian_mixture([[0.0]], [0.0]), "stds must be > 0"),
        (lambda: gaussian_mixture([[0.0]], [1.0], [-1.0]), "weights must be > 0"),
        (lambda: affine_generator([]), "loc must be one or more finite numbers"),
        (lambda: affine_generator([0.0], 0.0), "scale must be > 0"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
