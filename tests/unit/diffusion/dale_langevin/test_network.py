"""What a network sees and predicts in logarithms."""

import pytest
import torch
from torch import Tensor, nn

from lit_methods.diffusion import GeometricBrownian, LogNetwork


class Echo(nn.Module):
    """Keeps what it was shown, and answers with the sample."""

    def forward(self, seen: Tensor, time: Tensor) -> Tensor:
        self.seen, self.time = seen, time
        return seen


@pytest.mark.parametrize("prior", ["scalar", "channel", "pixel"])
def test_standardised_logarithms_have_no_mean_and_unit_variance(prior: str) -> None:
    process = GeometricBrownian()
    draw = torch.Generator().manual_seed(0)
    y = (2 + 0.5 * torch.randn(4000, 2, 3, generator=draw)).double()
    network = LogNetwork(Echo(), (2, 3), process, prior=prior).double()
    network.set_moments(torch.tensor(4000.0), y.sum(0), y.square().sum(0))
    t = torch.full((4000,), process.t_min, dtype=torch.float64)
    noisy = y + process.sigma(t)[:, None, None] * torch.randn(y.shape, generator=draw).double()
    seen = network(noisy, t)
    assert abs(float(seen.mean())) < 0.05
    assert float(seen.std()) == pytest.approx(1.0, abs=0.05)
    assert float(network.net.time[0]) == pytest.approx(0.0, abs=1e-9)
    network(noisy, torch.full_like(t, process.t_max))
    assert float(network.net.time[0]) == pytest.approx(1.0)


def test_positive_samples_as_input() -> None:
    process = GeometricBrownian()
    network = LogNetwork(Echo(), (3,), process, network_input="x").double()
    x = torch.rand(5, 3).double() + 0.5
    t = torch.full((5,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(network(process.to_log(x, t), t), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "shape must hold sizes >= 1"),
        ({"prediction": "x0"}, "prediction must be one of"),
        ({"network_input": "sqrt"}, "network_input must be one of"),
        ({"prior": "row"}, "prior must be one of"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogNetwork(Echo(), **{"shape": (3,), "process": GeometricBrownian(), **arguments})
