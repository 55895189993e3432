"""SSO's surrogate: a quadratic (or Bregman) model of the loss in the space of a network's outputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor

from lit_methods.optim.foundation.flat import is_dtensor, local_tensor
from lit_methods.optim.foundation.ranks import mean_over_ranks

Divergence = Callable[[Tensor, Tensor], Tensor]


def kl_divergence(f: Tensor, z: Tensor) -> Tensor:
    """Entries of the generalised Kullback-Leibler divergence KL(f || z) of non-negative ``f`` and ``z``."""
    tiny = torch.finfo(f.dtype).tiny
    return torch.xlogy(f, f) - f * z.clamp_min(tiny).log() - f + z


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of products of two lists of tensors, in float32 or wider; DTensors count as a whole. Synchronises."""
    total = None
    for x, y in zip(left, right, strict=True):
        product = (x * y).sum(dtype=torch.promote_types(x.dtype, torch.float32))
        product = product.full_tensor() if is_dtensor(product) else product  # type: ignore[attr-defined]
        total = product if total is None else total + product.to(total.device)
    return 0.0 if total is None else float(total)


class TargetSurrogate:
    r"""The function of the parameters that SSO's inner steps minimise.

    .. math:: S(\omega) = \langle s, f(\omega) - z\rangle + \tfrac{1}{n\eta} D(f(\omega), z)
        + \tfrac12 \sum_p \text{decay}_p |p|^2

    with :math:`D(f, z) = \tfrac12 \sum a (f - z)^2`, or any divergence. Several calls of the network are one list of
    outputs. With several ranks S is the mean over the examples of all of them, and every number that is returned is
    the same on all.

    Args:
        forward: recomputes the outputs f, a list of tensors shaped like ``targets``.
        params: the parameters that are moved.
        targets: z, outputs at the current parameters, float32 or float64.
        slopes: s, the gradient of the mean loss with respect to ``targets``.
        count: n, examples on this rank.
        eta: η > 0.
        metric: a, positive weights shaped like ``targets``; None for 1.
        divergence: entries of D as a function of (f, z); None for the squared distance.
        decay: one coefficient for each parameter.
        rank_weight: this rank's share of the examples times the number of ranks.
        group: the ranks, or None for one process.
        outputs: the outputs at the current parameters with their graph, where they are known already.
        forward_mode: differentiate along directions by forward-mode AD; False: by central differences.
    """

    def __init__(
        self,
        forward: Callable[[], list[Tensor]],
        params: list[Tensor],
        targets: list[Tensor],
        slopes: list[Tensor],
        count: float,
        eta: float,
        *,
        metric: list[Tensor] | None = None,
        divergence: Divergence | None = None,
        decay: Sequence[float] = (),
        rank_weight: float = 1.0,
        group: dist.ProcessGroup | None = None,
        outputs: list[Tensor] | None = None,
        forward_mode: bool = True,
    ) -> None:
        self._forward = forward
        self.params = params
        self.targets = targets
        self._slopes = slopes
        self._scale = 1 / (count * eta)
        self._metric = metric
        self._divergence = divergence
        self._decay = list(decay) or [0.0] * len(params)
        self._rank_weight = rank_weight
        self.group = group
        self._outputs = outputs
        self._sharded = any(is_dtensor(p) for p in params)
        self.forward_mode = forward_mode and not self._sharded
        self._value: Tensor | None = None
        self._remembered: list[Tensor] | None = None
        self.first_outputs: list[Tensor] | None = None

    # ---- values and derivatives

    def value(self, graph: bool = True) -> float:
        """S at the current parameters; with ``graph`` a call of :meth:`gradient` may follow. Synchronises."""
        with torch.set_grad_enabled(graph):
            found, self._outputs = self._outputs or self._forward(), None
            outputs = [f.to(z.dtype) for f, z in zip(found, self.targets, strict=True)]
            local = self._weight * self._of_outputs(outputs)
        if self.first_outputs is None:
            self.first_outputs = [f.detach() for f in outputs]
        self._value = local if graph else None
        total = self.mean_over_ranks([local.detach()])[0]
        return float(total) + 0.5 * self._decayed_square(self.params)

    @torch.no_grad()
    def gradient(self) -> list[Tensor]:
        """The gradient of the last :meth:`value` that kept its graph; parameters that do not matter get zeros."""
        assert self._value is not None, "gradient() needs value(graph=True) before it"
        loss, self._value = self._value, None
        if self._sharded:
            grads = self._sharded_gradient(loss)
        else:
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
            if any(g is not None and g.layout is not torch.strided for g in found):
                raise RuntimeError("SSO needs dense gradients, not sparse ones; build the embedding with sparse=False")
            pairs = zip(found, self.params, strict=True)
            grads = self.mean_over_ranks([torch.zeros_like(p) if g is None else g for g, p in pairs])
        return [g.add(p, alpha=d) if d else g for d, g, p in zip(self._decay, grads, self.params, strict=True)]

    def curvature(self, direction: list[Tensor]) -> float:
        """dᵀBd for the Gauss-Newton matrix B = Jᵀ(∇²S)J of S at the current parameters, d the direction.

        Where the network or its sharding lacks forward-mode AD, Jd comes from central differences of the outputs: exact
        for linear networks, else to about 1e-10 of its size in float64 and 1e-4 in float32.
        """
        outputs, tangents = self._along(direction)
        local = sum((t * h).sum() for t, h in zip(tangents, self._hessian(outputs, tangents), strict=True))
        total = self.mean_over_ranks([torch.as_tensor(local) * self._weight])[0]
        return float(total) + self._decayed_square(direction)

    def gauss_newton_product(self, direction: list[Tensor]) -> list[Tensor]:
        """Bd with the matrix of :meth:`curvature`.

        Raises:
            RuntimeError: the network does not support forward-mode AD.
        """
        with torch.enable_grad():
            try:
                outputs, tangents = self._jvp(direction)
            except (NotImplementedError, RuntimeError) as error:
                raise RuntimeError(
                    "ConjugateGradient needs forward-mode AD, which this network or its sharding lacks; take another"
                ) from error
            vectors = self._hessian([f.detach() for f in outputs], tangents)
            total = self._weight * sum((f * v).sum() for f, v in zip(outputs, vectors, strict=True))
        products = torch.autograd.grad(torch.as_tensor(total), self.params, allow_unused=True)
        pairs = zip(products, self.params, strict=True)
        result = self.mean_over_ranks([torch.zeros_like(p) if b is None else b for b, p in pairs])
        return [b.add(d, alpha=c) if c else b for c, b, d in zip(self._decay, result, direction, strict=True)]

    # ---- moving the parameters

    @torch.no_grad()
    def remember(self) -> None:
        """Remember the parameters."""
        if self._remembered is None:
            self._remembered = [local_tensor(p).clone() for p in self.params]
        else:
            torch._foreach_copy_(self._remembered, [local_tensor(p) for p in self.params])

    @torch.no_grad()
    def move(self, direction: list[Tensor], length: float) -> None:
        """Set the parameters to the remembered ones plus ``length * direction``."""
        self.restore()
        steps = [local_tensor(d) for d in direction]
        torch._foreach_add_([local_tensor(p) for p in self.params], steps, alpha=length)

    @torch.no_grad()
    def restore(self) -> None:
        """Return to the remembered parameters."""
        assert self._remembered is not None
        torch._foreach_copy_([local_tensor(p) for p in self.params], self._remembered)

    # ---- ranks

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it this rank looks at its own examples only."""
        group, self.group = self.group, None
        try:
            yield
        finally:
            self.group = group

    @torch.no_grad()
    def average_parameters(self) -> None:
        """Replace the parameters by their mean over the ranks, weighted by the number of examples."""
        means = self.mean_over_ranks([p * self._rank_weight for p in self.params])
        torch._foreach_copy_(self.params, means)

    def mean_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Means over the ranks, by one all-reduce for each dtype and device."""
        if self.group is None:
            return tensors
        return mean_over_ranks(tensors, self.group)

    @property
    def _weight(self) -> float:
        return 1.0 if self.group is None else self._rank_weight

    # ---- internals

    def _decayed_square(self, tensors: list[Tensor]) -> float:
        """Sum of decay * |tensor|² over the parameters' tensors."""
        pairs = [(c * x, x) for c, x in zip(self._decay, tensors, strict=True) if c]
        return inner_product(*zip(*pairs, strict=True)) if pairs else 0.0

    def _of_outputs(self, outputs: list[Tensor]) -> Tensor:
        total = outputs[0].new_zeros(())
        for i, (f, z, s) in enumerate(zip(outputs, self.targets, self._slopes, strict=True)):
            distance = 0.5 * (f - z).square() if self._divergence is None else self._divergence(f, z)
            if self._metric is not None:
                distance = distance * self._metric[i]
            total = total + (s * (f - z)).sum().to(total.device) + self._scale * distance.sum().to(total.device)
        return total

    def _hessian(self, outputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """∇²S v in the space of outputs."""
        if self._divergence is None:
            if self._metric is None:
                return [self._scale * v for v in vectors]
            return [self._scale * a * v for v, a in zip(vectors, self._metric, strict=True)]
        with torch.enable_grad():
            points = [f.detach().requires_grad_() for f in outputs]
            slopes = torch.autograd.grad(self._of_outputs(points), points, create_graph=True)
            product = sum((s * v).sum() for s, v in zip(slopes, vectors, strict=True))
            return list(torch.autograd.grad(torch.as_tensor(product), points))

    def _along(self, direction: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and their derivatives along ``direction``, in any way that works."""
        if self.forward_mode:
            try:
                return self._jvp(direction)
            except (NotImplementedError, RuntimeError):
                self.forward_mode = False
        return self._differences(direction)

    @torch.no_grad()
    def _differences(self, direction: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same by central differences; the step balances rounding and truncation."""
        size, length = inner_product(self.params, self.params) ** 0.5, inner_product(direction, direction) ** 0.5
        self.remember()
        sides: list[list[Tensor]] = []
        step = 0.0
        for sign in (0.0, 1.0, -1.0):
            if sign:
                self.move(direction, sign * step)
            found = self._forward()
            if not sign:
                step = torch.finfo(found[0].dtype).eps ** (1 / 3) * (size or 1.0) / (length or 1.0)
            sides.append([f.to(z.dtype) for f, z in zip(found, self.targets, strict=True)])
        self.restore()
        outputs, above, below = sides
        return outputs, [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]

    def _jvp(self, direction: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and their derivatives along ``direction``; parameters become dual numbers in place for a moment."""
        if self._sharded:
            raise NotImplementedError("forward-mode AD of DTensor parameters")
        with forward_ad.dual_level():
            with torch.no_grad():
                for p, d in zip(self.params, direction, strict=True):
                    p.copy_(forward_ad.make_dual(p.detach().clone(), d))
            duals = [forward_ad.unpack_dual(f.to(z.dtype)) for f, z in zip(self._forward(), self.targets, strict=True)]
            tangents = [
                torch.zeros_like(z) if d.tangent is None else d.tangent.detach().clone()
                for d, z in zip(duals, self.targets, strict=True)
            ]
            return [d.primal for d in duals], tangents

    def _sharded_gradient(self, loss: Tensor) -> list[Tensor]:
        """FSDP2 averages gradients over ranks in its own backward hooks, which ``autograd.grad`` would bypass."""
        kept = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for p, g in zip(self.params, kept, strict=True):
            p.grad = g
        return grads
