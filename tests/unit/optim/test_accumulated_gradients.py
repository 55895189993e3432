"""Optimizers that evaluate a closure more than once refuse gradients that were accumulated before it."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_methods.optim import CBO, MDPO, ArmijoSGD, ExtraAdam, ExtraGradient

REPEATING = {
    "ExtraGradient": lambda p: ExtraGradient(p, lr=0.1),
    "ExtraAdam": lambda p: ExtraAdam(p, lr=0.1),
    "ArmijoSGD": lambda p: ArmijoSGD(p, lr=0.1),
    "MDPO": lambda p: MDPO(p, lr=0.1, inner_steps=3),
    "CBO": lambda p: CBO(p, num_particles=5, seed=0),
}


class Bowl(LightningModule):
    def __init__(self, build) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.build = build

    def training_step(self, batch, batch_idx):
        return (self.x.square() / 2).sum()

    def configure_optimizers(self):
        return self.build([self.x])


def fit(build, accumulate: int) -> float:
    module = Bowl(build)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=3, accumulate_grad_batches=accumulate, accelerator="cpu", enable_model_summary=False, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(40, 1)))
    return module.x.item()


@pytest.mark.parametrize("name", REPEATING)
def test_accumulation_is_refused_by_name(name) -> None:
    fit(REPEATING[name], 1)
    with pytest.raises(RuntimeError, match=f"{name} evaluates the loss .* accumulate_grad_batches=1"):
        fit(REPEATING[name], 2)


def test_extragradient_without_accumulation_is_exact() -> None:
    assert fit(REPEATING["ExtraGradient"], 1) == pytest.approx(0.91**3, abs=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_clears_or_not_gives_the_same_steps(set_to_none) -> None:
    ends = []
    for clears in (True, False):
        x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = ExtraGradient([x], lr=0.1)

        def closure(x=x, optimizer=optimizer, clears=clears):
            if clears:
                optimizer.zero_grad(set_to_none=set_to_none)
            loss = x.square().sum() / 2
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            if not clears:
                x.grad = None
        ends.append(float(x))
    assert ends == pytest.approx([0.91**3] * 2, abs=1e-12)


def test_gradients_that_the_closure_does_not_touch_are_no_accumulation() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0]))
    x.grad = torch.ones(1)
    CBO([x], num_particles=5, seed=0).step(lambda: x.square().sum())
