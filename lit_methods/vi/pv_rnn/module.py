"""Training of a PV-RNN, and its error regression on sequences that it has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lit_methods.batches import TimeSeriesBatch
from lit_methods.diffusion.streams import check_seed, stream
from lit_methods.hyperparameters import live_arguments
from lit_methods.optim.foundation.ranks import gather_objects, rank, world_size
from lit_methods.precision import load_unrounded
from lit_methods.swa import renew_swa_copy
from lit_methods.vi.pv_rnn.error_regression import ErrorRegression, check_fit
from lit_methods.vi.pv_rnn.network import PVRNN
from lit_methods.vi.pv_rnn.objective import StepLosses, as_meta_prior, step_losses, without_gaps


@dataclass(frozen=True)
class Recognition:
    """How sequences without adaptive vectors are recognised: see :class:`ErrorRegression`.

    Args:
        window: steps that are fitted.
        iterations: steps of Adam for each observation.
        lr: its step size.
        restarts: starts of each fit.
        deterministic: no noise.
        horizon: steps that are predicted, >= 1.
        num_samples: predictions that are averaged, >= 1.

    Raises:
        ValueError: an argument out of range.
    """

    window: int = 10
    iterations: int = 50
    lr: float = 0.09
    restarts: int = 1
    deterministic: bool = False
    horizon: int = 10
    num_samples: int = 10

    def __post_init__(self) -> None:
        check_fit(self.window, self.iterations, self.lr, self.restarts)
        for name in ("horizon", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


class PVRNNModule(LightningModule):
    """Trains a :class:`PVRNN` and the adaptive vectors of every training sequence, which take an encoder's place.

    The loss of a sequence is ``sum_t NLL_t / X + sum_l w_l sum_t KL_l / Z_l``; the batch's is their mean. The
    meta-prior ``w`` sets what the model takes chance to be: a small one makes a random process whose prior knows
    nothing, a large one a deterministic system that remembers the training sequences; what is between generalises
    best. Look at ``train/kl_nats/<layer>``, nats per step without ``w``: it may rise at first; below 0.01 in all layers
    the latents are not used.

    Sequences are addressed by ``batch.rows`` only, so the loader may shuffle. Under DDP ranks see different sequences
    and their gradients are averaged, also those of the adaptive vectors, which equals one process on all sequences; a
    sequence that a sampler repeats counts once. Noise depends on (seed, rank, step).

    Validation and test recognise the first ``recognition.window`` steps of a sequence by error regression and predict
    the others: ``val/mse``, beside ``val/mse_prior`` without recognition, both per number. Prediction follows whole
    sequences and gives ``recognition.horizon`` steps more, ``(num_samples, batch, horizon, output_size)``.

    Source: Ahmadi and Tani, arXiv 1811.01339.

    Args:
        network: the network.
        meta_prior: ``w``, one number or one for each layer, >= 0.
        initial_meta_prior: that of a sequence's first step, whose prior is N(0, I); ``None``: as ``meta_prior``.
        num_sequences: training sequences; ``None``: asks the datamodule.
        seq_len: their steps, at most; ``None``: asks the datamodule.
        update_rows: ``"all"``: the optimizer steps all adaptive vectors, as the authors' do (Adam's momentum then moves
            those of sequences that were not in the batch, too); ``"batch"``: only those of the batch, as SparseAdam.
        shard_adaptive: adaptive vectors stay on the rank that owns the sequence (``row % ranks``) instead of being
            averaged over all: for many long sequences. The loader must give each rank its own (``pin_to_ranks`` of
            :class:`~lit_methods.datamodules.TimeSeriesDataModule`).
        recognition: of sequences that were not trained.
        optimizer: builds the optimizer.
        seed: of the noise, >= 0; ``None``: one from torch's generator.

    Raises:
        ValueError: an argument out of range.
    """

    adaptive: nn.Parameter

    def __init__(
        self,
        network: PVRNN,
        meta_prior: float | Sequence[float] = 0.01,
        initial_meta_prior: float | Sequence[float] | None = None,
        num_sequences: int | None = None,
        seq_len: int | None = None,
        update_rows: Literal["all", "batch"] = "all",
        shard_adaptive: bool = False,
        recognition: Recognition = Recognition(),
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        self.register_load_state_dict_pre_hook(_check_sizes)
        if update_rows not in ("all", "batch"):
            raise ValueError(f"update_rows must be 'all' or 'batch', got {update_rows!r}")
        for name, value in (("num_sequences", num_sequences), ("seq_len", seq_len)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.network = network
        self.weights = as_meta_prior(meta_prior, initial_meta_prior, len(network.latent_sizes))
        self.num_sequences, self.seq_len = num_sequences, seq_len
        self.update_rows, self.shard_adaptive = update_rows, shard_adaptive
        self.recognition = recognition
        self.optimizer = optimizer
        self.seed, self.draws = check_seed(seed), 0
        self.touched: set[int] = set()  # rows that the ranks' batches held since the last optimizer step
        self.errors = nn.ModuleDict({f"{s}_{name}": MeanMetric() for s in ("val", "test") for name in ("mse", "prior")})
        if shard_adaptive:  # under both names that torch 2.13 looks for
            self._ddp_params_and_buffers_to_ignore = ["adaptive", ".adaptive"]
        if num_sequences is not None and seq_len is not None:
            self._make_adaptive(num_sequences, seq_len)

    def configure_model(self) -> None:
        """Make the adaptive vectors, where their number was left to the datamodule."""
        if hasattr(self, "adaptive"):
            return
        datamodule = getattr(self._trainer, "datamodule", None)
        for name in ("num_sequences", "seq_len"):
            if getattr(self, name) is None:
                if getattr(datamodule, name, None) is None:
                    raise ValueError(f"{name}=None asks the Trainer's datamodule, which has none: pass {name}=...")
                setattr(self, name, getattr(datamodule, name))
                self.hparams[name] = getattr(self, name)  # so that a checkpoint is rebuilt without the datamodule
        assert self.num_sequences is not None
        assert self.seq_len is not None
        self._make_adaptive(self.num_sequences, self.seq_len)
        renew_swa_copy(self)

    def _make_adaptive(self, num_sequences: int, seq_len: int) -> None:
        shape = (num_sequences, seq_len, self.network.adaptive_size)
        self.adaptive = nn.Parameter(torch.zeros(shape, dtype=self.network.weight.dtype))
        if self.shard_adaptive:  # DDP would have averaged it
            self.adaptive.register_hook(lambda grad: grad / world_size())

    def forward(self, rows: Tensor, deterministic: bool = True) -> Tensor:
        """What has become of training sequences: ``(batch,)`` rows to ``(batch, seq_len, output_size)``."""
        return self.network(self.adaptive[rows], deterministic=deterministic)

    def losses(self, batch: TimeSeriesBatch, eps: Tensor | None = None) -> StepLosses:
        """The parts of each sequence's loss, step by step.

        Args:
            batch: training sequences.
            eps: noise ``(steps, batch, units)``, instead of drawing it.

        Raises:
            ValueError: a row out of range, sequences too long, observed values that are not finite.
            RuntimeError: a loss that is not finite, with its layer and step.
        """
        rows, steps = batch.rows, batch.values.shape[1]
        known = len(self.adaptive)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < known:
            wrong = int(rows.min() if rows.min() < 0 else rows.max())
            raise ValueError(f"rows must be in [0, num_sequences={known}), got {wrong}")
        if steps > self.adaptive.shape[1]:
            raise ValueError(f"sequences must have at most seq_len={self.adaptive.shape[1]} steps, got {steps}")
        values, mask = without_gaps(batch.values, batch.mask)
        generator = None
        if eps is None:
            generator = stream(self.device, self.seed, rank(), self.draws)
            self.draws += 1
        output = self.network.posterior(self.adaptive[rows, :steps], eps=eps, generator=generator)
        losses = step_losses(self.network, output, values, mask, self.weights, first=True)
        _check_finite(losses)
        return losses

    def training_step(self, batch: TimeSeriesBatch, batch_idx: int) -> Tensor:
        """The mean loss of the batch's sequences; logs its parts."""
        losses = self.losses(batch)
        once = self._count_once(batch.rows, batch.mask.any(1))
        total = losses.total()
        loss = (total * once).sum() * (world_size() / sum(gather_objects(float(once.sum()))))
        steps = batch.mask.sum().clamp(min=1)
        self.log("train/loss", total.detach().mean(), batch_size=len(total))
        self.log("train/nll", losses.nll.detach().sum() / steps, batch_size=len(total))
        for layer, nats in enumerate(losses.kl.detach().sum((0, 1)) / steps):
            self.log(f"train/kl_nats/{layer + 1}", nats, batch_size=len(total))
        return loss

    def _count_once(self, rows: Tensor, observed: Tensor) -> Tensor:
        """1 for the first place of each sequence in the batch of all ranks, 0 where it is repeated.

        Args:
            rows: of the sequences, ``(batch,)``.
            observed: whether each has any step, ``(batch,)``; the others' adaptive vectors stay.
        """
        seen: set[int] = set()
        flags: list[bool] = []
        for r, (theirs, touched) in enumerate(gather_objects((rows.tolist(), rows[observed].tolist()))):
            if self.shard_adaptive and any(i % world_size() != r for i in theirs):
                wrong = next(i for i in theirs if i % world_size() != r)
                raise ValueError(
                    f"row {wrong} belongs to rank {wrong % world_size()} of {world_size()} with shard_adaptive=True, "
                    f"but rank {r} got it: use pin_to_ranks=True in the datamodule"
                )
            self.touched.update(touched)
            for i in theirs:
                if r == rank():
                    flags.append(i not in seen)
                seen.add(i)
        return torch.tensor(flags, dtype=torch.promote_types(torch.float32, self.adaptive.dtype), device=rows.device)

    def validation_step(self, batch: TimeSeriesBatch, batch_idx: int) -> None:
        """Recognise the beginning of each sequence, and predict the rest."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TimeSeriesBatch, batch_idx: int) -> None:
        """Recognise the beginning of each sequence, and predict the rest."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: TimeSeriesBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Follow the sequences to their end and predict: ``(num_samples, batch, horizon, output_size)``."""
        window, regression = self.recognition.window, self.regression()
        regression.begin(batch.values[:, :window], batch.mask[:, :window])
        for t in range(window, batch.values.shape[1]):
            regression.update(batch.values[:, t], batch.mask[:, t])
        return regression.predict(self.recognition.horizon, self.recognition.num_samples)

    def regression(self) -> ErrorRegression:
        """A new error regression with this network and ``recognition``."""
        chosen = self.recognition
        return ErrorRegression(
            self.network, chosen.window, chosen.iterations, chosen.lr,
            meta_prior=self.weights.later, initial_meta_prior=self.weights.first,
            restarts=chosen.restarts, deterministic=chosen.deterministic, seed=self.seed,
        )  # fmt: skip

    def _evaluate(self, batch: TimeSeriesBatch, stage: str) -> None:
        window, samples = self.recognition.window, self.recognition.num_samples
        values, mask = without_gaps(batch.values, batch.mask)
        future, observed = values[:, window:], mask[:, window:]
        if not observed.any():
            raise ValueError(f"sequences must be longer than recognition.window={window}, got {values.shape[1]} steps")
        regression = self.regression()
        regression.begin(values[:, :window], mask[:, :window])
        steps, count = future.shape[1], len(values) * samples
        generator = stream(self.device, self.seed, "prior")
        free = self.network.generate(window + steps, count, generator=generator).mean[:, window:]
        for name, predicted in (
            ("mse", regression.predict(steps, samples).mean(0)),
            ("prior", free.unflatten(0, (samples, -1)).mean(0)),
        ):
            squares = (predicted - future).square().mean(2)[observed]
            metric: Any = self.errors[f"{stage}_{name}"]
            metric.update(squares)
            label = f"{stage}/mse" if name == "mse" else f"{stage}/mse_prior"
            self.log(label, metric, on_step=False, on_epoch=True, batch_size=len(values))

    def configure_optimizers(self) -> Optimizer:
        """The injected optimizer, of weights and adaptive vectors."""
        return self.optimizer(p for p in self.parameters() if p.requires_grad)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step; with ``update_rows="batch"`` put back adaptive vectors and moments that had no sequence in it."""
        if self.update_rows == "all":
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        state = getattr(optimizer, "optimizer", optimizer).state[self.adaptive]
        before = {name: x.clone() for name, x in self._by_row(state).items()}
        kept = self.adaptive.detach().clone()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        others = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        others[list(self.touched)] = False
        self.touched.clear()
        with torch.no_grad():
            self.adaptive[others] = kept[others]
            for name, x in self._by_row(state).items():
                x[others] = before[name][others] if name in before else 0

    def _by_row(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {k: x for k, x in state.items() if isinstance(x, Tensor) and x.shape == self.adaptive.shape}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, where all ranks have the same gradients."""
        if self.shard_adaptive and world_size() > 1 and gradient_clip_val and gradient_clip_algorithm != "value":
            raise ValueError(
                f"gradient_clip_val must be None with shard_adaptive=True, got {gradient_clip_val}: ranks would clip "
                "by different norms; use gradient_clip_algorithm='value'"
            )
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the noise depends on; bring together adaptive vectors, and their moments, of all ranks."""
        checkpoint["pv_rnn"] = {"seed": self.seed, "draws": self.draws}
        if not (self.shard_adaptive and world_size() > 1):
            return
        checkpoint["state_dict"]["adaptive"] = self._gathered(checkpoint["state_dict"]["adaptive"])
        for optimizer, saved in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            place = next(i for i, p in enumerate(params) if p is self.adaptive)
            state = saved["state"].get(place, {})
            state.update({name: self._gathered(x) for name, x in self._by_row(state).items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved seed; make the adaptive vectors, if their number is known from the checkpoint only."""
        for name, value in checkpoint["pv_rnn"].items():
            setattr(self, name, value)
        if not hasattr(self, "adaptive"):
            self.num_sequences, self.seq_len, _ = checkpoint["state_dict"]["adaptive"].shape
            self._make_adaptive(self.num_sequences, self.seq_len)

    def _gathered(self, x: Tensor) -> Tensor:
        """Every rank's own rows."""
        parts = gather_objects(x[rank() :: world_size()].cpu())
        whole = x.clone()
        for r, part in enumerate(parts):
            whole[r :: world_size()] = part.to(x.device)
        return whole


def _check_finite(losses: StepLosses) -> None:
    for name, values in (("KL", losses.kl), ("NLL", losses.nll[..., None])):
        if not values.isfinite().all():
            row, step, layer = (~values.isfinite()).nonzero()[0].tolist()
            where = f"layer {layer + 1}, " if name == "KL" else ""
            raise RuntimeError(
                f"the {name} is {float(values[row, step, layer].detach())} in {where}step {step}, row {row} of the "
                "batch; lower the learning rate, or set log_sigma_bounds"
            )


def _check_sizes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    saved, present = state_dict.get(f"{prefix}adaptive"), getattr(module, "adaptive", None)
    if saved is None or present is None:
        return
    for name, there, here in zip(("num_sequences", "seq_len"), saved.shape, present.shape, strict=False):
        if there != here:
            raise ValueError(
                f"{name} must be {there} as in the checkpoint, got {here}; for new sequences load module.network only"
            )
