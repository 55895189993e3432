"""How good generated samples are, beside real ones.

All metrics are updated as torchmetrics' ``FrechetInceptionDistance`` is: ``update(samples, real=True)`` and
``update(samples, real=False)``. Samples of any shape are compared as vectors.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class _TwoSamples(Metric):
    """Keeps real and generated samples until :meth:`compute`."""

    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("generated", default=[], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add samples ``(batch, ...)``."""
        (self.real if real else self.generated).append(samples.detach().flatten(1).float())

    def _both(self) -> tuple[Tensor, Tensor]:
        real, generated = dim_zero_cat(self.real), dim_zero_cat(self.generated)
        if min(len(real), len(generated)) < 2:
            raise ValueError(f"there must be two real and two generated samples, got {len(real)} and {len(generated)}")
        return real, generated


class SlicedWasserstein(_TwoSamples):
    """Sliced Wasserstein-2 distance: root mean square over random directions of the distance of projections.

    Args:
        directions: number of random directions, >= 1.
        seed: of the directions, >= 0.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; in ``compute``, fewer than two samples of a kind.
    """

    higher_is_better = False

    def __init__(self, directions: int = 256, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check("directions", directions, 1)
        _check("seed", seed, 0)
        self.directions = directions
        self.seed = seed

    def compute(self) -> Tensor:
        """The distance, in units of the samples."""
        real, generated = self._both()
        directions = torch.randn(real.shape[1], self.directions, generator=torch.Generator().manual_seed(self.seed))
        directions = nn.functional.normalize(directions, dim=0).to(real)
        levels = (torch.arange(1000, device=real.device) + 0.5) / 1000
        quantiles = [torch.quantile(x @ directions, levels, dim=0) for x in (real, generated)]
        return (quantiles[0] - quantiles[1]).square().mean().sqrt()


class MMD(_TwoSamples):
    """Squared maximum mean discrepancy with Gaussian kernels of several widths, without bias (may be below 0).

    Args:
        widths: widths of the kernels as multiples of the median distance of real samples, each > 0.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; in ``compute``, fewer than two samples of a kind.
    """

    higher_is_better = False

    def __init__(self, widths: tuple[float, ...] = (0.5, 1.0, 2.0), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not widths or not all(0 < width < math.inf for width in widths):
            raise ValueError(f"widths must be one or more numbers > 0 and finite, got {widths}")
        self.widths = tuple(widths)

    def compute(self) -> Tensor:
        """The mean over the kernels."""
        real, generated = self._both()
        between = torch.cdist(real, generated).square()
        among_real, among_generated = (torch.cdist(x, x).square() for x in (real, generated))
        median = among_real[~torch.eye(len(real), dtype=torch.bool, device=real.device)].median()
        total = torch.zeros((), device=real.device)
        for width in self.widths:
            scale = 2 * width**2 * median
            kernels = [torch.exp(-d / scale) for d in (among_real, among_generated, between)]
            m, n = len(real), len(generated)
            total = total + (kernels[0].sum() - m) / (m * (m - 1)) + (kernels[1].sum() - n) / (n * (n - 1))
            total = total - 2 * kernels[2].mean()
        return total / len(self.widths)


class PrecisionRecall(_TwoSamples):
    """Share of generated samples within the real manifold, and of real ones within the generated (arXiv 1904.06991).

    A manifold is the union of balls around samples that reach to their ``k``-th nearest neighbour.

    Args:
        k: neighbours, >= 1.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; in ``compute``, no more samples of a kind than ``k``.
    """

    higher_is_better = True

    def __init__(self, k: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check("k", k, 1)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision`` and ``recall``, in [0, 1]."""
        real, generated = self._both()
        if min(len(real), len(generated)) <= self.k:
            raise ValueError(f"k must be < {min(len(real), len(generated))}, the number of samples, got {self.k}")
        between = torch.cdist(generated, real)
        radii = [torch.cdist(x, x).kthvalue(self.k + 1, dim=1).values for x in (real, generated)]
        return {
            "precision": (between <= radii[0]).any(1).float().mean(),
            "recall": (between <= radii[1][:, None]).any(0).float().mean(),
        }


class NearestDistance(_TwoSamples):
    """Mean distance of generated samples to the nearest real one; with training data as real ones, near 0 is copying.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``compute``, fewer than two samples of a kind.
    """

    def compute(self) -> Tensor:
        """The mean, in units of the samples."""
        real, generated = self._both()
        return torch.cdist(generated, real).min(1).values.mean()


class SampleMoments(Metric):
    """Mean and standard deviation of all values of generated samples.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``compute``, fewer than two values.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add samples ``(batch, ...)``; real ones are left out."""
        if not real:
            x = samples.detach().to(self.sums.dtype)
            self.sums += torch.stack([torch.full_like(x, 1.0).sum(), x.sum(), x.square().sum()])

    def compute(self) -> dict[str, Tensor]:
        """``mean`` and ``std``."""
        count, total, squares = self.sums
        if count < 2:
            raise ValueError(f"there must be two generated values, got {int(count)}")
        variance = (squares - total**2 / count) / (count - 1)
        return {"mean": (total / count).float(), "std": variance.clamp(min=0).sqrt().float()}


class ClassifierConfidence(Metric):
    """How sure a classifier is of generated samples, and how evenly it finds the classes.

    Without a ``classifier``, labelled real samples classify by their nearest neighbours.

    Args:
        num_classes: number of classes, >= 2.
        classifier: maps samples ``(batch, ...)`` to logits ``(batch, num_classes)``.
        k: neighbours where there is no classifier, >= 1.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; no labelled samples where there is no classifier.
    """

    full_state_update = False
    real: list[Tensor]
    labels: list[Tensor]
    generated: list[Tensor]

    def __init__(self, num_classes: int, classifier: nn.Module | None = None, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check("num_classes", num_classes, 2)
        _check("k", k, 1)
        self.num_classes = num_classes
        self.classifier = classifier
        self.k = k
        for name in ("real", "labels", "generated"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool, y: Tensor | None = None) -> None:
        """Add samples; real ones with their labels ``(batch,)``, which a given classifier does not need."""
        if not real:
            self.generated.append(self._classify(samples) if self.classifier else samples.detach().flatten(1).float())
        elif self.classifier is None:
            if y is None:
                raise ValueError("y must be the labels of real samples where there is no classifier, got None")
            self.real.append(samples.detach().flatten(1).float())
            self.labels.append(y)

    def compute(self) -> dict[str, Tensor]:
        """``confidence``, the mean of the largest probability; ``entropy`` of the found classes in nats."""
        generated = dim_zero_cat(self.generated)
        if self.classifier is None:
            near = torch.cdist(generated, dim_zero_cat(self.real)).topk(self.k, largest=False).indices
            votes = nn.functional.one_hot(dim_zero_cat(self.labels)[near], self.num_classes)
            generated = votes.float().mean(1)
        found = torch.bincount(generated.argmax(1), minlength=self.num_classes) / len(generated)
        return {"confidence": generated.amax(1).mean(), "entropy": torch.special.entr(found).sum()}

    def _classify(self, samples: Tensor) -> Tensor:
        assert self.classifier is not None
        with torch.no_grad():
            return self.classifier(samples).float().softmax(1)


def _check(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
