"""Attend, infer, repeat: scenes of a few objects, counted, located and described one at a time.

Eslami et al., arXiv 1603.08575, as in figure 7 of the paper and in its code: presence of an object is a Bernoulli
choice, whose gradient estimator is yours to choose.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn import functional

from lit_methods.batches import SupervisedBatch
from lit_methods.vi.programmable.programs import observe, sample
from lit_methods.vi.programmable.strategies import ENUM, MVD, Reinforce, Strategy

_EPS = 1e-4  # keeps the guide's probability of presence away from 0 and 1


class SceneModel(nn.Module):
    """``batch.x``, ``(batch, 1, size, size)``, is a sum of up to T objects and noise.

    For step t: ``z_pres_t ~ Bernoulli(presence[t])``; ``z_where_t ~ N([where_scale, 0, 0], [0.2, 1, 1])``, inverse size
    and place; ``z_what_t ~ N(0, I)``. The decoder's object is put there if it is present.

    Args:
        presence: prior probabilities of presence, one for each of T steps, in (0, 1).
        image_size: pixels of a side of the scene, >= 1.
        object_size: of the decoder's object, >= 1.
        what_dim: size of ``z_what``, >= 1.
        hidden_dim: width of the decoder's hidden layer, >= 1.
        where_scale: prior mean of image size over object size, > 0.
        noise: standard deviation of pixels, > 0.
        decoder_bias: of the decoder's output at first; -2 begins with dark objects.
    """

    def __init__(
        self,
        presence: Sequence[float] = (0.05, 0.05**2.3, 0.05**5),
        image_size: int = 50,
        object_size: int = 20,
        what_dim: int = 50,
        hidden_dim: int = 200,
        where_scale: float = 3.0,
        noise: float = 0.3,
        decoder_bias: float = -2.0,
    ) -> None:
        super().__init__()
        if not presence or not all(0 < p < 1 for p in presence):
            raise ValueError(f"presence must hold probabilities in (0, 1), got {presence}")
        sizes = {"image_size": image_size, "object_size": object_size, "what_dim": what_dim, "hidden_dim": hidden_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        for name, value in (("where_scale", where_scale), ("noise", noise)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not math.isfinite(decoder_bias):
            raise ValueError(f"decoder_bias must be finite, got {decoder_bias}")
        self.presence = [float(p) for p in presence]
        self.image_size = image_size
        self.object_size = object_size
        self.what_dim = what_dim
        self.noise = noise
        self.decoder = nn.Sequential(
            nn.Linear(what_dim, hidden_dim), nn.LeakyReLU(), nn.Linear(hidden_dim, object_size**2)
        )
        nn.init.constant_(self.decoder[-1].bias, decoder_bias)  # type: ignore[arg-type]
        self.where_loc: Tensor
        self.where_std: Tensor
        self.register_buffer("where_loc", torch.tensor([where_scale, 0.0, 0.0]), persistent=False)
        self.register_buffer("where_std", torch.tensor([0.2, 1.0, 1.0]), persistent=False)

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """One run; returns the scene without noise, ``(..., size * size)``."""
        zeros = self.where_loc.new_zeros(self.what_dim)
        scene: Tensor | float = 0.0
        for t, presence in enumerate(self.presence):
            present = sample(f"z_pres_{t}", Bernoulli(presence, validate_args=False))
            where = sample(f"z_where_{t}", _normal(self.where_loc, self.where_std))
            what = sample(f"z_what_{t}", _normal(zeros, torch.ones_like(zeros)))
            (placed,) = _flat(self._place, where, self.decoder(what).sigmoid())
            scene = scene + present.unsqueeze(-1) * placed
        assert isinstance(scene, Tensor)
        pixels = Normal(scene, self.noise, validate_args=False)
        observe("x", Independent(pixels, 1, validate_args=False), batch.x.flatten(1))
        return scene

    def _place(self, where: Tensor, objects: Tensor) -> Tensor:
        return _resample(objects, self.object_size, where, self.image_size)


class SceneGuide(nn.Module):
    """A recurrent network looks at the scene once a step: is there another object, where, and what is it?

    Args:
        grads: gradient estimators of presence, one for each of T steps: "enum", "mvd", "reinforce", or "baseline":
            REINFORCE with a network of the image that learns to predict the cost.
        image_size: as of the model.
        object_size: as of the model.
        what_dim: as of the model.
        hidden_dim: of the recurrent network, >= 1.
        encoder_dim: width of the encoder's hidden layer, >= 1.
        where_scale: where the guide begins: image size over object size, > 0.
        presence_bias: of the logit of presence at first; positive: begin with all objects present, so that where and
            what are learned before the prior takes superfluous ones away.
    """

    def __init__(
        self,
        grads: Sequence[str] = ("mvd", "mvd", "enum"),
        image_size: int = 50,
        object_size: int = 20,
        what_dim: int = 50,
        hidden_dim: int = 256,
        encoder_dim: int = 200,
        where_scale: float = 3.0,
        presence_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if not math.isfinite(presence_bias):
            raise ValueError(f"presence_bias must be finite, got {presence_bias}")
        if not grads or any(grad not in ("enum", "mvd", "reinforce", "baseline") for grad in grads):
            raise ValueError(f"grads must hold 'enum', 'mvd', 'reinforce' or 'baseline', got {list(grads)}")
        sizes = {
            "image_size": image_size, "object_size": object_size, "what_dim": what_dim, "hidden_dim": hidden_dim,
            "encoder_dim": encoder_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if not 0 < where_scale < math.inf:
            raise ValueError(f"where_scale must be > 0 and finite, got {where_scale}")
        self.grads = list(grads)
        self.image_size = image_size
        self.object_size = object_size
        self.what_dim = what_dim
        self.rnn = nn.LSTMCell(image_size**2 + 3 + what_dim + 1, hidden_dim)
        self.predict = nn.Linear(hidden_dim, 7)
        self.encoder = nn.Sequential(
            nn.Linear(object_size**2, encoder_dim), nn.LeakyReLU(), nn.Linear(encoder_dim, 2 * what_dim)
        )
        with torch.no_grad():
            self.predict.bias[0] += presence_bias
            self.predict.bias[1] += where_scale
        self.baseline: nn.Module | None = None
        if "baseline" in grads:
            self.baseline = nn.Sequential(
                nn.Linear(image_size**2, 200), nn.LeakyReLU(), nn.Linear(200, 1), nn.Flatten(0)
            )

    def _strategy(self, grad: str, image: Tensor) -> Strategy:
        if grad == "enum":
            return ENUM
        if grad == "mvd":
            return MVD
        return Reinforce(self.baseline, inputs=(image,)) if grad == "baseline" else Reinforce()

    def forward(self, batch: SupervisedBatch) -> None:
        """One run."""
        image = batch.x.flatten(1)
        n = len(image)
        present = image.new_ones(n)
        where, what = image.new_zeros(n, 3), image.new_zeros(n, self.what_dim)
        state = [image.new_zeros(n, self.rnn.hidden_size)] * 2
        for t, grad in enumerate(self.grads):
            inputs = (image, where, what, present.unsqueeze(-1), *state)
            hidden, cell = _flat(lambda *x: self.rnn(torch.cat(x[:4], -1), x[4:]), *inputs)
            state = [hidden, cell]
            logit, where_loc, where_scale = self.predict(hidden).float().split([1, 3, 3], -1)
            probability = (_EPS + logit.squeeze(-1).sigmoid() * present) / (1 + 1.01 * _EPS)
            strategy = self._strategy(grad, image)
            present = sample(f"z_pres_{t}", Bernoulli(probability, validate_args=False), grad=strategy)
            where = sample(f"z_where_{t}", _normal(where_loc, functional.softplus(where_scale)))
            (crop,) = _flat(self._crop, where, image)
            loc, scale = self.encoder(crop).chunk(2, -1)
            what = sample(f"z_what_{t}", _normal(loc, functional.softplus(scale)))

    def _crop(self, where: Tensor, image: Tensor) -> Tensor:
        inverse = torch.cat([torch.ones_like(where[:, :1]), -where[:, 1:]], -1) / where[:, :1]
        return _resample(image, self.image_size, inverse, self.object_size)


def _normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


def _resample(pixels: Tensor, size: int, where: Tensor, out: int) -> Tensor:
    """Images ``(n, size * size)`` seen through ``where`` = (scale, x, y), ``(n, 3)``, as ``(n, out * out)``."""
    scale, x, y = where.unbind(-1)
    zero = torch.zeros_like(scale)
    theta = torch.stack([scale, zero, x, zero, scale, y], -1).reshape(-1, 2, 3)
    grid = functional.affine_grid(theta, [len(where), 1, out, out], align_corners=False)
    images = pixels.reshape(-1, 1, size, size)
    return functional.grid_sample(images.to(grid.dtype), grid, align_corners=False).flatten(1)


def _flat(function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call a function of matrices with tensors whose leading dimensions broadcast."""
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in tensors))
    out = function(*(x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]) for x in tensors))
    return tuple(x.unflatten(0, shape) for x in ((out,) if isinstance(out, Tensor) else out))
