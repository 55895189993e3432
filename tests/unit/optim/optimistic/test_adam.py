import numpy as np
import pytest
import torch

from lit_methods.optim import OptimisticAdam
from tests.unit.optim.optimistic.online import draws, play

T, D = 40, 5


def test_is_twice_adams_direction_less_the_last():
    g, lr = draws(T, D), 0.05
    adam, _ = play(lambda ps: torch.optim.Adam(ps, lr, betas=(0.5, 0.9)), torch.zeros(D).double(), g)
    direction = adam.diff(dim=0)  # Adam's moments do not depend on where it stands
    last = torch.cat([torch.zeros(1, D), direction[:-1]])
    expected = (2 * direction - last).cumsum(0)
    points, _ = play(lambda ps: OptimisticAdam(ps, lr, betas=(0.5, 0.9)), torch.zeros(D).double(), g)
    torch.testing.assert_close(points[1:], expected, rtol=0, atol=1e-10)


def test_agrees_with_optax():
    """Optax takes the first direction for the one before it: a shift by the first step. (Its own ``optimistic_adam``
    puts the optimism before Adam's moments, which is not the paper's algorithm 1.)
    """
    optax = pytest.importorskip("optax")
    from jax import numpy as jnp

    g = draws(T, D).float()
    adam = optax.scale_by_adam(b1=0.5, b2=0.9, eps=1e-8)
    transform = optax.chain(adam, optax.scale_by_optimistic_gradient(1.0, 1.0), optax.scale(-0.01))
    x, state = jnp.zeros(D), transform.init(jnp.zeros(D))
    trail = []
    for grad in g.numpy():
        updates, state = transform.update(jnp.asarray(grad), state, x)
        x = optax.apply_updates(x, updates)
        trail.append(np.asarray(x))
    points, _ = play(lambda ps: OptimisticAdam(ps, 0.01, betas=(0.5, 0.9)), torch.zeros(D), g)
    shift = points[1].numpy() - trail[0]
    np.testing.assert_allclose(points[1:].numpy() - np.stack(trail), np.tile(shift, (T, 1)), atol=2e-6)
