import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import TanhTransform
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lit_methods.optim import MDPO, MDPOStepSize


def second_divergence(first, second, **arguments) -> Tensor:
    """What proximity gives in the second inner step, with the policy of each step prescribed; step_size is 1."""
    p = nn.Parameter(torch.zeros(()))
    optimizer = MDPO([p], lr=0.0, inner_steps=2, **arguments)
    policies, seen = iter((first, second)), []

    def closure() -> Tensor:
        seen.append(optimizer.proximity(next(policies)))
        loss = p.square() + seen[-1].detach()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen[0] == 0
    torch.testing.assert_close(optimizer.divergence, seen[1].detach())
    return seen[1]


def random_policies(seed: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    scale = torch.linalg.cholesky(torch.eye(3, dtype=torch.float64) + 0.2 * torch.ones(3, 3, dtype=torch.float64))
    gaussian = Independent(Normal(normal(5, 3), normal(5, 3).exp()), 1)
    return {
        "normal": Normal(normal(5), normal(5).exp()),
        "independent": gaussian,
        "categorical": Categorical(logits=normal(5, 4)),
        "bernoulli": Bernoulli(logits=normal(5)),
        "factored": Independent(Bernoulli(logits=normal(5, 3)), 1),
        "multivariate": MultivariateNormal(normal(5, 3), scale_tril=scale * (1 + normal(1).abs())),
    }


@pytest.mark.parametrize("name", random_policies(0))
def test_divergence_is_the_kl_of_the_new_policy_from_the_anchor(name):
    old, new = random_policies(0)[name], random_policies(1)[name]
    torch.testing.assert_close(second_divergence(old, new), kl_divergence(new, old).mean(), rtol=1e-10, atol=1e-12)


def test_direction_of_the_kl():
    old, new = Normal(torch.tensor([0.0]), torch.tensor([1.0])), Normal(torch.tensor([1.0]), torch.tensor([2.0]))
    assert float(second_divergence(old, new)) == pytest.approx(1.3068528)  # the other way round: 0.4431472


def test_bijections_change_no_divergence():
    old, new = random_policies(0)["independent"], random_policies(1)["independent"]
    squashed = [TransformedDistribution(p, [TanhTransform()]) for p in (old, new)]
    assert second_divergence(*squashed) == second_divergence(old, new)


def test_tensors_are_logits_and_masks_choose_tokens():
    g = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, 3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kl = kl_divergence(Categorical(logits=new), Categorical(logits=old))
    torch.testing.assert_close(second_divergence(old, new), kl.mean())
    optimizer = MDPO([nn.Parameter(torch.zeros(()))], anchor="parameters", step_size=0.5)
    found = optimizer.proximity(new, mask=mask, anchor=old)
    torch.testing.assert_close(found, 2 * kl[mask.bool()].mean())


@pytest.mark.parametrize("family", ["logits", "normal"])
def test_what_the_mask_drops_may_be_nan(family):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    old, new = (torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    optimizer = MDPO([nn.Parameter(torch.zeros(()))], anchor="parameters")

    def policy(x):
        return x if family == "logits" else Independent(Normal(x, 1.0, validate_args=False), 1)

    expected = optimizer.proximity(policy(new), mask, policy(old))
    for broken in (old, new):
        broken[~mask.bool()] = math.nan
    new.requires_grad_()
    found = optimizer.proximity(policy(new), mask, policy(old))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert new.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"mask must have the shape of the batch, \(2, 3\), got \(2, 3, 7\)"):
        optimizer.proximity(policy(new), mask[..., None].expand(2, 3, 7), policy(old))


def test_masked_actions_give_finite_gradients():
    new = torch.tensor([[0.3, -math.inf, 1.0]], requires_grad=True)
    optimizer = MDPO([nn.Parameter(torch.zeros(()))], anchor="parameters")
    optimizer.proximity(new, anchor=torch.tensor([[0.1, -math.inf, 0.2]])).backward()
    assert new.grad.isfinite().all()
    assert new.grad[0, 0] != 0


def test_low_precision_policies_are_compared_in_float32():
    new = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    optimizer = MDPO([nn.Parameter(torch.zeros(()))], anchor="parameters")
    assert optimizer.proximity(new, anchor=new - 1).dtype == torch.float32


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_tsallis_divergence(name):
    old, new = random_policies(0)[name], random_policies(1)[name]
    kl = kl_divergence(new, old).mean()
    torch.testing.assert_close(second_divergence(old, new, q=1.0001), kl, rtol=1e-3, atol=1e-4)
    p, p_old = (d.probs if name == "categorical" else torch.stack([d.probs, 1 - d.probs], -1) for d in (new, old))
    torch.testing.assert_close(second_divergence(old, new, q=2.0), (p - p_old).square().sum(-1).mean())
    for q in (1.2, 1.7):
        log_q = lambda x, q=q: (x ** (q - 1) - 1) / (q - 1)  # noqa: E731
        expected = (p * (log_q(p) - q * log_q(p_old))).sum(-1) + (q - 1) * (p_old * log_q(p_old)).sum(-1)
        torch.testing.assert_close(second_divergence(old, new, q=q), expected.mean())
        assert second_divergence(old, new, q=q) > 0
        torch.testing.assert_close(second_divergence(old, old, q=q), torch.zeros((), dtype=torch.float64))


def gaussian_problem(seed: int = 0):
    """A policy, a batch and the surrogate of on-policy MDPO without its proximity."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    observations, advantages = torch.randn(64, 3).double(), torch.randn(64).double()
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    with torch.no_grad():
        actions = Normal(net(observations), 1.0).sample()
        old = Normal(net(observations), 1.0).log_prob(actions).sum(-1)

    def policy():
        return Independent(Normal(net(observations), torch.ones(64, 2).double()), 1)

    def surrogate(pi) -> Tensor:
        return -((pi.log_prob(actions) - old).exp() * advantages).mean()

    return net, policy, surrogate


def mdpo_closure(optimizer: MDPO, policy, surrogate, losses=None):
    def closure() -> Tensor:
        optimizer.zero_grad()
        pi = policy()
        loss = surrogate(pi) + optimizer.proximity(pi)
        loss.backward()
        if losses is not None:
            losses.append(float(loss.detach()))
        return loss

    return closure


def test_one_inner_step_is_adam_on_the_surrogate():
    net, policy, surrogate = gaussian_problem()
    losses: list[float] = []
    optimizer = MDPO(net.parameters(), inner_steps=1, max_grad_norm=None)
    optimizer.step(mdpo_closure(optimizer, policy, surrogate, losses))
    assert abs(losses[0]) < 1e-15  # standardised advantages at the anchor

    plain, plain_policy, plain_surrogate = gaussian_problem()
    adam = torch.optim.Adam(plain.parameters(), lr=3e-4, eps=1e-5)
    plain_surrogate(plain_policy()).backward()
    adam.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_small_step_sizes_hold_the_policy_back():
    drift = []
    for step_size in (10.0, 1.0, 0.1, 0.01):
        net, policy, surrogate = gaussian_problem()
        before = policy()
        optimizer = MDPO(net.parameters(), lr=1e-2, inner_steps=50, step_size=step_size)
        optimizer.step(mdpo_closure(optimizer, policy, surrogate))
        drift.append(float(kl_divergence(policy(), before).mean()))
    assert drift == sorted(drift, reverse=True)
    assert drift[-1] < 0.05 * drift[0]


def tabular(q: float, step_size: float, lr: float, inner_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Policies: the anchor and where many exact inner steps end; advantages."""
    g = torch.Generator().manual_seed(3)
    logits = nn.Parameter(torch.randn(5, 4, generator=g, dtype=torch.float64))
    advantages = torch.randn(5, 4, generator=g, dtype=torch.float64)
    anchor = logits.detach().softmax(-1)
    optimizer = MDPO([logits], lr=lr, inner_steps=inner_steps, step_size=step_size, q=q, max_grad_norm=None)
    policy = lambda: logits  # noqa: E731
    optimizer.step(mdpo_closure(optimizer, policy, lambda pi: -(pi.softmax(-1) * advantages).sum(-1).mean()))
    return anchor, logits.detach().softmax(-1), advantages


def test_many_exact_steps_are_the_mirror_descent_step():
    anchor, found, advantages = tabular(q=1.0, step_size=0.7, lr=0.02, inner_steps=3000)
    expected = anchor * (0.7 * advantages).exp()
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-8)


@pytest.mark.parametrize("q", [1.5, 2.0])
def test_many_exact_tsallis_steps(q):
    anchor, found, advantages = tabular(q, step_size=0.2, lr=0.005, inner_steps=5000)
    low, high = advantages.min(-1, keepdim=True)[0] - 50, advantages.max(-1, keepdim=True)[0] + 50
    for _ in range(200):
        middle = (low + high) / 2
        p = (anchor ** (q - 1) + (q - 1) / q * 0.2 * (advantages - middle)).clamp(min=0) ** (1 / (q - 1))
        low, high = (
            torch.where(p.sum(-1, keepdim=True) > 1, middle, low),
            torch.where(p.sum(-1, keepdim=True) > 1, high, middle),
        )
    torch.testing.assert_close(found, p, rtol=0, atol=2e-4)
    assert (found - anchor).abs().max() > 0.03


def test_parameter_anchor_is_renewed_every_interval():
    p = nn.Parameter(torch.zeros(2))
    unused = nn.Parameter(torch.ones(1))
    module = nn.ParameterDict({"p": p, "unused": unused})
    optimizer = MDPO(module.parameters(), lr=0.1, inner_steps=1, anchor="parameters", anchor_interval=3)
    starts = []
    for _ in range(7):
        starts.append(p.detach().clone())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = p.sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        expected = starts[(len(starts) - 1) // 3 * 3]
        torch.testing.assert_close(optimizer.anchor_parameters(module)["p"], expected, rtol=0, atol=0)
    optimizer.refresh_anchor()
    assert torch.equal(optimizer.anchor_parameters(module)["p"], p)
    assert torch.equal(optimizer.anchor_parameters(module)["unused"], unused)


def minibatch_training(net, optimizer, steps: range) -> None:
    for i in steps:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3) + i

        def closure(x=x) -> Tensor:
            optimizer.zero_grad()
            with torch.no_grad():
                anchor = functional_call(net, optimizer.anchor_parameters(net), x)
            loss = net(x)[:, 0].mean() + optimizer.proximity(net(x), anchor=anchor)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_resumes_with_parameter_anchors():
    def make():
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
        optimizer = MDPO(net.parameters(), lr=0.05, inner_steps=2, anchor="parameters", anchor_interval=4)
        return net, optimizer, MDPOStepSize(optimizer, "linear", 12)

    def train(net, optimizer, schedule, steps):
        for i in steps:
            minibatch_training(net, optimizer, range(i, i + 1))
            schedule.step()

    whole = make()
    train(*whole, range(9))
    first = make()
    train(*first, range(6))
    second = make()
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(old.state_dict())
    train(*second, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True))
    assert second[1].param_groups[0]["step_size"] == whole[1].param_groups[0]["step_size"] == pytest.approx(1 - 9 / 12)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"total_steps": 4}, [2.0, 1.5, 1.0, 0.5, 0.25]),
        ({"total_steps": 4, "offset": -1}, [2.5, 2.0, 1.5, 1.0, 0.5]),
        ({"schedule": "constant"}, [2.0] * 5),
        ({"schedule": "inverse_sqrt"}, [2.0, 2**0.5, 2 / 3**0.5, 1.0, 2 / 5**0.5]),
        ({"schedule": lambda k: 1 / (0.2 * (k + 2))}, [2.5, 1 / 0.6, 1.25, 1.0, 1 / 1.2]),
    ],
)
def test_step_size_schedules(arguments, expected):
    optimizer = MDPO([nn.Parameter(torch.zeros(()))], step_size=2.0)
    other = LambdaLR(optimizer, lambda k: 0.5**k)
    schedule = MDPOStepSize(optimizer, floor=0.25, **arguments)
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["step_size"])
        optimizer.step(lambda: None)
        schedule.step()
        other.step()
    assert found == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * 0.5**5)
    assert "schedule" not in schedule.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cosine"}, "schedule must be"),
        ({}, "total_steps must be >= 1"),
        ({"total_steps": 5, "floor": 0.0}, "floor must be"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        MDPOStepSize(MDPO([nn.Parameter(torch.zeros(()))]), **arguments)


def test_hooks_run_once_per_outer_step():
    p = nn.Parameter(torch.zeros(()))
    torch.optim.Adam([nn.Parameter(torch.zeros(()))]).step()  # makes torch wrap Adam.step
    optimizer, calls = MDPO([p], inner_steps=4), []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    optimizer.step(lambda: p.square().backward())
    assert len(calls) == 1


def test_gradients_are_clipped_before_each_inner_step():
    ours, theirs = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    optimizer, adam = MDPO([ours], lr=0.1, inner_steps=2, max_grad_norm=0.5), torch.optim.Adam([theirs], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ours.square().sum() * (1 + ours.detach()[0])  # so that the two gradients differ in length
        loss.backward()
        return loss

    optimizer.step(closure)
    for _ in range(2):
        adam.zero_grad()
        (theirs.square().sum() * (1 + theirs.detach()[0])).backward()
        assert float(nn.utils.clip_grad_norm_([theirs], 0.5)) > 0.5
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_several_policies_in_one_closure():
    logits, mean = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))
    optimizer = MDPO([logits, mean], lr=0.1, inner_steps=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        pi = Categorical(logits=logits), Normal(mean, torch.ones(2))
        loss = logits[:, 0].sum() + mean.sum() + sum(optimizer.proximity(p) for p in pi)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(optimizer.divergence) > 0


def test_misuse_is_explained():
    net, policy, _ = gaussian_problem()
    optimizer = MDPO(net.parameters())
    with pytest.raises(RuntimeError, match=r"call step\(closure\).*bf16-mixed"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="inside of the closure"):
        optimizer.proximity(policy())
    with pytest.raises(RuntimeError, match="anchor_parameters needs"):
        optimizer.anchor_parameters(net)
    with pytest.raises(ValueError, match="anchor= is for"):
        optimizer.proximity(policy(), anchor=policy())
    with pytest.raises(ValueError, match=r"needs anchor="):
        MDPO(net.parameters(), anchor="parameters").proximity(policy())
    with pytest.raises(TypeError, match=r"policy must be Normal, Categorical.*got Poisson"):
        MDPO(net.parameters(), anchor="parameters").proximity(Poisson(torch.ones(2)), anchor=Poisson(torch.ones(2)))
    with pytest.raises(ValueError, match="is for categorical"):
        MDPO(net.parameters(), anchor="parameters", q=1.5).proximity(policy(), anchor=policy())
    with pytest.raises(ValueError, match="inner_steps is shared"):
        MDPO([{"params": net[0].parameters()}, {"params": net[2].parameters(), "inner_steps": 5}])


def test_inner_steps_must_see_the_same_batch():
    p, sizes = nn.Parameter(torch.zeros(3)), iter((4, 5))
    optimizer = MDPO([p])
    with pytest.raises(ValueError, match="must see the same batch"):
        optimizer.step(lambda: (optimizer.proximity(p.expand(next(sizes), 3)) + p.sum()).backward())
    calls = []
    with pytest.raises(RuntimeError, match="more often"):
        optimizer.step(lambda: [optimizer.proximity(p) for _ in range(1 + len(calls))] and calls.append(1))


@pytest.mark.parametrize("factor", [math.nan, lambda p: (p - p.detach()).abs().sqrt()], ids=["loss", "gradient"])
def test_inner_steps_end_before_one_that_is_not_finite(factor):
    p = nn.Parameter(torch.ones(()))
    optimizer, evaluations = MDPO([p], lr=0.1, inner_steps=5), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        evaluations.append(p.detach().clone())
        loss = p * 1.0
        if len(evaluations) == 3:
            loss = loss + (factor(p) if callable(factor) else factor)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="MDPO skipped a step"):
        optimizer.step(closure)
    assert len(evaluations) == 3
    assert torch.equal(p, evaluations[-1])
    assert optimizer.state[p]["outer_steps"] == 1


class Bandit(LightningModule):
    """A softmax policy over ten arms under automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))
        self.evaluations = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.evaluations += 1
        pi = self.logits.expand(len(batch), -1)
        return -(pi.softmax(-1) * batch).sum(-1).mean() + self.optimizers().proximity(pi)

    def configure_optimizers(self) -> MDPO:
        return MDPO(self.parameters(), lr=0.05, inner_steps=10, max_grad_norm=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_automatic_optimization_in_lightning(precision):
    module = Bandit()
    rewards = torch.arange(10.0).expand(8, 10)
    trainer = Trainer(
        max_epochs=20, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rewards, batch_size=8))
    assert (trainer.global_step, module.evaluations) == (20, 200)
    assert module.logits.softmax(-1)[9] > 0.5
