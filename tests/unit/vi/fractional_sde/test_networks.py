"""Networks: shapes, starts, what each may depend on."""

import pytest
import torch

from lit_methods.vi import (
    ControlMLP,
    DiagonalDiffusion,
    DriftMLP,
    LinearDrift,
    SeriesEncoder,
    VideoDecoder,
    VideoEncoder,
)

T = torch.tensor(0.7)


def test_drifts() -> None:
    x = torch.randn(4, 3)
    torch.testing.assert_close(LinearDrift(2.0)(x, T), -2 * x)
    plain, timed = DriftMLP(3, [8]), DriftMLP(3, [8], periodic_time=True)
    assert plain(x, T).shape == (4, 3)
    assert torch.equal(plain(x, T), plain(x, 2 * T))
    assert not torch.equal(timed(x, T), timed(x, 2 * T))
    torch.testing.assert_close(timed(x, T), timed(x, T + 2 * torch.pi))
    inputs = torch.cat([x, torch.tensor([T.sin(), T.cos()]).expand(4, 2)], 1)
    torch.testing.assert_close(timed(x, T), timed.layers(inputs))


def test_the_diffusion_is_positive_and_diagonal() -> None:
    net = DiagonalDiffusion(3, [8, 8])
    x = torch.randn(4, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, T).sum(0), x)  # (3, 4, 3)
    assert (net(x, T) > 0).all()
    assert (jacobian[torch.arange(3), :, torch.arange(3)] != 0).all()
    assert not (jacobian * (1 - torch.eye(3)[:, None])).any()
    alone = net.biases[2]
    for d in range(3):
        hidden = x[:, d, None]
        for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
            hidden = (hidden.tanh() if i else hidden) @ w[d] + b[d]
        torch.testing.assert_close(net(x, T)[:, d], torch.nn.functional.softplus(hidden[:, 0]))
    assert alone.shape == (3, 1, 1)


def test_the_control_starts_at_the_prior() -> None:
    x, y, context = torch.randn(4, 2), torch.randn(4, 2, 5), torch.randn(4, 3)
    net = ControlMLP(2, 5, [8], context_dim=3)
    assert not net(x, y, T, context).any()
    torch.nn.init.normal_(net.layers[-1].weight)
    found = net(x, y, T, context)
    for changed in ((x + 1, y, T, context), (x, y + 1, T, context), (x, y, T + 1, context), (x, y, T, context + 1)):
        assert not torch.equal(net(*changed), found)
    with pytest.raises(ValueError, match="context_dim must be that of the context, got 3 and None"):
        net(x, y, T, None)


def test_the_series_encoder_reads_both_ways_and_past_holes() -> None:
    torch.manual_seed(0)
    net = SeriesEncoder(2, 3, 4, 8)
    times, values = torch.tensor([0.0, 0.5, 2.0]), torch.randn(2, 3, 2)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    first = net(times, torch.where(mask[..., None], values, torch.nan), mask)
    assert first.mean.shape == first.log_variance.shape == (2, 3)
    assert first.context.shape == (2, 3, 4)
    moved = values.clone()
    moved[:, 2] += 1
    assert (net(times, moved, mask).mean != first.mean).all()
    assert (net(torch.tensor([0.0, 1.5, 2.0]), values, mask).mean != first.mean).all()
    assert not torch.equal(net(times, values, torch.ones_like(mask)).mean[0], first.mean[0])


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_video_networks_fit_together(size: int) -> None:
    torch.manual_seed(0)
    encoder, decoder = VideoEncoder(2, size, 1, 8, 5), VideoDecoder(2, size, 1, 8, 5)
    frames = torch.rand(2, 4, 1, size, size)
    found = encoder(0.1 * torch.arange(4), frames, torch.ones(2, 4, dtype=torch.bool))
    assert found.context.shape == (2, 4, 8)
    assert found.content.shape == (2, 5)
    assert found.mean.shape == (2, 2)
    out = decoder(torch.randn(2, 4, 2), found.content)
    assert out.shape == frames.shape
    assert ((out > 0) & (out < 1)).all()
    for p in (*encoder.parameters(), *decoder.parameters()):
        p.grad = None
    (decoder(found.mean[:, None].expand(-1, 4, -1), found.content).sum() + found.context.sum()).backward()
    assert all(p.grad is not None for p in (*decoder.parameters(), *encoder.frames.parameters()))


def test_the_content_ignores_order_and_masked_frames() -> None:
    torch.manual_seed(0)
    encoder = VideoEncoder(2, 8, 1, 8, 5)
    frames, times, all_seen = torch.rand(1, 5, 1, 8, 8), torch.arange(5.0), torch.ones(1, 5, dtype=torch.bool)
    content = encoder(times, frames, all_seen).content
    torch.testing.assert_close(encoder(times, frames.flip(1), all_seen).content, content)
    mask = torch.tensor([[True, True, True, False, False]])
    masked = encoder(times, torch.where(mask[..., None, None, None], frames, torch.nan), mask).content
    torch.testing.assert_close(masked, encoder(times[:3], frames[:, :3], all_seen[:, :3]).content)
    assert not torch.equal(masked, content)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DriftMLP(0), "state_dim must be >= 1, got 0"),
        (lambda: DriftMLP(1, [0]), r"hidden_dims must hold widths >= 1, got \[0\]"),
        (lambda: ControlMLP(1, 0), "num_ou must be >= 1, got 0"),
        (lambda: ControlMLP(1, 1, context_dim=-1), "context_dim must be >= 0, got -1"),
        (lambda: VideoEncoder(1, 20), r"size must be one of \[8, 16, 32, 64\], got 20"),
        (lambda: VideoDecoder(1, num_features=12), "num_features must be a multiple of 8, got 12"),
        (lambda: VideoDecoder(1, 8)(torch.zeros(1, 3, 1), None), "content must be given"),
        (
            lambda: VideoEncoder(1, 8)(torch.arange(2.0), torch.zeros(1, 2, 1, 8, 8), torch.ones(1, 2).bool()),
            "values must hold at least 3 frames, got 2",
        ),
    ],
)
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
