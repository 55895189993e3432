"""The loop over time and its backward pass, written by hand: the hot part of PV-RNN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Recurrence(torch.autograd.Function):
    """``T`` steps of the network, driven by the posterior.

    A step is ``gates = d weight^T + bias``. With the adaptive vectors added, its last columns are ``log sigma_q``,
    ``mu_q`` and ``mu_p`` (both before ``tanh``) and ``log sigma_p``; then ``z = mu_q + sigma_q eps``,
    ``h += rate (gates[:D] + z latent^T - h)``, ``d = tanh(h)``. Two matrix products a step forward and two backward;
    those that give the weights' gradients are done once, after the loop.

    Inputs: state ``h`` (B, D), adaptive vectors (T, B, 2Z) in the order of the gates, noise (T, B, Z), weight
    (D + 4Z, D), bias (D + 4Z,), latent (D, Z), rate (D,), and the bounds of ``log sigma`` or ``None``.

    Outputs: ``h`` (T, B, D), ``d = tanh(h)`` (T, B, D), and ``log sigma_q, mu_q, mu_p, log sigma_p`` (T, B, 4Z).
    """

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        adaptive: Tensor,
        eps: Tensor,
        weight: Tensor,
        bias: Tensor,
        latent: Tensor,
        rate: Tensor,
        bounds: Sequence[float] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the loop."""
        steps, batch, units = eps.shape
        width = state.shape[1]
        h = state.new_empty(steps + 1, batch, width)
        d = torch.empty_like(h)
        gates = state.new_empty(steps, batch, width + 4 * units)
        z, sigma = eps.new_empty(eps.shape), eps.new_empty(eps.shape)
        h[0] = state
        torch.tanh(state, out=d[0])
        heads = gates[..., width:]
        inside = None if bounds is None else torch.ones_like(heads)
        views = (
            *(gates, gates[..., :width], heads[..., : 2 * units], heads[..., units : 3 * units], heads[..., :units]),
            *(heads[..., units : 2 * units], h[:-1], d[:-1], adaptive, eps, z, sigma, h[1:], d[1:]),
        )
        weight_t, latent_t = weight.t(), latent.t()
        per_step = zip(*(view.unbind(0) for view in views), strict=True)
        for t, (g, drive, q, mu, log_sigma, mu_q, h_t, d_t, a, e, z_t, s, h_next, d_next) in enumerate(per_step):
            torch.addmm(bias, d_t, weight_t, out=g)
            q.add_(a)
            if bounds is not None and inside is not None:
                for part in (slice(units), slice(3 * units, None)):
                    clamped = heads[t, :, part].clamp(*bounds)
                    inside[t, :, part] = clamped == heads[t, :, part]
                    heads[t, :, part] = clamped
            mu.tanh_()
            torch.exp(log_sigma, out=s)
            torch.addcmul(mu_q, s, e, out=z_t)
            drive.addmm_(z_t, latent_t)
            torch.lerp(h_t, drive, rate, out=h_next)
            torch.tanh(h_next, out=d_next)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, heads, z, sigma, eps, weight, latent, rate, inside)
        return h[1:], d[1:], heads

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_d: Tensor | None, grad_heads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Run it backward."""
        d, heads, z, sigma, eps, weight, latent, rate, inside = ctx.saved_tensors
        steps, batch, units = z.shape
        width = d.shape[2]
        means = heads[..., units : 3 * units]
        through = torch.cat([sigma * eps, 1 - means[..., :units].square()], 2)  # from z to log sigma_q and mu_q
        grads = d.new_empty(steps, batch, width + 4 * units)
        direct = grads[..., width:]
        direct.zero_() if grad_heads is None else direct.copy_(grad_heads)
        direct[..., units : 3 * units] *= 1 - means * means
        if inside is not None:
            direct *= inside
            through *= inside[..., : 2 * units]
        latent_twice = torch.cat([latent, latent], 1)
        grad_z = z.new_empty(batch, 2 * units)
        carried, leak, total, square = (d.new_zeros(batch, width) for _ in range(4))  # carried: of d; leak: of h
        parts = (grads, grads[..., :width], grads[..., width : width + 2 * units], through, d[1:])
        for t, (g, drive, q, factor, d_t) in reversed(list(enumerate(zip(*(x.unbind(0) for x in parts), strict=True)))):
            if grad_d is not None:
                carried.add_(grad_d[t])
            if grad_h is not None:
                leak.add_(grad_h[t])
            torch.mul(d_t, d_t, out=square)
            torch.addcmul(carried, carried, square, value=-1, out=total).add_(leak)
            torch.mul(total, rate, out=drive)
            torch.sub(total, drive, out=leak)
            torch.mm(drive, latent_twice, out=grad_z)
            q.addcmul_(grad_z, factor)
            torch.mm(g, weight, out=carried)
        flat = grads.view(steps * batch, -1)
        needs = ctx.needs_input_grad
        return (
            torch.addcmul(leak, carried, 1 - d[0].square()) if needs[0] else None,
            grads[..., width : width + 2 * units] if needs[1] else None,
            None,
            flat.t() @ d[:-1].reshape(steps * batch, width) if needs[3] else None,
            flat.sum(0) if needs[4] else None,
            flat[:, :width].t() @ z.view(steps * batch, units) if needs[5] else None,
            None,
            None,
        )
