"""Streams of convex losses between stochastic and adversarial, with known noise and drift; and a real one, drifting.

The stochastically extended adversarial (SEA) model of Sachs, Hadiji, van Erven, Guzman (NeurIPS 2022): in round t
nature picks a distribution, a loss is drawn from it. ``sigma2`` adds up the variances of gradients, ``Sigma2`` the
squared changes of the expected gradient, ``path_length`` the way of the comparators.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import OnlineRound
from lit_methods.datamodules.tensors import ShuffledSampler, TensorDataModule, TensorRows, check_int

_KINDS = ("iid", "drift", "abrupt", "adversarial", "corrupted", "random_order")
_LOSSES = ("linear", "quadratic", "least_squares", "logistic", "hinge", "abs")


class _StreamSampler(ShuffledSampler):
    """Rounds of an epoch, in order; every rank sees every round (with samples of its own)."""

    def order(self, epoch: int) -> list[int]:
        self.set_epoch(epoch)
        rounds = len(self.dataset)  # type: ignore[arg-type]
        return list(range(epoch * rounds, (epoch + 1) * rounds))


class _Rounds(TensorRows[OnlineRound]):
    """Fetches round ``index`` of epoch ``index // rounds``; remembers the last epoch's stream."""

    def __init__(self, data: "_OnlineDataModule", rank: int) -> None:
        self.stream, self.rank, self.rounds = data.stream, rank, data.rounds
        self.epoch = -1

    def __len__(self) -> int:
        return self.rounds

    def __getitems__(self, indices: Sequence[int]) -> OnlineRound:
        (index,) = indices
        epoch, t = divmod(index, self.rounds)
        if epoch != self.epoch:
            self.epoch, self.data = epoch, self.stream(epoch, self.rank)
        return OnlineRound(*(tensor[t] for tensor in self.data))


class _OnlineDataModule(TensorDataModule):
    """Loaders over a stream; subclasses define :meth:`stream`."""

    rounds: int

    def stream(self, epoch: int = 0, rank: int = 0) -> OnlineRound:
        """All rounds of an epoch as this rank sees them: every tensor with a leading dimension ``rounds``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Draw the round that validation and testing evaluate: the last of epoch 0, drawn anew."""
        self.val_data = self.test_data = OnlineRound(*(x[-1:] for x in self.stream(0, rank=10**6)))

    def train_dataloader(self) -> StatefulDataLoader:
        """Return a loader of one round a batch, in order."""
        rows = _Rounds(self, self._ranks()[1])
        sampler = _StreamSampler(rows, 1, 0, shuffle=False)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._loader(rows, sampler)

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        return {**super().state_dict(), "train_size": self.rounds}

    def _eval_loader(self, data: tuple[Tensor, ...] | None) -> StatefulDataLoader | list[StatefulDataLoader]:
        if data is None:
            return []
        rows = TensorRows(data, lambda batch: OnlineRound(*(x[0] for x in batch)))
        return self._loader(rows, ShuffledSampler(rows, 1, 0, shuffle=False))  # the same on every rank

    @staticmethod
    def _generator(*key: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


class SEADataModule(_OnlineDataModule):
    r"""A stream of convex losses in one of the regimes of the SEA model; a pure function of (seed, epoch, rank, round).

    A signal :math:`\theta_t` moves as ``kind`` says, and the loss around it is drawn anew in each round:

    - ``linear``: :math:`f_t(x) = \langle g_t, x\rangle`, :math:`g_t = \theta_t + \text{noise}\cdot\xi`, with
      :math:`\xi` uniform on the unit sphere and :math:`\|\theta_t\| = 1`; the comparator is :math:`-R\,\theta_t`.
    - ``quadratic``: :math:`\|x - z_t\|^2 / 2`, :math:`z_t = \theta_t + \text{noise}\cdot\xi`, :math:`\|\theta_t\| = R
      / 2`.
    - ``least_squares``, ``abs``: a uniform on the unit sphere, :math:`y = \langle a, \theta_t\rangle +
      \text{noise}\cdot U(-1, 1)`, :math:`\|\theta_t\| = R / 2`.
    - ``logistic``, ``hinge``: :math:`y = \operatorname{sign}\langle a, \theta_t\rangle`, flipped with probability
      ``noise``; the comparator is :math:`R\,\theta_t / \|\theta_t\|` (which minimises the hinge or logistic loss over
      that ray, not over the ball).

    Kinds: ``iid`` (:math:`\theta` stays), ``drift`` (it rotates in a plane by ``drift`` radians a round), ``abrupt``
    (``stages`` random directions, one after the other), ``adversarial`` (a random sign in each round), ``corrupted``
    (``iid``, but a fraction ``corruption`` of the rounds has the sign reversed), ``random_order`` (a fixed pool of as
    many losses as rounds, in a new order each epoch; ``linear`` and ``quadratic`` only).

    Args:
        kind: see above.
        loss: see above.
        dim: coordinates, >= 2.
        rounds: rounds of an epoch, >= 1.
        noise: >= 0; below 0.5 for ``logistic`` and ``hinge``.
        drift: radians a round, > 0, for ``drift``; :math:`2\pi / 200` is a turn in 200 rounds.
        stages: >= 1, for ``abrupt``.
        corruption: fraction of rounds in [0, 1], for ``corrupted``.
        radius: R of the decision set, the ball around the origin, > 0.
        samples_per_round: losses a round on each rank, whose mean is the round's loss, >= 1; divides the variance.
        dtype: floating point type.
        seed: >= 0.
        num_workers: loader processes, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        kind: Literal["iid", "drift", "abrupt", "adversarial", "corrupted", "random_order"] = "iid",
        loss: Literal["linear", "quadratic", "least_squares", "logistic", "hinge", "abs"] = "linear",
        dim: int = 20,
        rounds: int = 4000,
        noise: float = 0.1,
        drift: float = 2 * math.pi / 200,
        stages: int = 10,
        corruption: float = 0.1,
        radius: float = 1.0,
        samples_per_round: int = 1,
        dtype: Literal["float32", "float64"] = "float32",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=1, seed=seed, num_workers=num_workers)
        for name, value, allowed in (("kind", kind, _KINDS), ("loss", loss, _LOSSES)):
            if value not in allowed:
                raise ValueError(f"Invalid {name}={value!r}: must be one of {', '.join(allowed)}.")
        if kind == "random_order" and loss not in ("linear", "quadratic"):
            raise ValueError(f"Invalid kind='random_order' with loss={loss!r}: needs loss linear or quadratic.")
        if not 0 <= noise < (0.5 if loss in ("logistic", "hinge") else math.inf):
            raise ValueError(f"Invalid noise={noise}: must be >= 0 and finite, below 0.5 for logistic and hinge.")
        for name, number in (("drift", drift), ("radius", radius)):
            if not 0 < number < math.inf:
                raise ValueError(f"Invalid {name}={number}: must be > 0 and finite.")
        if not 0 <= corruption <= 1:
            raise ValueError(f"Invalid corruption={corruption}: must be in [0, 1].")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"Invalid dtype={dtype!r}: must be 'float32' or 'float64'.")
        self.kind, self.loss = kind, loss
        self.dim = check_int("dim", dim, 2)
        self.rounds = check_int("rounds", rounds, 1)
        self.noise, self.drift, self.corruption, self.radius = noise, drift, corruption, radius
        self.stages = check_int("stages", stages, 1)
        self.samples_per_round = check_int("samples_per_round", samples_per_round, 1)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def signal(self, epoch: int = 0) -> Tensor:
        """:math:`\\theta_t` of every round, ``(rounds, dim)`` float64; the same on every rank."""
        generator = self._generator(self.seed, epoch, 0)
        shared = self._generator(self.seed, 0)
        directions = _sphere(max(self.stages, 2), self.dim, shared)
        first, second = torch.linalg.qr(directions[:2].T).Q.T
        t = torch.arange(self.rounds, dtype=torch.float64)
        if self.kind == "drift":
            angle = (t + epoch * self.rounds) * self.drift
            path = angle.cos()[:, None] * first + angle.sin()[:, None] * second
        elif self.kind == "abrupt":
            path = directions[(t * self.stages / self.rounds).long()]
        else:
            signs = torch.ones(self.rounds, dtype=torch.float64)
            draws = torch.rand(self.rounds, generator=generator, dtype=torch.float64)
            if self.kind == "adversarial":
                signs[draws < 0.5] = -1
            elif self.kind == "corrupted":
                signs[draws < self.corruption] = -1
            path = signs[:, None] * first
        return path * (1.0 if self.loss == "linear" else 0.5 * self.radius)

    def stream(self, epoch: int = 0, rank: int = 0) -> OnlineRound:
        """All rounds of an epoch as this rank sees them: every tensor with a leading dimension ``rounds``."""
        theta = self.signal(epoch)
        if self.kind == "random_order":
            pool = theta + self.noise * _sphere(self.rounds, self.dim, self._generator(self.seed, 1))
            order = torch.randperm(self.rounds, generator=self._generator(self.seed, epoch, 2))
            features = pool[order][:, None].expand(-1, self.samples_per_round, -1)
            theta, targets = _remaining_mean(pool[order]), torch.zeros(features.shape[:2], dtype=torch.float64)
        else:
            generator = self._generator(self.seed, epoch, 3, rank)
            shape = (self.rounds, self.samples_per_round)
            features = _sphere(self.rounds * self.samples_per_round, self.dim, generator).view(*shape, self.dim)
            uniform = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
            targets = torch.zeros(shape, dtype=torch.float64)
            if self.loss in ("linear", "quadratic"):
                features = theta[:, None] + self.noise * features
            else:
                targets = (features * theta[:, None]).sum(-1)
                if self.loss in ("logistic", "hinge"):
                    targets = targets.sign() * (uniform >= 2 * self.noise - 1).double().mul(2).sub(1)
                else:
                    targets = targets + self.noise * uniform
        if self.loss in ("linear", "logistic", "hinge"):
            scale = -self.radius if self.loss == "linear" else self.radius
            comparator = scale * theta / theta.norm(dim=1, keepdim=True)
        else:
            comparator = theta * (self.radius / theta.norm(dim=1, keepdim=True)).clamp(max=1)
        return OnlineRound(*(x.to(self.dtype) for x in (features, targets, comparator)))

    @property
    def sigma2(self) -> float:
        """:math:`\\sigma^2_{1:T}`, the sum over an epoch of the largest gradient variance over the ball, on one rank.

        Exact; n ranks (which average gradients) divide it by n.

        Raises:
            ValueError: the loss has no closed form (``logistic``, ``hinge``, ``abs``; 1 a round bounds it).
        """
        if self.kind == "random_order":
            values = self.stream().features[:, 0].double()
            return float(
                (_remaining_mean(values.square().sum(1, keepdim=True))[:, 0] - _remaining_mean(values).square().sum(1))
                .clamp(min=0)
                .sum()
            )
        if self.loss in ("linear", "quadratic"):
            total = self.rounds * self.noise**2
        elif self.loss == "least_squares":
            farthest = self.radius + self.signal().norm(dim=1)
            spread = (1 / self.dim - 1 / self.dim**2) * farthest.square()
            total = float(spread.sum()) + self.rounds * self.noise**2 / 3
        else:
            raise ValueError(f"sigma2 has no closed form for loss={self.loss!r}; 1 a round bounds it")
        return total / self.samples_per_round

    @property
    def Sigma2(self) -> float:
        """:math:`\\Sigma^2_{1:T}`, the sum over an epoch of the largest squared change of the expected gradient.

        Exact, with the expected gradient of round 0 taken for 0.

        Raises:
            ValueError: the loss has no closed form (``logistic``, ``hinge``, ``abs``).
        """
        theta = self.signal()
        if self.kind == "random_order":
            theta = _remaining_mean(self.stream().features[:, 0].double())
        if self.loss == "linear":
            first, factor = float(theta[0].square().sum()), 1.0
        elif self.loss in ("quadratic", "least_squares"):
            factor = 1.0 if self.loss == "quadratic" else 1 / self.dim
            first = (factor * (self.radius + float(theta[0].norm()))) ** 2
        else:
            raise ValueError(f"Sigma2 has no closed form for loss={self.loss!r}")
        return first + factor**2 * float(theta.diff(dim=0).square().sum())

    @property
    def path_length(self) -> float:
        """:math:`P_T`, the way of the comparators over an epoch."""
        return float(self.stream().comparator.double().diff(dim=0).norm(dim=1).sum())


class DriftingDigitsDataModule(_OnlineDataModule):
    """Handwritten digits, even against odd, turning: a drifting stream of real data for ``logistic`` or ``hinge``.

    Each round shows random digits of scikit-learn's 8x8 images, rotated by an angle that swings between -max_angle and
    max_angle once in ``period`` rounds (in 64 fixed angles). Features are 64 pixels and a constant, scaled to norm at
    most 1; targets are 1 for even digits, else -1. There is no known best point in a round: the comparator is 0.

    Args:
        rounds: rounds of an epoch, >= 1.
        max_angle: degrees, >= 0; 0 for no drift.
        period: rounds of a swing, >= 2.
        samples_per_round: digits a round on each rank, >= 1.
        seed: >= 0.
        num_workers: loader processes, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    dim = 65

    def __init__(
        self,
        rounds: int = 4000,
        max_angle: float = 60.0,
        period: int = 1000,
        samples_per_round: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=1, seed=seed, num_workers=num_workers)
        self.rounds = check_int("rounds", rounds, 1)
        if not 0 <= max_angle <= 180:
            raise ValueError(f"Invalid max_angle={max_angle}: must be in [0, 180].")
        self.max_angle = max_angle
        self.period = check_int("period", period, 2)
        self.samples_per_round = check_int("samples_per_round", samples_per_round, 1)
        self._images: Tensor | None = None

    def stream(self, epoch: int = 0, rank: int = 0) -> OnlineRound:
        """All rounds of an epoch as this rank sees them: every tensor with a leading dimension ``rounds``."""
        pixels, labels = load_digits(return_X_y=True)
        if self._images is None:
            angles = np.linspace(-self.max_angle, self.max_angle, 64)
            images = pixels.reshape(-1, 8, 8)
            turned = np.stack([rotate(images, a, axes=(1, 2), reshape=False, order=1) for a in angles])
            with_bias = np.concatenate([turned.reshape(64, -1, 64) / 16, np.ones((64, len(pixels), 1))], 2)
            self._images = torch.from_numpy(with_bias / np.linalg.norm(with_bias, axis=2).max()).float()
        t = torch.arange(self.rounds, dtype=torch.float64) + epoch * self.rounds
        angle = ((t * (2 * math.pi / self.period)).sin() * 31.5 + 31.5).round().long()
        generator = self._generator(self.seed, epoch, rank)
        digits = torch.randint(len(pixels), (self.rounds, self.samples_per_round), generator=generator)
        targets = 1.0 - 2.0 * (torch.from_numpy(labels)[digits] % 2)
        return OnlineRound(self._images[angle[:, None], digits], targets.float(), torch.zeros(self.rounds, self.dim))


def _sphere(count: int, dim: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def _remaining_mean(values: Tensor) -> Tensor:
    """Mean of ``values[t:]`` for every t."""
    counts = torch.arange(len(values), 0, -1, dtype=torch.float64)[:, None]
    return values.flip(0).cumsum(0).flip(0) / counts
