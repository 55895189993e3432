"""Training: sequences and their adaptive vectors, masks, rows, ranks, evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lit_methods.batches import TimeSeriesBatch
from lit_methods.datamodules import PrimitiveSwitchDataModule, SymbolicMarkovDataModule, TimeSeriesDataModule
from lit_methods.datamodules.series.arrays import PinnedSampler
from lit_methods.vi import PVRNN, PVRNNModule
from lit_methods.vi.pv_rnn import Recognition, SoftmaxCode
from tests.new_processes import act_as_torchrun, new_processes

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip
FAST = Recognition(window=4, iterations=3, horizon=2, num_samples=2)


def build(num_sequences: int = 5, seq_len: int = 6, **arguments: Any) -> PVRNNModule:
    torch.manual_seed(0)
    network = PVRNN(2, [5, 4], [2, 1], [2.0, 4.0])
    given = {"meta_prior": [0.1, 0.2], "initial_meta_prior": 0.5, "seed": 0} | arguments
    return PVRNNModule(network, num_sequences=num_sequences, seq_len=seq_len, **given)


def batch_of(*rows: int, steps: int = 6) -> TimeSeriesBatch:
    values = 0.5 * torch.sin(torch.arange(20 * 12.0)).view(20, 6, 2)[torch.tensor(rows), :steps]
    return TimeSeriesBatch(torch.tensor(rows), values, torch.ones(len(rows), steps, dtype=torch.bool))


def noise(*rows: int, steps: int = 6) -> Tensor:
    """Of each sequence's own."""
    draws = torch.randn(20, steps, 3, generator=torch.Generator().manual_seed(7))
    return draws[torch.tensor(rows)].transpose(0, 1)


def test_loss_is_the_written_objective() -> None:
    module, batch, eps = build().double(), batch_of(3, 0), noise(3, 0)
    losses = module.losses(batch, eps)
    out = module.network.posterior(module.adaptive[batch.rows], eps=eps)
    scale = torch.tensor([0.1 / 2, 0.2 / 1]).repeat(6, 1)
    scale[0] = torch.tensor([0.5 / 2, 0.5 / 1])
    by_hand = 0.5 * (out.mean - batch.values).square().sum((1, 2)) / 2 + (out.kl * scale).sum((1, 2))
    torch.testing.assert_close(losses.total(), by_hand)


def test_only_sequences_of_the_batch_have_gradients_and_order_does_not_matter() -> None:
    module = build()
    loss = module.losses(batch_of(3, 0), noise(3, 0)).total().mean()
    loss.backward()
    assert (module.adaptive.grad[[1, 2, 4]] == 0).all()
    assert (module.adaptive.grad[[0, 3]] != 0).any((1, 2)).all()
    other = module.losses(batch_of(0, 3), noise(0, 3)).total().mean()
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)


def test_padding_is_as_if_it_were_not_there() -> None:
    module = build().double()
    whole, eps = batch_of(0, 1, 2), noise(0, 1, 2)
    lengths = (6, 4, 1)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = TimeSeriesBatch(whole.rows, torch.where(mask[..., None], whole.values, math.nan), mask)
    total = module.losses(padded, eps).total()
    for row, length in enumerate(lengths):
        alone = module.losses(batch_of(row, steps=length), noise(row)[:length]).total()
        torch.testing.assert_close(total[row : row + 1], alone, rtol=1e-12, atol=1e-12)
    total.sum().backward()
    assert module.adaptive.grad.isfinite().all()
    assert (module.adaptive.grad[1, 4:] == 0).all()
    assert (module.adaptive.grad[2, 1:] == 0).all()
    nothing = padded._replace(mask=torch.zeros_like(mask))
    assert (module.losses(nothing, eps).total() == 0).all()


def test_softmax_output_takes_raw_values() -> None:
    torch.manual_seed(0)
    code = SoftmaxCode(-1.0, 1.0)
    module = PVRNNModule(PVRNN(2, [5], [1], [2.0], output=code), num_sequences=5, seq_len=6)
    batch = batch_of(0, 1)
    losses = module.losses(batch, torch.zeros(6, 2, 1))
    target = code.encode(batch.values)
    logits = module.network.posterior(module.adaptive[:2], deterministic=True).logits
    assert logits is not None
    divergence = (target * (target.log() - logits.log_softmax(-1))).sum((2, 3)) / 2
    torch.testing.assert_close(losses.nll, divergence)
    with pytest.raises(ValueError, match="in dimension 0, got 2"):
        module.losses(batch._replace(values=torch.full_like(batch.values, 2.0)))


def steps_of_row(update_rows: str) -> list[Tensor]:
    """Two one-step sequences; gradient 1 on row 0, then on row 1 twice."""
    module = PVRNNModule(
        PVRNN(1, [2], [1], [2.0]), num_sequences=2, seq_len=1, update_rows=update_rows, seed=0,  # type: ignore[arg-type]
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
    )  # fmt: skip
    optimizer, found = module.configure_optimizers(), []
    module._trainer = Trainer(**QUIET)
    for row in (0, 1, 1):

        def closure(row: int = row) -> None:
            module.adaptive.grad = torch.zeros_like(module.adaptive)
            module.adaptive.grad[row] = 1.0
            module._count_once(torch.tensor([row]), torch.tensor([True]))

        module.optimizer_step(0, 0, optimizer, closure)
        found.append(module.adaptive.detach()[:, 0, 0].clone())
    return found


def test_rows_outside_the_batch_move_only_where_asked() -> None:
    dense, rows = steps_of_row("all"), steps_of_row("batch")
    torch.testing.assert_close(torch.stack(dense)[:, 0], torch.tensor([-0.001, -0.00167006, -0.00218802]))
    torch.testing.assert_close(torch.stack(rows)[:, 0], torch.tensor([-0.001] * 3))
    torch.testing.assert_close(torch.stack(rows)[:, 1], torch.tensor([0.0, -0.00074414, -0.00160260]))
    parameter = nn.Parameter(torch.zeros(2, 1))
    sparse = torch.optim.SparseAdam([parameter], lr=1e-3)
    for i, row in enumerate((0, 1, 1)):
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([[row]]), torch.ones(1, 1), (2, 1))
        sparse.step()
        torch.testing.assert_close(parameter.detach()[:, 0], rows[i])


def test_sequences_without_any_step_stay_where_they_are() -> None:
    module = build(update_rows="batch")
    module._trainer = Trainer(**QUIET)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    optimizer = module.configure_optimizers()

    def step(batch: TimeSeriesBatch) -> Tensor:
        def closure() -> None:
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()

        module.optimizer_step(0, 0, optimizer, closure)
        return module.adaptive.detach().clone()

    first = step(batch_of(0, 1))
    assert (first[:2] != 0).any()
    nothing = batch_of(0, 2)
    nothing.mask.zero_()
    assert torch.equal(step(nothing), first)


def test_refuses_what_does_not_fit() -> None:
    module = build()
    with pytest.raises(ValueError, match=r"rows must be in \[0, num_sequences=5\), got 7"):
        module.losses(batch_of(0, 7))
    with pytest.raises(ValueError, match="at most seq_len=4 steps, got 6"):
        build(seq_len=4).losses(batch_of(0))
    broken = batch_of(0, 1)
    broken.values[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="got nan in row 1, step 2, number 0"):
        module.losses(broken)
    with pytest.raises(ValueError, match="mask must be"):
        module.losses(broken._replace(mask=broken.mask[:, :3]))
    with torch.no_grad():
        module.network.bias[9] = math.inf  # of log sigma
    with pytest.raises(RuntimeError, match=r"the KL is (nan|inf) in layer 1, step"):
        module.losses(batch_of(0, 1))
    with pytest.raises(ValueError, match="asks the Trainer's datamodule, which has none: pass num_sequences"):
        PVRNNModule(PVRNN(2)).configure_model()


def test_a_checkpoint_of_other_sequences_is_refused_and_weights_can_be_used_again() -> None:
    saved = build(16).state_dict()
    with pytest.raises(ValueError, match="num_sequences must be 16 as in the checkpoint, got 20"):
        build(20).load_state_dict(saved)
    with pytest.raises(ValueError, match="seq_len must be 6 as in the checkpoint, got 7"):
        build(16, 7).load_state_dict(saved)
    reused = PVRNNModule(build(16).network, num_sequences=3, seq_len=9)
    assert reused.adaptive.shape == (3, 9, 6)


def test_sizes_come_from_the_data_and_training_learns(tmp_path: Path) -> None:
    seed_everything(0)
    data = SymbolicMarkovDataModule(seq_len=9, val_size=4, test_size=4)
    module = PVRNNModule(
        PVRNN(1, [8], [1], [2.0]), 0.01, recognition=FAST, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), seed=0
    )
    trainer = Trainer(
        max_epochs=120, log_every_n_steps=1, check_val_every_n_epoch=60, default_root_dir=tmp_path, **QUIET
    )
    data.setup("fit")
    module._make_adaptive(10, 9)
    start = module.losses(data.train_data).total().mean()  # type: ignore[arg-type]
    trainer.fit(module, data)
    assert module.adaptive.shape == (10, 9, 2)
    assert trainer.callback_metrics["train/loss"] < 0.2 * start
    assert set(trainer.callback_metrics) >= {"train/nll", "train/kl_nats/1", "val/mse", "val/mse_prior"}
    predictions = trainer.predict(module, data)
    assert predictions is not None
    assert predictions[0].shape == (2, 4, 2, 1)  # type: ignore[union-attr]
    assert trainer.test(module, data, verbose=False)[0].keys() == {"test/mse", "test/mse_prior"}


def test_validation_needs_steps_after_the_window() -> None:
    module = build(recognition=Recognition(window=6))
    with pytest.raises(ValueError, match=r"longer than recognition\.window=6, got 6 steps"):
        module._evaluate(batch_of(0), "val")


def ranks_step(rank: int, folder: Path, shard: bool) -> None:
    """Five sequences on two ranks: the third batch of rank 1 repeats one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    act_as_torchrun(rank, 2)
    module = build(shard_adaptive=shard).double()
    parallel = nn.parallel.DistributedDataParallel(Stepped(module))
    rows = (0, 2, 4) if rank == 0 else (1, 3, 1)
    parallel(rows).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    if shard:
        module._trainer = Trainer(**QUIET)
        checkpoint: dict[str, Any] = {"state_dict": {"adaptive": grads["adaptive"]}}
        module.on_save_checkpoint(checkpoint)
        grads["adaptive"] = checkpoint["state_dict"]["adaptive"]
    torch.save(grads, folder / f"grads{rank}.pt")
    dist.destroy_process_group()


class Stepped(nn.Module):
    """``training_step`` as a forward, with noise of each sequence's own."""

    def __init__(self, module: PVRNNModule) -> None:
        super().__init__()
        self.module = module
        if module.shard_adaptive:
            self._ddp_params_and_buffers_to_ignore = [
                f"module.{name}" for name in module._ddp_params_and_buffers_to_ignore
            ]

    def forward(self, rows: tuple[int, ...]) -> Tensor:
        losses = self.module.losses
        self.module.losses = lambda batch: losses(batch, noise(*rows))  # type: ignore[method-assign, assignment]
        self.module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        return self.module.training_step(batch_of(*rows), 0)


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_have_the_gradients_of_one_process(tmp_path: Path, shard: bool) -> None:
    new_processes(ranks_step, 2, tmp_path, shard)
    module = build().double()
    Stepped(module)((0, 1, 2, 3, 4)).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads{rank}.pt")
        for name, p in module.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-12, msg=f"{name} on rank {rank}")


def test_sharded_adaptive_vectors_refuse_other_rows_and_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_methods.vi.pv_rnn.module.world_size", lambda: 2)
    monkeypatch.setattr("lit_methods.vi.pv_rnn.module.gather_objects", lambda value: [([0, 2], []), ([1, 2], [])])
    module = build(shard_adaptive=True)
    with pytest.raises(ValueError, match=r"row 2 belongs to rank 0 of 2 .* but rank 1 got it: use pin_to_ranks=True"):
        module._count_once(torch.tensor([0, 2]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="gradient_clip_val must be None with shard_adaptive=True, got 1"):
        module.configure_gradient_clipping(module.configure_optimizers(), 1.0, "norm")


def test_pinned_sampler_keeps_rows_on_their_rank() -> None:
    epochs = {}
    for rank in range(2):
        sampler = PinnedSampler(range(5), 2, rank, seed=0)  # type: ignore[arg-type]
        epochs[rank] = [sampler.order(epoch) for epoch in range(3)]
        assert {len(order) for order in epochs[rank]} == {3}
        assert all(i % 2 == rank for order in epochs[rank] for i in order)
    assert all(set(a) | set(b) == set(range(5)) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert epochs[0][0] != epochs[0][1] or epochs[0][1] != epochs[0][2]


def test_data_of_known_chance() -> None:
    data = SymbolicMarkovDataModule(seq_len=6, train_size=4000)
    data.setup("fit")
    values = data.train_data[1][..., 0]  # type: ignore[index]
    assert (values[:, [1, 4]] == -0.8).all()
    assert (values[:, [2, 5]] == 0.8).all()
    for phase in (0, 3):
        assert (values[:, phase] > 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_primitives_follow_each_other_by_chance() -> None:
    data = PrimitiveSwitchDataModule(train_size=2000, val_size=0, test_size=0, noise=0.0, stay=0.75)
    data.setup("fit")
    stays = (data.primitives[:, 1:] == data.primitives[:, :-1]).float().mean().item()
    assert stays == pytest.approx(0.75, abs=0.02)
    values = data.train_data[1]  # type: ignore[index]
    assert values.shape == (2000, 48, 2)
    assert values[:, 11::12].abs().max() < 1e-6  # each ends at the origin
    u = torch.tensor(2 * math.pi / 12)
    first = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [2.0, 1.0]])[data.primitives[:, 0]]
    torch.testing.assert_close(values[:, 0], 0.8 * torch.sin(first * u))


def test_arrays_of_ones_own(tmp_path: Path) -> None:
    import numpy as np

    array = np.zeros((4, 5, 2))
    array[1, 3:] = np.nan
    np.save(tmp_path / "train.npy", array)
    data = TimeSeriesDataModule(str(tmp_path / "train.npy"), val=torch.zeros(2, 5, 2))
    assert (data.num_sequences, data.seq_len) == (4, 5)
    (batch,) = data.train_dataloader()
    assert batch.values.dtype == torch.float64
    assert batch.mask.sum() == 18
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    for source, message in (
        (tmp_path / "text.npy", r"train \(.*text.npy\) must be a .npy file of numbers"),
        (tmp_path / "objects.npy", "objects.npy.* must be a .npy file of numbers"),
        (np.zeros((4, 5)), r"train must be \(series, steps, numbers\), got \(4, 5\)"),
        (np.array([[["a"]]]), "train must hold numbers, got dtype"),
        (np.full((1, 2, 1), np.inf), "got infinity in series 0, step 0, number 0"),
        (np.array([[[0.0, np.nan]]]), "all numbers of a step or none, got some in series 0, step 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TimeSeriesDataModule(source).setup("fit")
    with pytest.raises(ValueError, match="val must have 2 numbers a step as train, got 1"):
        TimeSeriesDataModule(array, val=np.zeros((2, 5, 1))).setup("fit")
    with pytest.raises(FileNotFoundError):
        TimeSeriesDataModule(str(tmp_path / "none.npy")).setup("fit")


def test_without_weight_on_the_kl_the_loss_is_the_error() -> None:
    module, batch, eps = build(meta_prior=0.0, initial_meta_prior=0.0), batch_of(3, 0), noise(3, 0)
    mean = module.network.posterior(module.adaptive[batch.rows], eps=eps).mean
    torch.testing.assert_close(module.losses(batch, eps).total(), 0.5 * (mean - batch.values).square().mean(2).sum(1))
