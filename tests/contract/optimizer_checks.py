"""What every optimizer promises. Each check takes a case and raises when the promise is broken."""

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.contract.cases.kinds import OptimizerCase
from tests.contract.compare import assert_same
from tests.contract.pieces import real_arguments
from tests.distributed.launch import run_ranks

STEPS = 13  # more than the window of any history-based optimizer's case, so that windows wrap


def check_decreases_a_quadratic(case: OptimizerCase) -> None:
    model = nn.Linear(1, 10, bias=False)
    model.weight = nn.Parameter(torch.linspace(1, 2, 10)[:, None])
    curvature = torch.linspace(0.1, 1, 10)
    optimizer = case.make(model.parameters(), model)
    losses = _train(optimizer, lambda: 0.5 * (curvature * model(torch.ones(1, 1)) ** 2).sum(), 100)
    assert losses[-1] < 0.7 * losses[0], f"loss went from {losses[0]:.3g} to {losses[-1]:.3g} in 100 steps"


def check_decreases_a_small_mlp_loss(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    losses = _train(case.make(model.parameters(), model), loss, 100)
    assert losses[-1] < 0.8 * losses[0], f"loss went from {losses[0]:.3g} to {losses[-1]:.3g} in 100 steps"


def check_resumes_bit_exactly(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model.parameters(), model)
    _train(optimizer, loss, STEPS)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    _train(optimizer, loss, STEPS)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other_model, other_loss = _mlp_problem()
    other = case.make(other_model.parameters(), other_model)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    _train(other, other_loss, STEPS)
    assert_same(other_model.state_dict(), model.state_dict(), "parameters")
    assert_same(other.state_dict(), optimizer.state_dict(), "optimizer state")


def check_keeps_learning_rates_of_groups_apart(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    first, last = model[0], model[-1]
    optimizer = case.make([{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.0}], model)
    before = copy.deepcopy(model)
    _train(optimizer, loss, 3)
    assert_same(last.state_dict(), before[-1].state_dict(), "group with lr=0")
    assert not torch.equal(first.weight, before[0].weight), "the group with lr > 0 did not move"


def check_follows_a_learning_rate_schedule(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model.parameters(), model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 else 0.0)
    for _ in range(3):
        _train(optimizer, loss, 1)
        schedule.step()
    before = copy.deepcopy(model.state_dict())
    _train(optimizer, loss, 3)
    assert_same(model.state_dict(), before, "parameters under a schedule at zero")


def check_zero_gradients_and_zero_lr_change_nothing(case: OptimizerCase) -> None:
    """The way distributed checkpointing creates state before loading."""
    model, _ = _mlp_problem()
    optimizer = case.make(model.parameters(), model)
    before = copy.deepcopy(model.state_dict())
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    assert_same(model.state_dict(), before, "parameters")
    for group, lr in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = lr


def check_skips_missing_gradients(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    unused = nn.Parameter(torch.ones(3))
    optimizer = case.make([unused, *model.parameters()], model)
    losses = _train(optimizer, loss, STEPS)
    assert torch.equal(unused.detach(), torch.ones(3)), "a parameter without gradient moved"
    assert losses[-1] < losses[0]
    _train(optimizer, lambda: loss() + unused.square().sum(), STEPS)
    assert not torch.equal(unused.detach(), torch.ones(3)), "a parameter whose gradient appears later never moves"


def check_takes_groups_added_during_training(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model[0].parameters(), model)
    _train(optimizer, loss, 3)
    before = copy.deepcopy(model[-1].state_dict())
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    losses = _train(optimizer, loss, STEPS)
    assert not torch.equal(model[-1].weight, before["weight"]), "the added group did not move"
    assert losses[-1] < losses[0]


def check_takes_named_parameters(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model.named_parameters(), model)
    _train(optimizer, loss, 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]


def check_works_in_float64_and_bfloat16(case: OptimizerCase) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model, loss = _mlp_problem(dtype)
        losses = _train(case.make(model.parameters(), model), loss, 30)
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters()), f"{dtype} parameters broke"
        assert losses[-1] < losses[0], f"no progress in {dtype}"


def check_calls_the_closure_the_stated_number_of_times(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model.parameters(), model)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        calls.append(value.detach())
        return value

    returned = optimizer.step(closure)
    assert len(calls) == case.closure_calls, f"closure called {len(calls)} times, stated {case.closure_calls}"
    assert float(returned) == float(calls[0]), "step must return the closure's loss"


def check_maximize_negates_the_loss(case: OptimizerCase) -> None:
    if "maximize" not in inspect.signature(case.optimizer).parameters:
        return
    (up, up_loss), (down, down_loss) = _mlp_problem(), _mlp_problem()
    _train(case.make(up.parameters(), up, maximize=True), lambda: -up_loss(), 3)
    _train(case.make(down.parameters(), down), down_loss, 3)
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def check_survives_deepcopy_and_pickle(case: OptimizerCase) -> None:
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, loss = _mlp_problem()
        optimizer = case.make(model.parameters(), model)
        _train(optimizer, loss, 2)
        other_model, other = duplicate((model, optimizer))
        _train(optimizer, loss, 1)
        _train(other, lambda m=other_model: _mlp_loss(m), 1)
        assert_same(other_model.state_dict(), model.state_dict(), "parameters of the copy")


def check_handles_or_refuses_complex_and_sparse_gradients(case: OptimizerCase) -> None:
    wave = nn.Linear(1, 3, bias=False, dtype=torch.complex64)
    table = nn.Embedding(5, 3, sparse=True)
    problems: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "complex": (wave, lambda: wave(torch.ones(1, 1, dtype=torch.complex64)).abs().square().sum()),
        "sparse": (table, lambda: table(torch.tensor([1, 2])).square().sum()),
    }
    for kind, (model, loss) in problems.items():
        try:
            losses = _train(case.make(model.parameters(), model), loss, 3)
        except (RuntimeError, ValueError) as error:
            assert kind in str(error).lower(), f"{kind} gradients are refused without naming them: {error}"
        else:
            assert losses[-1] < losses[0], f"{kind} gradients are neither refused nor used"


def check_works_with_or_refuses_a_gradient_scaler(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    optimizer = case.make(model.parameters(), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        if overflow:
            model[0].weight.grad[0, 0] = torch.inf
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            assert "scal" in str(error).lower() or "16-mixed" in str(error), error
            return
        scaler.update()
        if overflow:
            assert_same(model.state_dict(), before, "parameters after an overflow")
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[0].weight, before["0.weight"]), "no step was taken after the overflow"


def check_skips_steps_that_are_not_finite(case: OptimizerCase) -> None:
    """And says so once; afterwards everything is as if they had never been."""
    runs = []
    for factors in ([], [torch.nan, torch.inf]):
        model, loss = _mlp_problem()
        optimizer = case.make(model.parameters(), model)
        _train(optimizer, loss, 3)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for factor in factors:
                _train(optimizer, lambda f=factor, of=loss: of() * f, 1)
        said = [str(w.message) for w in caught if "skipped a step" in str(w.message)]
        assert len(said) == bool(factors), f"warned {len(said)} times of {len(factors)} skipped steps: {said}"
        assert_same(model.state_dict(), before[0], "parameters after steps that are not finite")
        if not case.draws_noise:
            assert_same(optimizer.state_dict(), before[1], "state after steps that are not finite")
        _train(optimizer, loss, 3)
        runs.append(model)
    if not case.draws_noise:
        assert_same(runs[1].state_dict(), runs[0].state_dict(), "parameters of the run with skipped steps")


def check_takes_or_refuses_a_tensor_as_lr(case: OptimizerCase) -> None:
    if "lr" not in inspect.signature(case.optimizer).parameters:
        return
    model, _ = _mlp_problem()
    rate = float(case.make(model.parameters(), model).param_groups[0]["lr"])
    for shape in ((), (1,)):
        runs = []
        for lr in (rate, torch.full(shape, rate)):
            model, loss = _mlp_problem()
            try:
                optimizer = case.make(model.parameters(), model, lr=lr)
            except ValueError as error:
                assert "lr must be" in str(error), error
                break
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
            for _ in range(3):
                _train(optimizer, loss, 1)
                schedule.step()
            runs.append(model)
        else:
            torch.testing.assert_close(*(dict(model.named_parameters()) for model in runs))


def check_ranks_agree_and_equal_the_joint_batch(case: OptimizerCase) -> None:
    per_rank = run_ranks(_train_under_ddp, 2, case)
    assert_same(per_rank[0], per_rank[1], "parameters of the two ranks")
    model, _ = _mlp_problem(torch.float64)
    _train(case.make(model.parameters(), model), lambda: _mlp_loss(model), STEPS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(per_rank[0][name], value, rtol=1e-10, atol=1e-10)


def check_refuses_the_state_of_another_optimizer(case: OptimizerCase) -> None:
    model, loss = _mlp_problem()
    other = torch.optim.RMSprop(model.parameters())
    _train(other, loss, 1)
    optimizer = case.make(model.parameters(), model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"not of {case.optimizer.__name__}.*'centered'.*'square_avg'"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(optimizer.state_dict(), before, "state after a refused one")


def check_bad_arguments_raise_by_name(case: OptimizerCase) -> None:
    validated = {"lr"} & set(inspect.signature(case.optimizer).parameters)
    assert validated <= {next(iter(bad)) for bad, _ in case.bad}, f"give a bad value of {validated} in the case"
    for arguments, message in case.bad:
        with pytest.raises(ValueError, match=message) as caught:
            case.optimizer([nn.Parameter(torch.zeros(2))], **arguments)
        name, value = next(iter(arguments.items()))
        assert name in str(caught.value) or name.replace("_", " ") in str(caught.value).lower() or name == "lr"
        assert str(value) in str(caught.value), f"the message does not show the value {value!r}: {caught.value}"


def check_refuses_numbers_that_are_not_finite(case: OptimizerCase) -> None:
    """In the constructor, and in a group's own settings."""
    model, _ = _mlp_problem()
    own = case.make(model.parameters(), model).defaults
    for name, many in real_arguments(case.optimizer).items():
        for bad in (math.inf, -math.inf, math.nan):
            if bad == math.inf and name in case.may_be_infinite:
                continue
            value = (bad, 0.5) if many else bad
            with pytest.raises(ValueError, match=name):
                case.make(model.parameters(), model, **{name: value})
            if name in own:
                groups = [{"params": model[0].parameters()}, {"params": model[-1].parameters(), name: value}]
                with pytest.raises(ValueError, match=name):
                    case.make(groups, model)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _mlp_problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Callable[[], Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, lambda: _mlp_loss(model)


def _mlp_loss(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x[rows].to(dtype)), y[rows])


def _train(optimizer: Optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
    """``steps`` steps; the loss before each, and after the last."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    losses = []
    for _ in range(steps):
        losses.append(_value(loss))
        optimizer.step(closure)
    return [*losses, _value(loss)]


@torch.no_grad()
def _value(loss: Callable[[], Tensor]) -> float:
    return float(loss())


def _train_under_ddp(rank: int, case: OptimizerCase) -> dict[str, Any]:
    torch.manual_seed(rank)  # ranks must agree although their global generators differ
    model, _ = _mlp_problem(torch.float64)
    optimizer = case.make(model.parameters(), model)
    replica = nn.parallel.DistributedDataParallel(model)
    _train(optimizer, lambda: _mlp_loss(replica, slice(rank, None, 2)), STEPS)
    return model.state_dict()
