"""Exponentiated gradients against closed forms, the authors' traces and other geometries."""

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_methods.optim import (
    AdamWExponentiated,
    ExponentiatedGradient,
    Hypentropy,
    SignConstrainedSGD,
    eg_param_groups,
)

START = [[1.0, -0.5], [2.0, -3.0]]
GRADS = [[[0.5, 1.0], [-1.0, 2.0]], [[-0.25, 0.5], [1.0, 0.0]], [[1.0, -2.0], [0.5, -1.0]]]

# After GRADS in the authors' code (github.com/linclab/EG_optimiser): SGD(lr=0.5, momentum=0.9, weight_decay=0.01,
# update_alg="eg") and AdamWEG(lr=0.1, weight_decay=0.01).
AUTHORS_SGD = [[0.37982297122803066, -1.1149424836822055], [2.27072049669969, -26.590720157708613]]
AUTHORS_ADAMW = [[0.822467458446843, -0.5924040130293772], [2.1377183966429714, -3.597874778285639]]


def parameter(values: object = START, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def run(optimizer: Optimizer, p: nn.Parameter, grads: list[Any]) -> Tensor:
    for grad in grads:
        p.grad = torch.tensor(grad, dtype=p.dtype)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_each_weight_follows_the_written_out_recursion(momentum: float, nesterov: bool, weight_decay: float) -> None:
    nesterov = nesterov and momentum > 0
    p = parameter()
    optimizer = ExponentiatedGradient(
        [p], lr=0.5, momentum=momentum, dampening=0.0, nesterov=nesterov, weight_decay=weight_decay
    )
    moved = run(optimizer, p, GRADS)
    for row in range(2):
        for column in range(2):
            w, average = START[row][column], None
            for grad in GRADS:
                sign = math.copysign(1, w)
                g = grad[row][column] + weight_decay * sign
                average = g if average is None else momentum * average + g
                direction = g + momentum * average if nesterov else (average if momentum else g)
                w *= math.exp(-0.5 * sign * direction)
            assert float(moved[row, column]) == pytest.approx(w, rel=1e-14)


def test_traces_are_the_authors() -> None:
    p, q = parameter(), parameter()
    sgd = run(ExponentiatedGradient([p], lr=0.5, momentum=0.9, weight_decay=0.01), p, GRADS)
    torch.testing.assert_close(sgd, torch.tensor(AUTHORS_SGD, dtype=torch.float64), rtol=1e-15, atol=0)
    adamw = run(AdamWExponentiated([q], lr=0.1, weight_decay=0.01), q, GRADS)
    torch.testing.assert_close(adamw, torch.tensor(AUTHORS_ADAMW, dtype=torch.float64), rtol=1e-14, atol=0)


def test_momentum_matters_from_the_second_step() -> None:
    traces = []
    for momentum in (0.0, 0.9):
        p = parameter()
        optimizer = ExponentiatedGradient([p], lr=0.5, momentum=momentum)
        traces.append([run(optimizer, p, [grad]).clone() for grad in GRADS[:2]])
    torch.testing.assert_close(traces[0][0], traces[1][0], rtol=0, atol=0)
    assert not torch.isclose(traces[0][1], traces[1][1]).any()


def test_weight_decay_is_a_factor() -> None:
    p = parameter()
    run(ExponentiatedGradient([p], lr=0.5, weight_decay=0.2), p, [[[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(p.detach(), torch.tensor(START, dtype=torch.float64) * math.exp(-0.1))


def test_small_steps_are_gradient_steps_scaled_by_the_weight() -> None:
    for lr in (1e-2, 1e-3):
        p = parameter()
        start, grad = p.detach().clone(), torch.tensor(GRADS[0], dtype=torch.float64)
        moved = run(ExponentiatedGradient([p], lr=lr), p, GRADS[:1])
        error = (moved - (start - lr * start.abs() * grad)).abs().max()
        assert 0 < error < 10 * lr**2


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_moves_the_logarithm_as_adamw_moves_a_parameter(amsgrad: bool) -> None:
    p, log = parameter([1.0, -0.5]), parameter([0.0, 0.0])
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    ours = AdamWExponentiated([p], lr=0.1, weight_decay=0.0, amsgrad=amsgrad)
    theirs = torch.optim.AdamW([log], lr=0.1, weight_decay=0.0, amsgrad=amsgrad)
    for grad in ([3.0, 1.0], [-1.0, 0.5], [0.1, -2.0]):
        run(ours, p, [grad])
        run(theirs, log, [(torch.tensor(grad, dtype=torch.float64) * signs).tolist()])
    torch.testing.assert_close(p.detach().abs().log(), log.detach() + torch.tensor([0.0, math.log(0.5)]))


def test_adamw_decays_apart_from_the_gradient() -> None:
    p = parameter([2.0])
    run(AdamWExponentiated([p], lr=0.1, weight_decay=0.5), p, [[0.0], [0.0]])
    assert float(p.detach()) == pytest.approx(2 * 0.95**2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda ps: ExponentiatedGradient(ps, 0.1, 0.9, weight_decay=0.1, algorithm="gd", on_zero="raise"),
         lambda ps: torch.optim.SGD(ps, 0.1, 0.9, weight_decay=0.1)),
        (lambda ps: AdamWExponentiated(ps, 0.1, algorithm="gd"), lambda ps: torch.optim.AdamW(ps, 0.1)),
    ],
)  # fmt: skip
def test_gd_groups_are_those_of_torch(ours, theirs) -> None:
    p, q = parameter([1.0, 0.0, -1.0]), parameter([1.0, 0.0, -1.0])
    grads = [[0.5, 1.0, -1.0], [1.0, -1.0, 0.1]]
    torch.testing.assert_close(run(ours([p]), p, grads), run(theirs([q]), q, grads))


def test_sign_constrained_sgd_is_sgd_until_a_weight_would_cross_zero() -> None:
    p, q = parameter([3.0, -3.0]), parameter([3.0, -3.0])
    grads = [[0.5, 1.0], [1.0, -1.0]]
    ours = run(SignConstrainedSGD([p], 0.1, 0.9, weight_decay=0.1), p, grads)
    torch.testing.assert_close(ours, run(torch.optim.SGD([q], 0.1, 0.9, weight_decay=0.1), q, grads))
    p = parameter([1.0, -1.0, 1.0, 0.0], torch.float32)
    run(SignConstrainedSGD([p], 1.0), p, [[5.0, -5.0, 1.0, 1.0]])  # crosses, crosses, lands on zero, has no sign
    assert p.tolist() == pytest.approx([1e-18, -1e-18, 1e-18, 0.0], rel=1e-6, abs=0)
    run(SignConstrainedSGD([p], 1.0), p, [[-1.0, 1.0, 1.0, 0.0]])  # they leave the boundary on their own side
    assert p.tolist() == pytest.approx([1.0, -1.0, 1e-18, 0.0], rel=1e-6, abs=0)


def test_signs_stay_where_sgd_flips_them() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    flips = {}
    for name, make in {
        "eg": lambda ps: ExponentiatedGradient(ps, 0.5, 0.9),
        "adamw": lambda ps: AdamWExponentiated(ps, 0.1),
        "constrained": lambda ps: SignConstrainedSGD(ps, 0.1, 0.9),
        "sgd": lambda ps: torch.optim.SGD(ps, 0.1, 0.9),
    }.items():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False))
        before = copy.deepcopy(net)
        optimizer = make(net.parameters())
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        flips[name] = sum(
            int((p.sign() != q.sign()).sum()) for p, q in zip(net.parameters(), before.parameters(), strict=True)
        )
    assert flips.pop("sgd") > 0
    assert set(flips.values()) == {0}


@pytest.mark.parametrize("b", [1e-3, 0.3, 10.0])
def test_hypentropy_is_its_mirror_map_and_leaves_zero(b: float) -> None:
    start, grad = [0.0, 1e-4, -0.5, 2.0], [0.3, -0.7, 1.0, -0.2]
    p, mirror = parameter(start), Hypentropy(b)
    expected = mirror.point(mirror.coordinates(p.detach()) - 0.5 * torch.tensor(grad, dtype=torch.float64))
    moved = run(ExponentiatedGradient([p], lr=0.5, hypentropy=b, on_zero="raise"), p, [grad])
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-15)
    assert moved[0] != 0


def test_hypentropy_decays_by_a_factor() -> None:
    p = parameter([0.0, 1.0, -2.0])
    run(ExponentiatedGradient([p], lr=1e-3, hypentropy=0.5, weight_decay=1.0), p, [[0.0, 0.0, 0.0]])
    torch.testing.assert_close(p.detach(), parameter([0.0, 1.0, -2.0]).detach() * (1 - 1e-3), rtol=1e-6, atol=0)


def test_max_log_step_bounds_the_exponent_before_it_is_taken() -> None:
    for cls in (ExponentiatedGradient, AdamWExponentiated):
        p = parameter([1.0, -1.0], torch.float32)
        run(cls([p], lr=200.0, max_log_step=0.5, weight_decay=0.0), p, [[1e10, 1e10]])
        torch.testing.assert_close(p.detach(), torch.tensor([math.exp(-0.5), -math.exp(0.5)]))
    p = parameter([1.0], torch.float32)
    run(ExponentiatedGradient([p], lr=1.0), p, [[105.0], [-1000.0]])
    assert p.item() == 0, "without the bound a weight dies, for ever"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_steps_with_gradients_that_are_not_finite_are_skipped_by_name(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = copy.deepcopy(model.state_dict())
    optimizer = ExponentiatedGradient(eg_param_groups(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = bad
    with pytest.warns(RuntimeWarning, match=r"skipped a step: the gradient of 1\.weight is not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unnamed = ExponentiatedGradient(model.parameters())
    with pytest.warns(RuntimeWarning, match="parameter 2 of its group"):
        unnamed.step()
    ExponentiatedGradient(model.parameters(), skip_nonfinite=False).step()


def test_large_finite_gradients_are_no_error() -> None:
    p = parameter([1.0, -1.0], torch.float32)
    run(ExponentiatedGradient([p], lr=1e-38), p, [[1e38, 1e38]])
    torch.testing.assert_close(p.detach(), torch.tensor([math.exp(-1), -math.exp(1)]))


def test_zeros_are_reported_with_the_cure() -> None:
    norm = nn.LayerNorm(4)
    with pytest.warns(UserWarning, match=r"bias holds 4 zeros, which ExponentiatedGradient never moves: .*eg_param_gr"):
        ExponentiatedGradient(norm.named_parameters())
    with pytest.raises(ValueError, match="on_zero is 'raise': parameter 1 of its group holds 4 zeros"):
        AdamWExponentiated(norm.parameters(), on_zero="raise")
    for quiet in ({"on_zero": "ignore"}, {"hypentropy": 0.1}, {"algorithm": "gd"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ExponentiatedGradient(norm.parameters(), **quiet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_move_by_steps_below_their_resolution(dtype: torch.dtype) -> None:
    p = parameter([1.0], dtype)
    optimizer = ExponentiatedGradient([p], lr=6e-4)
    run(optimizer, p, [[1.0]] * 100)
    assert p.item() == pytest.approx(0.94140625 if dtype == torch.bfloat16 else math.exp(-0.06), rel=1e-3)
    p.data.fill_(2.0)  # somebody else's change of the weights wins over the copy
    run(optimizer, p, [[1.0]] * 100)
    assert p.item() == pytest.approx(2 * math.exp(-0.06), rel=4e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: ExponentiatedGradient(ps, 6e-4, 0.9),
        lambda ps: AdamWExponentiated(ps, 6e-4, amsgrad=True),
        lambda ps: SignConstrainedSGD(ps, 6e-4, 0.9),
    ],
)
def test_narrow_weights_resume_bit_for_bit(make) -> None:
    torch.manual_seed(0)
    grads = torch.randn(20, 16).tolist()
    p = nn.Parameter(torch.randn(16).bfloat16())
    optimizer = make([p])
    run(optimizer, p, grads[:10])
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    run(optimizer, p, grads[10:])
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    q = nn.Parameter(saved["p"])
    other = make([q])
    other.load_state_dict(saved["optimizer"])
    run(other, q, grads[10:])
    assert torch.equal(p, q)
    for name, value in other.state[q].items():
        assert not isinstance(value, Tensor) or (
            value.dtype == torch.float32 and torch.equal(value, optimizer.state[p][name])
        )


def test_a_tensor_is_no_learning_rate() -> None:
    for make in (ExponentiatedGradient, AdamWExponentiated, SignConstrainedSGD):
        with pytest.raises(ValueError, match="lr must be a number, not a tensor"):
            make([parameter()], torch.tensor(0.1))


def test_compiled_steps_are_the_same() -> None:
    p, q = parameter(), parameter()
    ours, compiled = (
        ExponentiatedGradient([p], 0.5, 0.9),
        ExponentiatedGradient([q], 0.5, 0.9, skip_nonfinite=False),
    )
    step = torch.compile(compiled.step, backend="eager")
    for grad in GRADS:
        run(ours, p, [grad])
        q.grad = torch.tensor(grad, dtype=q.dtype)
        step()
    torch.testing.assert_close(p, q, rtol=0, atol=0)
