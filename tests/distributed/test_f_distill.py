"""f-distill on two real gloo processes equals one process on the joint batch, and ranks whose teachers differ stop."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_methods.batches import SupervisedBatch
from lit_methods.datamodules import TensorDataModule
from lit_methods.diffusion import Denoiser, FDistill, TimeMLP, TimeSampler
from lit_methods.diffusion.f_distill import module as f_distill
from tests.distributed.launch import run_ranks
from tests.new_processes import act_as_torchrun
from tests.unit.diffusion.test_diffusion import QUIET

JOINT, DIM, BATCHES = 8, 3, 5  # one cycle: a step of the student, four of the critics


class Half(TimeSampler):
    """One time for all."""

    def quantile(self, u: Tensor, process: Any) -> Tensor:
        return torch.full_like(u, 0.5)


def distil(rank: int, ranks: int, other_teacher: bool = False) -> dict[str, Tensor]:
    """The weights after one cycle, where rows of data are equal and noise is this rank's share of a fixed one."""
    if ranks > 1:
        act_as_torchrun(rank, ranks)
    draws = iter(range(1000))
    share = JOINT // ranks

    def fixed_noise(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        whole = torch.randn(JOINT, DIM, generator=torch.Generator().manual_seed(next(draws)))
        return whole[rank * share : (rank + 1) * share].to(dtype=dtype)

    f_distill.draw_noise = fixed_noise  # type: ignore[assignment]
    torch.manual_seed(rank if other_teacher else 0)
    teacher = Denoiser(TimeMLP([DIM], width=8), "edm", "edm", "edm")
    torch.manual_seed(0)
    settings: dict[str, Any] = {"divergence": "kl", "gan_weight": 0.5, "time_sampler": Half(), "seed": 0}
    module = FDistill(teacher, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), **settings)
    x = torch.tensor([0.5, -1.0, 2.0]).expand(JOINT * BATCHES, DIM).clone()
    rows = SupervisedBatch(x, torch.zeros(len(x), dtype=torch.long))
    trainer = Trainer(
        **QUIET, max_epochs=1, limit_val_batches=0, devices=ranks, strategy="ddp" if ranks > 1 else "auto",
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, TensorDataModule(train=rows, batch_size=share))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def alone(_: int) -> dict[str, Tensor]:
    return distil(0, 1)


def test_two_ranks_with_plain_ddp_equal_one_process() -> None:
    (expected,) = run_ranks(alone, 1)
    for found in run_ranks(distil, 2, 2):
        assert int(found["iteration"]) == BATCHES
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_ranks_must_have_the_same_teacher() -> None:
    with pytest.raises(Exception, match="teacher must be the same on all ranks, got weights of hashes"):
        run_ranks(distil, 2, 2, True)
