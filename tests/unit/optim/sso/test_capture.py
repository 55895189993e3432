"""SSO's capture mode: the same steps as target closures, under the circumstances of the recorded calls."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lit_methods.optim import SSO
from lit_methods.optim.sso import AdaGradPerExample, Armijo, GaussNewton

N, D, K = 12, 5, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % K


def make_net(*layers: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 8), *(layers or (nn.Tanh(),)), nn.Linear(8, K)).to(dtype)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def step_by_capture(net: nn.Module, optimizer: SSO, steps: int = 3, x: Tensor = X) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), Y).backward()
        optimizer.step()


@pytest.mark.parametrize("inner", ["gauss_newton", "cg", "lbfgs", "armijo", "adam"])
@pytest.mark.parametrize("layers", [(nn.Tanh(),), (nn.Dropout(0.4), nn.Tanh())], ids=["plain", "dropout"])
def test_equals_the_target_closure_to_the_bit(inner, layers) -> None:
    captured, closed = make_net(*layers), make_net(*layers)
    options = {"lr": 2.0, "inner": inner, "weight_decay": 0.01}
    torch.manual_seed(7)
    step_by_capture(captured, SSO(captured.parameters(), target_module=captured, **options))
    after = torch.rand(2)
    torch.manual_seed(7)
    optimizer = SSO(closed.parameters(), **options)
    for _ in range(3):
        optimizer.step(lambda: (closed(X), lambda z: functional.cross_entropy(z, Y)))
    assert torch.equal(flat(captured), flat(closed))
    assert torch.equal(torch.rand(2), after), "the streams of random numbers differ"


def test_a_standard_closure_is_called_once_and_its_loss_returned() -> None:
    net, other = make_net(), make_net()
    optimizer, losses = SSO(net.parameters(), target_module=net), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(X), Y)
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    step_by_capture(other, SSO(other.parameters(), target_module=other), 1)
    assert torch.equal(flat(net), flat(other))


def test_running_statistics_move_once_and_train_flags_stay() -> None:
    net = make_net(nn.BatchNorm1d(8), nn.Tanh())
    reference = copy.deepcopy(net)
    reference(X)
    step_by_capture(net, SSO(net.parameters(), target_module=net, inner=GaussNewton(steps=7)), 1)
    for name, buffer in reference.named_buffers():
        assert torch.equal(dict(net.named_buffers())[name], buffer), name
    assert net.training
    assert net[1].training
    closed = copy.deepcopy(reference)
    optimizer = SSO(closed.parameters(), target_module=closed, inner=GaussNewton(steps=7))
    optimizer.step(lambda: (closed(X), lambda z: functional.cross_entropy(z, Y)))
    reference(X)
    assert torch.equal(closed[1].running_var, reference[1].running_var)


def test_autocast_of_the_call_is_used_again() -> None:
    net, dtypes = make_net(), []
    net[-1].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    optimizer = SSO(net.parameters(), target_module=net, inner=GaussNewton(steps=3))
    with torch.autocast("cpu", torch.bfloat16):
        functional.cross_entropy(net(X), Y).backward()
    optimizer.step()
    assert len(dtypes) > 3
    assert set(dtypes) == {torch.bfloat16}
    functional.cross_entropy(net(X), Y).backward()
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("inner", ["gauss_newton", "lbfgs"])
def test_a_target_closure_inside_of_autocast_sees_the_moved_weights(inner) -> None:
    """Autocast caches casts of weights as long as its outermost context lasts."""
    captured, closed = make_net(), make_net()
    capture = SSO(captured.parameters(), lr=2.0, inner=inner, target_module=captured)
    closure = SSO(closed.parameters(), lr=2.0, inner=inner)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(captured(X), Y)
        loss.backward()
        capture.step()
        with torch.autocast("cpu", torch.bfloat16):
            closure.step(lambda: (closed(X), lambda z: functional.cross_entropy(z, Y)))
            inside = closed(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(closed(X), inside)
    assert torch.equal(flat(captured), flat(closed))


@pytest.mark.parametrize("ways", ["accumulation", "one loss"])
def test_several_calls_are_one_batch(ways) -> None:
    joint, split = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    x = X.double()
    step_by_capture(joint, SSO(joint.parameters(), lr=2.0, target_module=joint), 3, x)
    optimizer = SSO(split.parameters(), lr=2.0, target_module=split)
    for _ in range(3):
        if ways == "accumulation":
            for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
                (functional.cross_entropy(split(x[part]), Y[part]) / 3).backward()
        else:
            functional.cross_entropy(torch.cat([split(x[:5]), split(x[5:])]), Y).backward()
        optimizer.step()
    torch.testing.assert_close(flat(split), flat(joint), rtol=1e-9, atol=1e-9)


def test_calls_without_gradients_are_ignored() -> None:
    net, other = make_net(), make_net()
    optimizer = SSO(net.parameters(), target_module=net)
    with torch.no_grad():
        net(X + 1)
    with torch.inference_mode():
        net(X + 2)
    net(X + 3)  # with a graph, but not part of the loss
    step_by_capture(net, optimizer, 1)
    step_by_capture(other, SSO(other.parameters(), target_module=other), 1)
    assert torch.equal(flat(net), flat(other))


def test_backward_twice_adds_up() -> None:
    net, other = make_net(), make_net()
    optimizer = SSO(net.parameters(), target_module=net)
    z = net(X)
    (0.5 * functional.cross_entropy(z, Y)).backward(retain_graph=True)
    (0.5 * functional.cross_entropy(z, Y)).backward()
    optimizer.step()
    step_by_capture(other, SSO(other.parameters(), target_module=other), 1)
    torch.testing.assert_close(flat(net), flat(other))


class Padded(nn.Module):
    """Token-wise classifier of (batch, time) inputs with keyword inputs and an output object."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, *, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        return {"logits": scale * self.head(self.embedding(tokens))}


@pytest.mark.parametrize("counts", ["number", "mask"])
def test_padding_does_not_count(counts) -> None:
    """A padded batch takes the step of the same tokens without padding."""
    tokens = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 7, -100, -100, -100]])
    keep = labels != -100
    num_items = (lambda slope: int(keep.sum())) if counts == "number" else (lambda slope: keep)
    padded, packed = Padded(), Padded()
    for net, batch, target, options in (
        (padded, tokens, labels, {"num_items": num_items}),
        (packed, tokens[keep][None], labels[keep][None], {}),
    ):
        optimizer = SSO(
            net.parameters(), lr=2.0, target_module=net, target_fn=lambda o: o["logits"], num_batch_dims=2, **options
        )
        logits = net(tokens=batch, scale=1.5)["logits"]
        functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    close = torch.allclose(flat(padded), flat(packed), rtol=1e-4, atol=1e-5)
    assert close == (counts == "mask"), "with a number alone, padded outputs are held where they are"


def test_padding_alone_skips_the_step() -> None:
    net = make_net()
    before = flat(net)
    optimizer = SSO(net.parameters(), target_module=net, num_items=lambda slope: torch.zeros(N, dtype=torch.bool))
    with pytest.warns(RuntimeWarning, match="no example counts"):
        step_by_capture(net, optimizer, 1)
    assert torch.equal(flat(net), before)


def test_works_on_a_module_below_frozen_features() -> None:
    """The optimized head alone is captured and run again; inputs that carry a graph are cut off."""
    body, head = nn.Linear(D, 8), nn.Linear(8, K)
    calls = []
    body.register_forward_hook(lambda *_: calls.append(1))
    optimizer = SSO(head.parameters(), lr=2.0, target_module=head)
    functional.cross_entropy(head(body(X).tanh()), Y).backward()
    before = flat(head)
    optimizer.step()
    assert len(calls) == 1
    assert not torch.equal(flat(head), before)


def test_copies_and_pickles_go_on_alone() -> None:
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        net = make_net()
        optimizer = SSO(net.parameters(), target_module=net)
        step_by_capture(net, optimizer, 1)
        other, other_optimizer = duplicate((net, optimizer))
        step_by_capture(net, optimizer, 2)
        step_by_capture(other, other_optimizer, 2)
        assert torch.equal(flat(net), flat(other))


def test_compiled_modules() -> None:
    net, plain = torch.compile(make_net(), backend="aot_eager"), make_net()
    step_by_capture(net, SSO(net.parameters(), lr=2.0, target_module=net))
    step_by_capture(plain, SSO(plain.parameters(), lr=2.0, target_module=plain))
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-4, atol=1e-5)


# ---- in Lightning


class Digits(LightningModule):
    """Somebody's module: an ordinary training_step."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.net, self.options = make_net(), options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> SSO:
        return SSO(self.net.parameters(), lr=2.0, target_module=self.net, **self.options)


def fit(module: LightningModule, batch_size: int = N, **options) -> Tensor:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, enable_checkpointing=False, max_epochs=3, **options)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=batch_size))
    return flat(module)


def test_leaves_an_existing_training_step_unchanged() -> None:
    plain = make_net()
    step_by_capture(plain, SSO(plain.parameters(), lr=2.0, target_module=plain))
    assert torch.equal(fit(Digits()), flat(plain))


def test_accumulated_batches_are_one_batch_in_lightning() -> None:
    accumulated = fit(Digits(), batch_size=4, accumulate_grad_batches=3)
    torch.testing.assert_close(accumulated, fit(Digits()), rtol=1e-4, atol=1e-5)


def test_bf16_mixed_follows_32_bit() -> None:
    torch.testing.assert_close(fit(Digits(), precision="bf16-mixed"), fit(Digits()), rtol=0.1, atol=0.1)


def test_gradient_scaling_is_refused_with_the_way_out() -> None:
    net = make_net()
    optimizer, scaler = SSO(net.parameters(), target_module=net), torch.amp.GradScaler("cpu")
    scaler.scale(functional.cross_entropy(net(X), Y)).backward()
    with pytest.raises(RuntimeError, match="bf16-mixed"):
        scaler.step(optimizer)
    closed = SSO(net.parameters())
    with pytest.raises(RuntimeError, match="bf16-mixed"):
        scaler.step(closed, lambda: (net(X), lambda z: functional.cross_entropy(z, Y)))


# ---- what it refuses


def test_nothing_captured() -> None:
    net = make_net()
    optimizer = SSO(net.parameters(), target_module=net)
    with pytest.raises(RuntimeError, match="captured no gradient at the output of Sequential"):
        optimizer.step()
    net(X)
    with pytest.raises(RuntimeError, match="captured no gradient"):
        optimizer.step(lambda: torch.tensor(1.0))
    assert optimizer.step(lambda: None) is None, "Lightning's closure returns None when training_step does"


def test_target_module_must_hold_the_parameters() -> None:
    net = make_net()
    with pytest.raises(ValueError, match="target_module=Linear lacks 2 of the optimized parameters"):
        SSO(net.parameters(), target_module=net[2])
    optimizer = SSO(net.parameters(), target_module=net)
    with pytest.raises(ValueError, match="lacks 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="target_module is given already"):
        optimizer.capture(net)


def test_outputs_that_are_not_one_tensor() -> None:
    net = Padded()
    SSO(net.parameters(), target_module=net)
    with pytest.raises(TypeError, match="pass target_fn"):
        net(tokens=torch.zeros(1, 1).long(), scale=1.0)


def test_rules_that_need_more_than_was_captured() -> None:
    net = make_net()
    with pytest.raises(RuntimeError, match="Armijo evaluates the loss at other targets"):
        step_by_capture(net, SSO(net.parameters(), target_module=net, rule="armijo"))
    net = make_net()
    with pytest.raises(RuntimeError, match="needs the examples' indices"):
        step_by_capture(net, SSO(net.parameters(), target_module=net, rule=AdaGradPerExample()))
    captured, closed = make_net(), make_net()
    options = {"lr": 2.0}
    loss = lambda z: functional.cross_entropy(z, Y)  # noqa: E731
    step_by_capture(captured, SSO(captured.parameters(), target_module=captured, rule=Armijo(loss_fn=loss), **options))
    optimizer = SSO(closed.parameters(), rule="armijo", **options)
    for _ in range(3):
        optimizer.step(lambda: (closed(X), loss))
    assert torch.equal(flat(captured), flat(closed))


def test_a_network_that_cannot_be_repeated_is_reported_once() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = make_net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) + self.calls

    net = Stateful()
    optimizer = SSO(net.parameters(), target_module=net)
    with pytest.warns(RuntimeWarning, match="cannot repeat"):
        step_by_capture(net, optimizer, 1)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SSO(table.parameters(), target_module=table)
    table(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
