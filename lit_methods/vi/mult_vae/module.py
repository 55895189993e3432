"""The two autoencoders."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection

from lit_methods.batches import InteractionBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.metrics import NDCGAtK, RecallAtK, top_unseen_items
from lit_methods.precision import load_unrounded
from lit_methods.swa import renew_swa_copy
from lit_methods.vi.mult_vae.history import History, Likelihood, check_history, sparse_rows
from lit_methods.vi.mult_vae.losses import gaussian_kl, negative_log_likelihood, widen


class _Autoencoder(LightningModule):
    """What both share: the sparse first layer, the decoder, the likelihood, ranking and its metrics.

    The layers are made by :meth:`configure_model` when ``num_items`` is to come from the datamodule.
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(
        self,
        num_items: int | None,
        hidden_dims: Sequence[int],
        latent_dim: int,
        code_dim: int,
        dropout: float,
        likelihood: Likelihood,
        positive_weight: float,
        recall_at: Sequence[int],
        ndcg_at: Sequence[int],
        num_recommendations: int,
        optimizer: OptimizerCallable,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        for name, value in (("num_items", num_items), ("latent_dim", latent_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not all(width >= 1 for width in hidden_dims):
            raise ValueError(f"hidden_dims must hold widths of at least 1, got {hidden_dims}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if likelihood not in ("multinomial", "gaussian", "logistic"):
            raise ValueError(f"likelihood must be 'multinomial', 'gaussian' or 'logistic', got {likelihood!r}")
        if not 0 < positive_weight < float("inf"):
            raise ValueError(f"positive_weight must be > 0 and finite, got {positive_weight}")
        for name, cutoffs in (("recall_at", recall_at), ("ndcg_at", ndcg_at)):
            if len(set(cutoffs)) != len(cutoffs) or not all(k >= 1 for k in cutoffs):
                raise ValueError(f"{name} must hold different numbers of at least 1, got {cutoffs}")
        if not recall_at and not ndcg_at:
            raise ValueError("recall_at and ndcg_at must not both be empty")
        if num_recommendations < 1:
            raise ValueError(f"num_recommendations must be at least 1, got {num_recommendations}")
        self.num_items = num_items
        self.dropout = dropout
        self.likelihood: Likelihood = likelihood
        self.positive_weight = positive_weight
        self.cutoff = max(*recall_at, *ndcg_at, 1)
        self.num_recommendations = num_recommendations
        self.optimizer = optimizer
        ranking: dict[str, Metric | MetricCollection] = {f"recall@{k}": RecallAtK(k) for k in recall_at}
        ranking |= {f"ndcg@{k}": NDCGAtK(k) for k in ndcg_at}
        metrics = MetricCollection(
            ranking,
            compute_groups=False,  # two metrics that happen to agree on the first batch are not the same
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.encoder_dims = [*hidden_dims, code_dim]
        self.decoder_dims = [latent_dim, *reversed(hidden_dims)]
        if num_items is not None:
            self._build(num_items)

    def configure_model(self) -> None:
        """Make the layers, if ``num_items`` was left to the datamodule."""
        if self.num_items is not None:
            return
        num_items = getattr(getattr(self._trainer, "datamodule", None), "num_items", None)
        if num_items is None:
            raise ValueError("num_items=None asks the Trainer's datamodule, which has none: pass num_items=...")
        self.num_items = num_items
        self._build(num_items)
        self.hparams["num_items"] = num_items  # so that a checkpoint is rebuilt without the datamodule
        renew_swa_copy(self)

    def _build(self, num_items: int) -> None:
        self.item_embedding = nn.Parameter(torch.empty(num_items, self.encoder_dims[0]))  # a transposed nn.Linear
        self.item_bias = nn.Parameter(torch.empty(self.encoder_dims[0]))
        self.encoder = _linear_layers(self.encoder_dims)
        self.decoder = _linear_layers([*self.decoder_dims, num_items])
        for parameter in (p for name, p in self.named_parameters() if _is_weight(name)):
            nn.init.xavier_uniform_(parameter)
        for parameter in (p for name, p in self.named_parameters() if not _is_weight(name)):
            nn.init.trunc_normal_(parameter, std=0.001, a=-0.002, b=0.002)

    def _encode(self, history: History) -> Tensor:
        """The encoder's last layer, without an activation, ``(users, code_dim)``."""
        batch = self._as_batch(history)
        rows, weight = batch.rows(), self.item_embedding
        if batch.values is None:
            values = batch.offsets.diff().to(weight.dtype).rsqrt()[rows]
        else:
            squares = torch.zeros(batch.num_users, device=rows.device, dtype=weight.dtype)
            squares = squares.index_add(0, rows, batch.values.to(weight.dtype).square())
            values = batch.values.to(weight.dtype) * squares.clamp(min=torch.finfo(weight.dtype).tiny).rsqrt()[rows]
        values = functional.dropout(values, self.dropout, self.training)
        hidden = self.item_bias + functional.embedding_bag(
            batch.items, weight, batch.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        for layer in self.encoder:
            hidden = layer(hidden.tanh())
        return hidden

    def decode(self, z: Tensor) -> Tensor:
        """Logits ``(users, num_items)`` of codes ``(users, latent_dim)``."""
        first, *others = self.decoder
        hidden = first(z)
        for layer in others:
            hidden = layer(hidden.tanh())
        return hidden

    def forward(self, history: History) -> Tensor:
        """Logits ``(users, num_items)``; with a deterministic code, but with dropout in training mode.

        Args:
            history: an :class:`~lit_methods.batches.InteractionBatch`, or a matrix ``(users, num_items)``, dense or
                ``torch.sparse_csr``. Users without any interaction get the logits of an empty history.
        """
        raise NotImplementedError

    def validation_step(self, batch: InteractionBatch, batch_idx: int) -> None:
        """Rank the items that are not in the history."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: InteractionBatch, batch_idx: int) -> None:
        """Rank the items that are not in the history."""
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the standard errors over users."""
        for name, metric in self.test_metrics.items():
            assert isinstance(metric, RecallAtK | NDCGAtK)
            self.log(f"{name}/se", metric.standard_error())

    def predict_step(self, batch: InteractionBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The best ``num_recommendations`` items of each user, as :meth:`recommend` gives them."""
        assert self.num_items is not None
        return self._recommend(batch, min(self.num_recommendations, self.num_items), exclude_seen=True)

    @torch.no_grad()
    def recommend(self, history: History, k: int = 20, exclude_seen: bool = True) -> tuple[Tensor, Tensor]:
        """The ``k`` items with the largest logits, best first, without dropout or sampling.

        Args:
            history: as in :meth:`forward`, on the module's device.
            k: in [1, num_items].
            exclude_seen: leave out what is in the history.

        Returns:
            items: int64 ``(users, k)``; -1 where a user has fewer than ``k`` unseen items.
            logits: ``(users, k)``.

        Raises:
            ValueError: ``k`` or the history is out of range.
            RuntimeError: ``num_items`` was left to the datamodule, and nothing has been fitted yet.
        """
        batch = self._as_batch(history)
        assert self.num_items is not None
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k must be in [1, {self.num_items}], got {k}")
        if batch.items.device.type != "cpu":
            check_history(batch, self.num_items, self.likelihood)
        training = self.training
        self.eval()
        try:
            return self._recommend(batch, k, exclude_seen)
        finally:
            self.train(training)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer over all parameters."""
        return self.optimizer(self.parameters())

    def _negative_log_likelihood(self, logits: Tensor, batch: InteractionBatch) -> Tensor:
        return negative_log_likelihood(logits, batch, self.likelihood, self.positive_weight)

    def _evaluate(self, batch: InteractionBatch, metrics: MetricCollection) -> None:
        assert self.num_items is not None
        ranked, _ = self._recommend(batch, min(self.cutoff, self.num_items), exclude_seen=True)
        metrics.update(ranked, batch.target_items, batch.target_offsets)
        self.log_dict(metrics, batch_size=batch.num_users)

    def _recommend(self, batch: InteractionBatch, k: int, exclude_seen: bool) -> tuple[Tensor, Tensor]:
        logits = widen(self(batch))
        if exclude_seen:
            return top_unseen_items(logits, batch, k)
        best, items = logits.topk(k, dim=1)
        return items, best

    def _as_batch(self, history: History) -> InteractionBatch:
        """The same history as sparse rows, checked where that is cheap: on the CPU."""
        if self.num_items is None:
            raise RuntimeError("num_items is not known before fit has seen the datamodule: pass num_items=...")
        if isinstance(history, Tensor):
            history = sparse_rows(history, self.num_items)
        if history.items.device.type == "cpu" and not torch.compiler.is_compiling():
            check_history(history, self.num_items, self.likelihood)
        return history


class MultVAE(_Autoencoder):
    """Mult-VAE^PR: a variational autoencoder with a multinomial likelihood over all items.

    Encoder: history scaled to norm 1, dropout, ``num_items -> hidden_dims -> (mean, log variance)``; decoder: mirrored;
    tanh between layers. Training draws one ``z``; everything else takes the mean. Weights start Xavier-uniform, biases
    truncated normal with standard deviation 0.001.

    ``beta`` is ``min(anneal_cap, t / total_anneal_steps)`` with ``t`` the number of optimizer steps before this one, so
    that it resumes and accumulates gradients exactly; the cap is reached after ``anneal_cap * total_anneal_steps``
    steps. To choose the cap as the paper does (section 2.2.2): anneal to 1, and take beta at the best ``val/ndcg@100``.

    Logs ``train/loss``, ``train/nll``, ``train/kl`` (means over users), ``train/beta``, and
    ``{val,test}/recall@k`` and ``ndcg@k`` over held-out users, with ``test/<metric>/se`` for standard errors. Data
    parallel ranks with equally many users average to the joint batch.

    Args:
        num_items: number of items, >= 1; None: the datamodule's ``num_items``.
        hidden_dims: widths between the items and the code, each >= 1; may be empty. The paper: 600.
        latent_dim: size of the code, >= 1. The paper: 200.
        dropout: share of the history that is dropped in training, in [0, 1).
        anneal_cap: largest beta, >= 0.
        total_anneal_steps: steps in which beta would reach 1; <= 0: beta is ``anneal_cap`` from the start.
        likelihood: "multinomial", or for comparison "gaussian" (weighted squares) or "logistic" (independent clicks).
        positive_weight: the Gaussian's weight of interactions against 1 for all other items, > 0.
        recall_at: lengths of rankings whose recall is logged.
        ndcg_at: the same for NDCG.
        num_recommendations: length of ``predict``'s lists, >= 1.
        optimizer: builds the optimizer. The default is Adam in its fused form, which on a CPU is ten times faster.

    Raises:
        ValueError: an argument out of range; a history with ids, offsets or values out of range (on accelerators only
            :meth:`recommend` checks, since that waits for the device).

    Example:
        >>> import torch
        >>> model = MultVAE(num_items=50, hidden_dims=(16,), latent_dim=4)
        >>> items, logits = model.recommend((torch.rand(3, 50) > 0.8).float(), k=5)
        >>> items.shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        num_items: int | None = None,
        hidden_dims: Sequence[int] = (600,),
        latent_dim: int = 200,
        dropout: float = 0.5,
        anneal_cap: float = 0.2,
        total_anneal_steps: int = 200_000,
        likelihood: Likelihood = "multinomial",
        positive_weight: float = 10.0,
        recall_at: Sequence[int] = (20, 50),
        ndcg_at: Sequence[int] = (100,),
        num_recommendations: int = 20,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    ) -> None:
        super().__init__(
            num_items,
            hidden_dims,
            latent_dim,
            2 * latent_dim,
            dropout,
            likelihood,
            positive_weight,
            recall_at,
            ndcg_at,
            num_recommendations,
            optimizer,
        )
        if not 0 <= anneal_cap < float("inf"):
            raise ValueError(f"anneal_cap must be >= 0 and finite, got {anneal_cap}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.anneal_cap = anneal_cap
        self.total_anneal_steps = total_anneal_steps

    def encode(self, history: History) -> tuple[Tensor, Tensor]:
        """Mean and log variance of ``q(z | history)``, ``(users, latent_dim)`` each."""
        mean, log_variance = self._encode(history).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, history: History) -> Tensor:
        """Logits ``(users, num_items)`` at the mean of ``q``; see :meth:`encode` and :meth:`decode`.

        Args:
            history: an :class:`~lit_methods.batches.InteractionBatch`, or a matrix ``(users, num_items)``, dense or
                ``torch.sparse_csr``. Users without any interaction get the logits of an empty history.
        """
        return self.decode(self.encode(history)[0])

    def beta(self) -> float:
        """The weight of the KL divergence in the next step."""
        if self.total_anneal_steps <= 0:
            return self.anneal_cap
        return min(self.anneal_cap, self.trainer.global_step / self.total_anneal_steps)

    def training_step(self, batch: InteractionBatch, batch_idx: int) -> Tensor:
        """Mean over users of the negative annealed bound."""
        mean, log_variance = self.encode(batch)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        nll = self._negative_log_likelihood(self.decode(z), batch)
        kl = gaussian_kl(widen(mean), widen(log_variance)).mean()
        beta = self.beta()
        loss = nll + beta * kl
        self.log_dict({"train/loss": loss, "train/nll": nll, "train/kl": kl}, batch_size=batch.num_users)
        self.log("train/beta", beta, batch_size=batch.num_users)
        return loss


class MultDAE(_Autoencoder):
    """Mult-DAE: the same as :class:`MultVAE` with a deterministic code, denoising by the dropout of its input.

    All layers but the last are followed by tanh, the code too. No KL divergence; the loss has the penalty
    ``l2_penalty * sum of squared weights`` (of matrices, not of biases), for any optimizer: the same as
    ``torch.optim.Adam(weight_decay=2 * l2_penalty)`` on them, and not AdamW.

    Logs ``train/loss``, ``train/nll`` (mean over users), and the metrics of :class:`MultVAE`.

    Args:
        num_items: as in :class:`MultVAE`.
        hidden_dims: as there; the paper's best for all data sets has none.
        latent_dim: as there.
        dropout: as there.
        l2_penalty: weight of the squared weights, >= 0; the authors: 0.01 / batch_size.
        likelihood: as there.
        positive_weight: as there.
        recall_at: as there.
        ndcg_at: as there.
        num_recommendations: as there.
        optimizer: as there.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        num_items: int | None = None,
        hidden_dims: Sequence[int] = (),
        latent_dim: int = 200,
        dropout: float = 0.5,
        l2_penalty: float = 2e-5,
        likelihood: Likelihood = "multinomial",
        positive_weight: float = 10.0,
        recall_at: Sequence[int] = (20, 50),
        ndcg_at: Sequence[int] = (100,),
        num_recommendations: int = 20,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    ) -> None:
        super().__init__(
            num_items,
            hidden_dims,
            latent_dim,
            latent_dim,
            dropout,
            likelihood,
            positive_weight,
            recall_at,
            ndcg_at,
            num_recommendations,
            optimizer,
        )
        if not 0 <= l2_penalty < float("inf"):
            raise ValueError(f"l2_penalty must be >= 0 and finite, got {l2_penalty}")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.l2_penalty = l2_penalty

    def encode(self, history: History) -> Tensor:
        """The code, ``(users, latent_dim)`` in (-1, 1)."""
        return self._encode(history).tanh()

    def forward(self, history: History) -> Tensor:
        """Logits ``(users, num_items)``; see :meth:`encode` and :meth:`decode`.

        Args:
            history: an :class:`~lit_methods.batches.InteractionBatch`, or a matrix ``(users, num_items)``, dense or
                ``torch.sparse_csr``. Users without any interaction get the logits of an empty history.
        """
        return self.decode(self.encode(history))

    def training_step(self, batch: InteractionBatch, batch_idx: int) -> Tensor:
        """Mean over users of the negative log-likelihood, and the penalty."""
        nll = self._negative_log_likelihood(self(batch), batch)
        weights = [p for name, p in self.named_parameters() if _is_weight(name)]
        loss = nll + self.l2_penalty * torch.stack([widen(w).square().sum() for w in weights]).sum()
        self.log_dict({"train/loss": loss, "train/nll": nll}, batch_size=batch.num_users)
        return loss


def _linear_layers(dims: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))


def _is_weight(name: str) -> bool:
    return name.endswith(("weight", "embedding"))
