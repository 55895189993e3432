"""MFAC against oracles written here: the dense inverse, the paper's D/B recurrence, sequential Sherman-Morrison."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from lit_methods.optim import MFAC


def dense_direction(rows: list[Tensor], g: Tensor, m: int, damping: float) -> Tensor:
    G = torch.stack(rows)
    F = damping * torch.eye(len(g), dtype=g.dtype) + G.T @ G / m
    return torch.linalg.solve(F, g)


def sherman_morrison_direction(rows: list[Tensor], g: Tensor, m: int, damping: float) -> Tensor:
    """F⁻¹g by adding one gradient after the other to λI."""
    inverse = torch.eye(len(g), dtype=g.dtype) / damping
    for row in rows:
        v = inverse @ row
        inverse -= torch.outer(v, v) / (m + row @ v)
    return inverse @ g


def recurrence_direction(rows: list[Tensor], g: Tensor, m: int, damping: float) -> Tensor:
    """The paper's dynamic form: D_ij = g_iᵀF_{i-1}⁻¹g_j, F_{i-1}⁻¹g_i = Σ_j B_ij g_j, then the product with g."""
    G = torch.stack(rows)
    K = G @ G.T
    n = len(rows)
    D, B = torch.zeros(n, n, dtype=g.dtype), torch.zeros(n, n, dtype=g.dtype)
    for i in range(n):
        D[i, i:] = K[i, i:] / damping
        B[i, i] = 1 / damping
        for k in range(i):
            D[i, i:] -= D[k, i] * D[k, i:] / (m + D[k, k])
            B[i] -= D[k, i] / (m + D[k, k]) * B[k]
    q = torch.zeros(n, dtype=g.dtype)
    for i in range(n):
        q[i] = rows[i] @ g / damping - sum(D[k, i] * q[k] / (m + D[k, k]) for k in range(i))
    weights = (q / (m + D.diagonal())) @ B
    return g / damping - weights @ G


def official_step(p: Tensor, grad: Tensor, state: dict, *, lr, m, damping, momentum=0.0, weight_decay=0.0) -> Tensor:
    """One step in the authors' order of operations, with the dense inverse."""
    g = grad + weight_decay * p
    state.setdefault("rows", []).append(g)
    del state["rows"][:-m]
    u = dense_direction(state["rows"], g, m, damping)
    if momentum:
        state["v"] = momentum * state.get("v", torch.zeros_like(u)) + (1 - momentum) * u
        u = state["v"]
    return p - lr * u


def flat_param(d: int, dtype=torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(d, dtype=dtype))


def directions(grads: list[Tensor], dtype=None, **kwargs) -> list[Tensor]:
    """The preconditioned directions MFAC takes when fed with ``grads`` (lr=1)."""
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = MFAC([p], lr=1.0, **kwargs)
    result = []
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        result.append(before - p.detach())
    return result


GRADIENTS = {
    "m<d": (5, 12),
    "m=d": (9, 9),
    "m>d": (14, 6),
}


@pytest.mark.parametrize("oracle", [dense_direction, sherman_morrison_direction, recurrence_direction])
@pytest.mark.parametrize("shape", GRADIENTS)
@pytest.mark.parametrize("solver", ["cholesky", "rank2"])
def test_direction_equals_oracle_over_a_wrapping_window(oracle, shape, solver):
    torch.manual_seed(0)
    m, d = GRADIENTS[shape]
    grads = [torch.randn(d, dtype=torch.float64) for _ in range(3 * m)]
    grads[2] = grads[1].clone()  # duplicate
    grads[3] = torch.zeros(d, dtype=torch.float64)
    ours = directions(grads, num_grads=m, damping=1e-2, solver=solver)
    for t, u in enumerate(ours):
        rows = grads[max(0, t + 1 - m) : t + 1]
        torch.testing.assert_close(u, oracle(rows, grads[t], m, 1e-2), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "extra", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.05}], ids=["plain", "momentum", "momentum+wd"]
)
@pytest.mark.parametrize("solver", ["cholesky", "rank2"])
def test_official_update_order(extra, solver):
    torch.manual_seed(1)
    d, m = 11, 8
    A = torch.randn(40, d, dtype=torch.float64)
    p = flat_param(d)
    q = p.detach().clone()
    optimizer = MFAC([p], lr=1e-2, num_grads=m, damping=1e-3, solver=solver, **extra)
    state: dict = {}
    for t in range(25):  # the window wraps three times
        batch = A[(3 * t) % 37 : (3 * t) % 37 + 3]
        optimizer.zero_grad()
        (0.5 * (batch @ p - 1).square().mean()).backward()
        optimizer.step()
        grad = batch.T @ (batch @ q - 1) / 3
        q = official_step(q, grad, state, lr=1e-2, m=m, damping=1e-3, **extra)
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


def test_one_gradient_closed_form():
    g = torch.randn(7, dtype=torch.float64)
    (u,) = directions([g], num_grads=1, damping=0.3)
    torch.testing.assert_close(u, g / (0.3 + g @ g))
    (u,) = directions([g], num_grads=10, damping=0.3)  # nine empty rows: u = m g / (mλ + |g|²)
    torch.testing.assert_close(u, 10 * g / (10 * 0.3 + g @ g))
    (u,) = directions([g], num_grads=10, damping=0.3, window_scale="filled")
    torch.testing.assert_close(u, g / (0.3 + g @ g))


def test_filled_window_divides_by_the_gradients_seen():
    torch.manual_seed(2)
    grads = [torch.randn(5, dtype=torch.float64) for _ in range(12)]
    for t, u in enumerate(directions(grads, num_grads=8, damping=0.1, window_scale="filled")):
        rows = grads[max(0, t - 7) : t + 1]
        torch.testing.assert_close(u, dense_direction(rows, grads[t], len(rows), 0.1))


def test_large_damping_gives_the_sgd_direction():
    torch.manual_seed(3)
    grads = [torch.randn(6, dtype=torch.float64) for _ in range(9)]
    for g, u in zip(grads, directions(grads, num_grads=4, damping=1e9), strict=True):
        torch.testing.assert_close(1e9 * u, g, rtol=1e-7, atol=0)


def test_only_the_last_m_gradients_count_in_any_order():
    torch.manual_seed(4)
    m, d = 6, 10
    old = [100 * torch.randn(d, dtype=torch.float64) for _ in range(5)]
    window = [torch.randn(d, dtype=torch.float64) for _ in range(m - 1)]
    newest = torch.randn(d, dtype=torch.float64)
    reference = directions([*window, newest], num_grads=m, damping=1e-2)[-1]
    shuffled = [window[i] for i in (3, 0, 4, 2, 1)]
    torch.testing.assert_close(directions([*old, *shuffled, newest], num_grads=m, damping=1e-2)[-1], reference)


@pytest.mark.parametrize(("damping", "condition"), [(1e-2, "easy"), (1e-6, "hard")])
def test_both_solvers_agree_over_many_steps(damping, condition):
    torch.manual_seed(5)
    base = torch.randn(30, dtype=torch.float64)
    spread = 1.0 if condition == "easy" else 1e-2
    grads = [base + spread * torch.randn(30, dtype=torch.float64) for _ in range(600)]
    pairs = zip(
        directions(grads, num_grads=64, damping=damping),
        directions(grads, num_grads=64, damping=damping, solver="rank2"),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize(
    ("dtype", "history_dtype", "level"),
    [
        (torch.float32, None, 1e-5),
        (torch.float32, "bfloat16", 1e-2),
        (torch.float32, torch.float16, 2e-3),
        (torch.float64, "float32", 1e-6),
    ],
)
def test_low_precision_error_levels(dtype, history_dtype, level):
    """Relative error of u at λ = 1e-5 against float64; the paper's recurrence in float32 errs by 3e-2 here."""
    torch.manual_seed(6)
    grads = [torch.randn(400, dtype=torch.float64).to(dtype).double() / 20 for _ in range(40)]
    exact = directions(grads, num_grads=32, damping=1e-5)[-1]
    rounded = directions([g.to(dtype) for g in grads], num_grads=32, damping=1e-5, history_dtype=history_dtype)[-1]
    assert (rounded.double() - exact).norm() <= level * exact.norm()


@pytest.mark.parametrize("history_dtype", ["bfloat16", "float16"])
def test_low_precision_fisher_is_that_of_the_stored_rows(history_dtype):
    """Not merely near the unrounded answer: exactly the window form of the rounded gradients."""
    torch.manual_seed(7)
    grads = [torch.randn(50) for _ in range(10)]
    dtype = getattr(torch, history_dtype)
    rounded = [g.to(dtype).double() for g in grads]  # for float16, scaling by powers of two changes nothing here
    u = directions(grads, num_grads=8, damping=1e-4, history_dtype=history_dtype)[-1]
    expected = dense_direction(rounded[-8:], rounded[-1], 8, 1e-4)
    assert (u.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("magnitude", [1e-8, 1.0, 1e6])
def test_float16_history_is_scaled_per_row(magnitude):
    torch.manual_seed(8)
    grads = [magnitude * torch.randn(60) for _ in range(8)]
    damping = 1e-3 * magnitude**2
    exact = directions([g.double() for g in grads], num_grads=8, damping=damping)[-1]
    u = directions(grads, num_grads=8, damping=damping, history_dtype="float16")[-1]
    assert (u.double() - exact).norm() <= 2e-3 * exact.norm()


def test_bfloat16_parameters():
    torch.manual_seed(9)
    p = nn.Parameter(torch.randn(20).bfloat16())
    optimizer = MFAC([p], lr=0.1, num_grads=4, damping=1.0, momentum=0.9)
    for _ in range(6):
        optimizer.zero_grad()
        (p * p).sum().backward()
        optimizer.step()
    window = optimizer.state["mfac"]
    assert window["history"].dtype == torch.bfloat16
    assert window["gram"].dtype == torch.float64
    assert window["momentum_buffer"].dtype == torch.float32
    assert p.dtype == torch.bfloat16
    assert p.isfinite().all()


def test_near_duplicate_large_float32_gradients_stay_finite():
    """Far below the noise of the float32 Gram matrix: without the per-row damping this system is not definite."""
    torch.manual_seed(10)
    base = 1e3 * torch.randn(1000)
    grads = [base * (1 + 1e-6 * torch.randn(1000)) for _ in range(80)]
    for solver in ("cholesky", "rank2"):
        for g, u in zip(grads, directions(grads, num_grads=64, damping=1e-8, solver=solver), strict=True):
            assert u.isfinite().all()
            assert u @ g > 0  # a descent direction


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("solver", ["cholesky", "rank2"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("history_dtype", [None, "float16"])
def test_rejected_gradient_leaves_everything_as_it_was(bad, solver, decoupled, history_dtype):
    """A run with bad gradients thrown in equals, bit for bit, the run without them. 1e30 overflows the norm only."""
    torch.manual_seed(11)
    grads = [torch.randn(8) for _ in range(12)]

    def run(insert: bool) -> tuple[Tensor, dict]:
        p = nn.Parameter(torch.ones(8))
        optimizer = MFAC(
            [p], lr=0.1, momentum=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled, num_grads=4, damping=0.1,
            solver=solver, history_dtype=history_dtype,
        )  # fmt: skip
        for t, g in enumerate(grads):
            if insert and t in (0, 3, 9):
                p.grad = torch.randn(8).index_fill(0, torch.tensor([2]), bad)
                before = p.detach().clone()
                optimizer.step()
                assert torch.equal(before, p.detach())
            p.grad = g.clone()
            optimizer.step()
        return p.detach(), optimizer.state["mfac"]

    if solver == "rank2":  # refactored a step or two earlier, so equal to rounding
        torch.testing.assert_close(run(True)[0], run(False)[0], rtol=1e-6, atol=1e-6)
        return
    (p, window), (q, expected) = run(True), run(False)
    assert torch.equal(p, q)
    assert all(torch.equal(window[key], expected[key]) for key in expected)


def test_decoupled_decay_shrinks_parameters_and_stays_out_of_the_window():
    p = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    optimizer = MFAC([p], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True, num_grads=3, damping=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 2.0 * (1 - 0.1 * 0.5), dtype=torch.float64))
    assert optimizer.state["mfac"]["history"].count_nonzero() == 0


def test_groups_share_one_fisher_with_their_own_settings():
    torch.manual_seed(12)
    a, b = flat_param(4), flat_param(3)
    start_a, start_b = a.detach().clone(), b.detach().clone()
    optimizer = MFAC(
        [{"params": [a]}, {"params": [b], "lr": 0.5, "weight_decay": 0.2}], lr=0.1, num_grads=5, damping=0.1
    )
    a.grad, b.grad = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    g = torch.cat([a.grad, b.grad + 0.2 * start_b])
    optimizer.step()
    u = dense_direction([g], g, 5, 0.1)
    torch.testing.assert_close(a.detach(), start_a - 0.1 * u[:4])
    torch.testing.assert_close(b.detach(), start_b - 0.5 * u[4:])
    with pytest.raises(ValueError, match="damping is shared by all parameter groups"):
        MFAC([{"params": [a]}, {"params": [b], "damping": 1.0}])


def test_missing_gradients_are_zeros_and_shift_nothing():
    torch.manual_seed(13)
    a, b, c = flat_param(3), flat_param(2), flat_param(4)
    kept = b.detach().clone()
    optimizer = MFAC([a, b, c], lr=0.1, num_grads=4, damping=0.1)
    optimizer.step()  # nobody has a gradient: nothing happens
    assert "mfac" not in optimizer.state
    a.grad, c.grad = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(optimizer.state["mfac"]["history"][0], torch.cat([a.grad, torch.zeros(2).double(), c.grad]))
    assert torch.equal(b.detach(), kept)


def test_a_group_without_gradients_or_parameters():
    a, b = flat_param(3), flat_param(2)
    before = b.detach().clone()
    optimizer = MFAC([{"params": [a]}, {"params": [b]}, {"params": []}], num_grads=4)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b.detach(), before)


def test_added_group_grows_the_window_by_zero_columns():
    torch.manual_seed(14)
    a, b = flat_param(4), flat_param(3)
    optimizer = MFAC([a], lr=0.1, num_grads=5, damping=0.1, momentum=0.9)
    rows = []
    for _ in range(3):
        a.grad = torch.randn(4, dtype=torch.float64)
        rows.append(torch.cat([a.grad, torch.zeros(3).double()]))
        optimizer.step()
    optimizer.add_param_group({"params": [b], "momentum": 0.0})
    a.grad, b.grad = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    rows.append(torch.cat([a.grad, b.grad]))
    before = b.detach().clone()
    optimizer.step()
    u = dense_direction(rows, rows[-1], 5, 0.1)
    torch.testing.assert_close(b.detach(), before - 0.1 * u[4:])


@pytest.mark.parametrize("decoupled", [False, True])
def test_zero_lr_and_zero_gradient_change_nothing(decoupled):
    """The protocol of torch.distributed.checkpoint: lr=0, zero gradients, step(closure=None), then load."""
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    optimizer = MFAC([p], lr=0.0, momentum=0.9, weight_decay=0.1, decoupled_weight_decay=decoupled, num_grads=3)
    p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert torch.equal(p.detach(), before)
    assert {"history", "gram", "row_scale", "index", "count", "momentum_buffer"} == set(optimizer.state["mfac"])


def test_maximize_is_descent_on_the_negated_loss():
    torch.manual_seed(15)
    start = torch.randn(6, dtype=torch.float64)

    def run(sign: float, maximize: bool) -> Tensor:
        p = nn.Parameter(start.clone())
        optimizer = MFAC([p], lr=0.1, num_grads=4, damping=0.1, weight_decay=0.1, maximize=maximize)
        for _ in range(6):
            optimizer.zero_grad()
            (sign * (p - 1).square().sum()).backward()
            optimizer.step()
        return p.detach()

    assert torch.equal(run(1.0, False), run(-1.0, True))


def make_net(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(16)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        net[0].weight[:, 1] = 0.0
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 6, generator=generator).to(dtype)

        def closure(x=x) -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x[:, :2].sin()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_closure_and_foreach(foreach):
    net, reference = make_net(), make_net()
    optimizer = MFAC(net.parameters(), lr=0.01, num_grads=4, damping=0.1, weight_decay=0.1, foreach=foreach)
    expected = MFAC(reference.parameters(), lr=0.01, num_grads=4, damping=0.1, weight_decay=0.1)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(1, 6)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == make_net()(torch.ones(1, 6)).square().sum()
    assert calls == [True]
    expected.zero_grad()
    reference(torch.ones(1, 6)).square().sum().backward()
    expected.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "rank2": {"solver": "rank2"},
    "filled": {"window_scale": "filled"},
    "bfloat16": {"history_dtype": "bfloat16"},
    "float16": {"history_dtype": "float16", "momentum": 0.5},
    "on host": {"history_device": "cpu", "momentum": 0.9},
    "zeros excluded": {"exclude_zero_weights": True, "momentum": 0.9},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bitwise(variant, dtype):
    """12 steps = 7 steps, file, fresh objects, 5 steps; the window (5 rows) wraps on both sides of the cut."""
    options = {"lr": 1e-2, "num_grads": 5, "damping": 1e-2, **VARIANTS[variant]}
    net = make_net(dtype)
    optimizer = MFAC(net.parameters(), **options)
    train(net, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(7, 12))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_net(dtype)
    other.load_state_dict(saved["net"])
    resumed = MFAC(other.parameters(), **options)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(7, 12))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    state, resumed_state = optimizer.state_dict()["state"]["mfac"], resumed.state_dict()["state"]["mfac"]
    assert set(state) == set(resumed_state)
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed_state[key])), key
        assert torch.as_tensor(value).dtype == torch.as_tensor(resumed_state[key]).dtype


def test_loaded_state_is_a_copy():
    net, other = make_net(), make_net()
    optimizer = MFAC(net.parameters(), num_grads=3)
    train(net, optimizer, range(2))
    resumed = MFAC(other.parameters(), num_grads=3)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(net.state_dict())
    train(net, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_decides_the_window_length_and_size_must_match():
    net = make_net()
    optimizer = MFAC(net.parameters(), num_grads=3, damping=0.5)
    train(net, optimizer, range(2))
    longer = MFAC(make_net().parameters(), num_grads=7)
    longer.load_state_dict(optimizer.state_dict())
    train(net, longer, range(2))
    assert len(longer.state["mfac"]["history"]) == 3
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match=r"74 coordinates, the parameters have 6"):
        MFAC(nn.Linear(2, 2).parameters()).load_state_dict(saved)


def test_pickle_and_deepcopy_keep_everything():
    net = make_net()
    optimizer = MFAC(net.parameters(), lr=1e-2, num_grads=4, damping=1e-2, history_dtype="bfloat16", momentum=0.9)
    train(net, optimizer, range(6))
    for clone_net, clone in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        original_net, original = copy.deepcopy((net, optimizer))
        train(original_net, original, range(6, 9))
        train(clone_net, clone, range(6, 9))
        for p, q in zip(original_net.parameters(), clone_net.parameters(), strict=True):
            assert torch.equal(p, q)
        assert clone.state["mfac"]["history"].dtype == torch.bfloat16


def test_lr_scheduler_tensor_lr_named_parameters_and_repr():
    net, reference = make_net(), make_net()
    optimizer = MFAC(net.named_parameters(), lr=torch.tensor(0.1), num_grads=4, damping=0.1)
    expected = MFAC(reference.parameters(), lr=0.1, num_grads=4, damping=0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, expected)]
    for t in range(3):
        train(net, optimizer, range(t, t + 1))
        train(reference, expected, range(t, t + 1))
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert "num_grads: 4" in repr(optimizer)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_noncontiguous_parameters():
    torch.manual_seed(17)
    weight = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    p = nn.Parameter(weight.to(memory_format=torch.channels_last))
    q = nn.Parameter(weight.clone())
    for param in (p, q):
        optimizer = MFAC([param], lr=0.1, num_grads=3, damping=0.1)
        for t in range(4):
            param.grad = torch.cos(weight * t).to(memory_format=torch.preserve_format).clone()
            if param is p:
                param.grad = param.grad.to(memory_format=torch.channels_last)
            optimizer.step()
    assert torch.equal(p.detach().contiguous(), q.detach())


def test_grad_scaler_and_autocast():
    """Unscaled gradients reach the window; on overflow the scaler leaves the step out."""
    net, reference = make_net(), make_net()
    optimizer, expected = (MFAC(n.parameters(), lr=1e-2, num_grads=4, damping=1e-2) for n in (net, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(6):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        for n, o in ((net, optimizer), (reference, expected)):
            o.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = (n(x) - x[:, :2].sin()).float().square().mean()
            if n is reference:
                if t != 3:
                    loss.backward()
                    o.step()
                continue
            scaler.scale(loss).backward()
            if t == 3:
                next(net.parameters()).grad[0, 0] = math.inf
            scaler.step(o)
            scaler.update()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.state["mfac"]["count"] == 5


@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_excluded_zero_weights_are_frozen_and_not_stored(extra):
    torch.manual_seed(18)
    p, kept = nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0]).double()), [0, 2, 4]
    q = nn.Parameter(p.detach()[kept].clone())
    options = {"lr": 0.1, "num_grads": 3, "damping": 0.1, "momentum": 0.5, **extra}
    optimizer, dense = MFAC([p], exclude_zero_weights=True, **options), MFAC([q], **options)
    for _ in range(5):
        p.grad = torch.randn(5, dtype=torch.float64)
        q.grad = p.grad[kept].clone()
        optimizer.step()
        dense.step()
    assert optimizer.state["mfac"]["history"].shape == (3, 3)
    assert p[1] == p[3] == 0.0
    torch.testing.assert_close(p.detach()[kept], q.detach())

    added = nn.Parameter(torch.tensor([0.0, 1.0]).double())  # its zero is excluded too
    optimizer.add_param_group({"params": [added]})
    p.grad, added.grad = torch.randn(5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state["mfac"]["history"].shape == (3, 4)
    assert added[0] == 0.0
    assert added[1] != 1.0

    for exclude in (True, False):  # the checkpoint decides what is excluded
        r = nn.Parameter(torch.full((5,), 7.0).double())
        resumed = MFAC([{"params": [r]}, {"params": [nn.Parameter(added.detach())]}], exclude_zero_weights=exclude)
        resumed.load_state_dict(optimizer.state_dict())
        resumed.param_groups[0]["weight_decay"] = 0.0
        r.grad = torch.ones(5, dtype=torch.float64)
        resumed.step()
        assert torch.equal(r == 7.0, torch.tensor([False, True, False, True, False]))
    full = MFAC([nn.Parameter(torch.ones(5))])
    full.param_groups[0]["params"][0].grad = torch.ones(5)
    full.step()
    excluding = MFAC([nn.Parameter(torch.zeros(5))], exclude_zero_weights=True)
    excluding.load_state_dict(full.state_dict())
    excluding.param_groups[0]["params"][0].grad = torch.ones(5)
    excluding.step()
    assert excluding.state["mfac"]["history"].shape[1] == 5


def test_host_window_stays_when_lightning_moves_states():
    """Lightning moves every tensor in ``optimizer.state`` after loading; "meta" stands in for an accelerator."""
    from lightning.fabric.utilities.optimizer import _optimizer_to_device

    for options, device in (({"history_device": "cpu"}, "cpu"), ({}, "meta")):
        net = make_net()
        optimizer = MFAC(net.parameters(), num_grads=3, **options)
        train(net, optimizer, range(2))
        _optimizer_to_device(optimizer, torch.device("meta"))
        assert optimizer.state_dict()["state"]["mfac"]["history"].device.type == device


def test_without_saved_history_the_window_restarts():
    net = make_net()
    optimizer = MFAC(net.parameters(), num_grads=3, momentum=0.9, save_history=False)
    train(net, optimizer, range(5))
    saved = optimizer.state_dict()
    assert set(saved["state"]["mfac"]) == {"momentum_buffer"}
    resumed = MFAC(net.parameters(), num_grads=3, momentum=0.9, save_history=False)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state["mfac"]["momentum_buffer"], optimizer.state["mfac"]["momentum_buffer"])
    train(net, resumed, range(5, 6))
    assert resumed.state["mfac"]["count"] == 1


def test_too_large_a_window_is_refused_with_its_size_and_the_cures(monkeypatch):
    monkeypatch.setattr("lit_methods.optim.mfac.optimizer.free_bytes", lambda device: 10_000)
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.ones(1000)
    with pytest.raises(
        MemoryError, match=r"4096000 bytes .* 10000 are free; lower num_grads, or use .*bfloat16.*cpu.*shard"
    ):
        MFAC([p]).step()
    MFAC([p], num_grads=2).step()


def test_free_memory_is_known_here():
    from lit_methods.optim.mfac.optimizer import free_bytes

    assert (free_bytes(torch.device("cpu")) or 2**40) > 2**20
    assert free_bytes(torch.device("meta")) is None


def test_momentum_switched_on_by_a_scheduler():
    net = make_net()
    optimizer = MFAC(net.parameters(), lr=1e-2, num_grads=3)
    train(net, optimizer, range(2))
    assert "momentum_buffer" not in optimizer.state["mfac"]
    optimizer.param_groups[0]["momentum"] = 0.9
    train(net, optimizer, range(2, 4))
    assert optimizer.state["mfac"]["momentum_buffer"].count_nonzero() > 0


@pytest.mark.parametrize("solver", ["cholesky", "rank2"])
def test_damping_may_change_during_training(solver):
    torch.manual_seed(19)
    p = flat_param(6)
    optimizer = MFAC([p], lr=1.0, num_grads=4, damping=1.0, solver=solver)
    rows = []
    for t in range(6):
        optimizer.param_groups[0]["damping"] = damping = 0.1 * (t + 1)
        rows.append(torch.randn(6, dtype=torch.float64))
        p.grad = rows[-1].clone()
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), dense_direction(rows[-4:], rows[-1], 4, damping))


@pytest.mark.parametrize("sizes", [(2**15 + 100, 3), (70_000, 2)])
@pytest.mark.parametrize("history_dtype", [None, "bfloat16"])
def test_windows_wider_than_a_chunk(sizes, history_dtype):
    """The two passes run over column chunks; here there are several."""
    torch.manual_seed(20)
    d, m = sizes
    grads = [torch.randn(d).bfloat16().float() for _ in range(m)]
    u = directions(grads, num_grads=m, damping=1.0, history_dtype=history_dtype)[-1]
    G = torch.stack(grads).double()
    weights = torch.linalg.solve(m * torch.eye(m).double() + G @ G.T, torch.eye(m).double()[-1])
    torch.testing.assert_close(u.double(), m * weights @ G, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0 and finite, got -1"),
        ({"lr": torch.ones(2)}, "one-element tensor"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0 and finite, got -0.1"),
        ({"num_grads": 0}, "num_grads must be >= 1, got 0"),
        ({"damping": 0.0}, "damping must be > 0 and finite, got 0"),
        ({"damping": math.nan}, "damping must be > 0 and finite, got nan"),
        ({"history_dtype": "int8"}, "history_dtype must be None or one of"),
        ({"window_scale": "half"}, "window_scale must be 'full' or 'filled', got 'half'"),
        ({"solver": "lu"}, "solver must be 'cholesky' or 'rank2', got 'lu'"),
        ({"solver": "rank2", "window_scale": "filled"}, "needs window_scale='full'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFAC([nn.Parameter(torch.zeros(2))], **arguments)


def test_bad_parameters_and_gradients():
    with pytest.raises(ValueError, match="params must be real floating point"):
        MFAC([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = MFAC([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="weight_decay must be >= 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": -1.0})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = MFAC(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients; build the embedding with sparse=False"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_agrees_with_cpu_without_host_synchronisation(variant):
    options = {"lr": 1e-2, "num_grads": 5, "damping": 1e-2, **VARIANTS[variant]}
    net = make_net(torch.float64)
    device_net = copy.deepcopy(net).cuda()
    optimizer, device_optimizer = MFAC(net.parameters(), **options), MFAC(device_net.parameters(), **options)
    for t in range(12):
        torch.manual_seed(t)
        for p, q in zip(net.parameters(), device_net.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        if t == 6:
            next(net.parameters()).grad.fill_(math.nan)
            next(device_net.parameters()).grad.fill_(math.nan)
        optimizer.step()
        free = t and "history_device" not in options  # the first step allocates
        torch.cuda.set_sync_debug_mode("error" if free else "default")
        try:
            device_optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(net.parameters(), device_net.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-6, atol=1e-8)


def test_says_once_that_it_skips():
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], lr=0.1, num_grads=2, damping=0.1)
    p.grad = torch.full((3,), math.nan)
    with pytest.warns(RuntimeWarning, match="MFAC skipped a step: the loss or its gradient is not finite"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["params"][0].grad = p.grad.clone()
    with pytest.warns(RuntimeWarning, match="MFAC skipped"):
        other.step()
