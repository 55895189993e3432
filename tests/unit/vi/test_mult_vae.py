import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from lit_methods.batches import InteractionBatch
from lit_methods.datamodules import MovieLensDataModule
from lit_methods.vi import MultDAE, MultVAE
from lit_methods.vi.mult_vae.losses import gaussian_kl, negative_log_likelihood
from tests.standins.interaction_files import write_u_data

USERS, ITEMS = 7, 12


def sparse(x: Tensor, targets: Tensor | None = None, values: bool = True) -> InteractionBatch:
    rows, items = x.nonzero(as_tuple=True)
    offsets = functional.pad((x != 0).sum(1).cumsum(0), (1, 0))
    target_items = items[:0] if targets is None else targets
    return InteractionBatch(items, offsets, x[rows, items] if values else None, target_items, torch.zeros_like(offsets))


@pytest.fixture
def counts() -> Tensor:
    """Histories of counts; user 3 has none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((USERS, ITEMS), 0.7), generator=generator)
    x[3] = 0
    x[0, 0] = 1
    return x


def vae(**arguments: Any) -> MultVAE:
    torch.manual_seed(0)
    return MultVAE(**{"num_items": ITEMS, "hidden_dims": (6,), "latent_dim": 3} | arguments)


class At:
    """A Trainer that has taken some steps."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step


@pytest.fixture
def no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps without a Trainer."""
    for kind in (MultVAE, MultDAE):
        monkeypatch.setattr(kind, "trainer", At(0))
        monkeypatch.setattr(kind, "log", lambda *_, **__: None)
        monkeypatch.setattr(kind, "log_dict", lambda *_, **__: None)


def dense_forward(model: MultVAE | MultDAE, x: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The network written out over dense rows: the encoder's last layer, and the logits at the mean."""
    h = functional.normalize(x, dim=1) if dropped is None else dropped
    h = h @ model.item_embedding + model.item_bias
    for layer in model.encoder:
        h = layer(h.tanh())
    z = h[:, : h.shape[1] // 2] if isinstance(model, MultVAE) else h.tanh()
    out = z
    for place, layer in enumerate(model.decoder):
        out = layer(out.tanh() if place else out)
    return h, out


@pytest.mark.parametrize("hidden_dims", [(), (6,), (6, 5)])
@pytest.mark.parametrize("kind", [MultVAE, MultDAE])
def test_sparse_path_equals_dense(kind, hidden_dims, counts) -> None:
    torch.manual_seed(0)
    model = kind(ITEMS, hidden_dims=hidden_dims, latent_dim=3).eval()
    expected = dense_forward(model, counts)[1]
    for history in (sparse(counts), counts, counts.to_sparse_csr()):
        torch.testing.assert_close(model(history), expected, rtol=1e-5, atol=1e-6)
    ones = (counts > 0).float()
    torch.testing.assert_close(model(sparse(ones, values=False)), dense_forward(model, ones)[1], rtol=1e-5, atol=1e-6)


def test_dropout_after_the_norm_of_the_full_history(counts) -> None:
    model = vae(dropout=0.5).train()
    batch = sparse(counts)
    torch.manual_seed(1)
    mean, log_variance = model.encode(batch)
    torch.manual_seed(1)
    kept = functional.dropout(torch.ones(len(batch.items)), 0.5)  # the same mask
    dropped = functional.normalize(counts, dim=1)
    dropped[batch.rows(), batch.items] *= kept
    expected = dense_forward(model, counts, dropped)[0]
    torch.testing.assert_close(torch.cat([mean, log_variance], 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_scale_of_a_history_does_not_matter(scale, counts) -> None:
    model = vae().eval()
    torch.testing.assert_close(model(counts * scale), model(counts))


@pytest.mark.usefixtures("no_trainer")
def test_no_history_gives_finite_logits_and_gradients(counts) -> None:
    model = vae()
    for history in (sparse(counts), sparse((counts > 0).float(), values=False)):
        loss = model.training_step(history, 0)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(counts)[3:4], dense_forward(model, torch.zeros(1, ITEMS))[1])


def dense_nll(logits: Tensor, x: Tensor, likelihood: str, weight: float) -> Tensor:
    """The likelihoods as the paper writes them, over dense targets."""
    if likelihood == "multinomial":
        return -(x * logits.log_softmax(1)).sum(1).mean()
    if likelihood == "logistic":
        return -(x * functional.logsigmoid(logits) + (1 - x) * functional.logsigmoid(-logits)).sum(1).mean()
    confidence = torch.where(x > 0, weight, 1.0)
    return (confidence / 2 * (x - logits).square()).sum(1).mean()


@pytest.mark.parametrize("likelihood", ["multinomial", "gaussian", "logistic"])
def test_likelihood_and_its_gradient(likelihood, counts) -> None:
    x = (counts > 0).double() if likelihood == "logistic" else counts.double()
    logits = (3 * torch.randn(USERS, ITEMS, dtype=torch.float64)).requires_grad_()

    def lean(f: Tensor) -> Tensor:
        return negative_log_likelihood(f * 1.0, sparse(x), likelihood, 5.0)

    expected = dense_nll(logits, x, likelihood, 5.0)
    torch.testing.assert_close(lean(logits), expected)
    [gradient] = torch.autograd.grad(2 * lean(logits), logits)
    torch.testing.assert_close(gradient, 2 * torch.autograd.grad(expected, logits)[0])


def test_likelihood_of_uniform_logits_and_of_huge_ones() -> None:
    x = torch.zeros(2, ITEMS)
    x[0, :4] = 1
    x[1, 5] = 2
    nll = negative_log_likelihood(torch.zeros(2, ITEMS), sparse(x), "multinomial", 1.0)
    torch.testing.assert_close(nll, torch.tensor((4 + 2) / 2 * math.log(ITEMS)))
    logits = torch.randn(2, ITEMS) * 1e4
    expected = dense_nll(logits.double(), x.double(), "multinomial", 1.0).float()
    torch.testing.assert_close(negative_log_likelihood(logits, sparse(x), "multinomial", 1.0), expected)


def test_likelihood_in_bfloat16_is_computed_in_float32(counts) -> None:
    logits = (5 * torch.randn(USERS, ITEMS)).bfloat16()
    expected = dense_nll(logits.float(), counts, "multinomial", 1.0)
    x = sparse(counts)
    torch.testing.assert_close(negative_log_likelihood(logits.clone(), x, "multinomial", 1.0), expected)


def test_a_second_backward_is_refused(counts) -> None:
    logits = torch.zeros(USERS, ITEMS, requires_grad=True)
    nll = negative_log_likelihood(logits * 1, sparse(counts), "multinomial", 1.0)
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        nll.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures("no_trainer")
@pytest.mark.parametrize("kind", [MultVAE, MultDAE])
def test_a_training_step_on_cuda_agrees_with_the_cpu_and_does_not_wait(kind, counts) -> None:
    torch.manual_seed(0)
    model = kind(ITEMS, hidden_dims=(6,), latent_dim=3, dropout=0.0).double()
    if kind is MultVAE:
        model.encode = lambda batch: (MultVAE.encode(model, batch)[0], torch.full((1, 1), -60.0).to(model.item_bias))
    batch = sparse(counts.double())
    expected = torch.autograd.grad(model.training_step(batch, 0), list(model.parameters()), allow_unused=True)
    model.cuda()
    batch = InteractionBatch(*(tensor.cuda() for tensor in batch))
    model.training_step(batch, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model.training_step(batch, 0)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_kl() -> None:
    mean, log_variance = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros_like(mean), 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected)
    assert gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    mean.requires_grad_()
    log_variance.requires_grad_()
    assert torch.autograd.gradcheck(gaussian_kl, (mean, log_variance))


@pytest.mark.parametrize("make", [MultVAE, MultDAE])
def test_float64_losses_are_computed_in_float64(make, monkeypatch) -> None:
    """All terms, on weights and codes that float32 would round."""
    module = make(
        ITEMS,
        (8,),
        4,
        dropout=0.0,
        **({"anneal_cap": 1.0, "total_anneal_steps": 0} if make is MultVAE else {"l2_penalty": 1.0}),
    )
    module.double()
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    counts = sparse((torch.rand(3, ITEMS, generator=torch.Generator().manual_seed(0)) > 0.5).double())
    loss = module.training_step(counts, 0)
    if make is MultVAE:
        expected = gaussian_kl(*module.encode(counts)).mean()
        torch.testing.assert_close(logged["train/kl"], expected, rtol=1e-14, atol=0)
    else:
        squares = sum(
            p.square().sum() for name, p in module.named_parameters() if "weight" in name or "embedding" in name
        )
        torch.testing.assert_close(loss - logged["train/nll"], squares, rtol=1e-13, atol=0)
    assert loss.dtype == module.recommend(counts, 2)[1].dtype == torch.float64


@pytest.mark.parametrize(
    ("total", "step", "beta"),
    [(200_000, 0, 0.0), (200_000, 20_000, 0.1), (200_000, 40_000, 0.2), (200_000, 90_000, 0.2), (0, 0, 0.2)],
)
def test_beta(total, step, beta, monkeypatch) -> None:
    monkeypatch.setattr(MultVAE, "trainer", At(step))
    assert vae(total_anneal_steps=total).beta() == pytest.approx(beta)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = MultVAE(1000, hidden_dims=(60,), latent_dim=20)
    shapes = {"item_embedding": (1000, 60), "encoder.0.weight": (40, 60), "decoder.1.weight": (1000, 60)}
    for name, shape in shapes.items():
        weight = model.get_parameter(name)
        bound = math.sqrt(6 / sum(shape))
        assert weight.shape == shape
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for name in ("item_bias", "encoder.0.bias", "decoder.1.bias"):
        bias = model.get_parameter(name)
        assert 0 < bias.abs().max() <= 0.002
    assert model.decoder[1].bias.std().item() == pytest.approx(0.00088, rel=0.1)  # of a normal cut at 2 deviations
    assert (
        sum(p.numel() for p in MultVAE(20_108).parameters()) == 20_108 * 1201 + 600 + 600 * 400 + 400 + 200 * 600 + 600
    )


def test_recommend(counts) -> None:
    model = vae().train()
    items, logits = model.recommend(counts, k=4)
    assert model.training
    again, _ = model.recommend(sparse(counts), k=4)
    assert torch.equal(items, again)
    expected = model.eval()(counts).detach()
    for user in range(USERS):
        unseen = expected[user].masked_fill(counts[user] > 0, -math.inf)
        best = unseen.topk(4)
        assert items[user].tolist() == best.indices.masked_fill(best.values == -math.inf, -1).tolist()
        torch.testing.assert_close(logits[user], best.values)
    anything, _ = model.recommend(counts, k=ITEMS, exclude_seen=False)
    assert torch.equal(anything, expected.topk(ITEMS).indices)
    with pytest.raises(ValueError, match=r"k must be in \[1, 12\], got 13"):
        model.recommend(counts, k=13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": torch.tensor([0, 12])}, r"items must be in \[0, 11\] for num_items=12, got 0 to 12"),
        ({"items": torch.tensor([-1, 2])}, r"items must be in \[0, 11\]"),
        ({"offsets": torch.tensor([0, 3, 2])}, "offsets must rise from 0 to 2, the number of items"),
        ({"offsets": torch.tensor([0, 1, 1])}, "offsets must rise"),
        ({"offsets": torch.tensor([1, 1, 2])}, "offsets must rise"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets must rise"),
        ({"target_offsets": torch.tensor([0, 0, 1])}, "target_offsets must rise"),
        ({"target_offsets": torch.tensor([0, 0])}, "target_offsets must be as many as offsets, 3, got 2"),
        ({"values": torch.tensor([1.0, -1.0])}, r"values must be in \[0, inf\] .*likelihood='multinomial', got -1"),
        ({"values": torch.tensor([1.0, math.nan])}, "values must be in"),
        ({"values": torch.tensor([1.0])}, "values must be as many as items"),
    ],
)
def test_bad_histories(change, message) -> None:
    nothing = torch.zeros(3, dtype=torch.int64)
    batch = InteractionBatch(torch.tensor([1, 2]), torch.tensor([0, 1, 2]), None, nothing[:0], nothing)
    for use in (vae(), lambda history: vae().recommend(history, 2)):
        with pytest.raises(ValueError, match=message):
            use(batch._replace(**change))


def test_stored_zeros_are_no_interactions(counts) -> None:
    full = torch.ones_like(counts).to_sparse_csr()
    stored = torch.sparse_csr_tensor(full.crow_indices(), full.col_indices(), counts.flatten(), size=counts.shape)
    model = vae().eval()
    torch.testing.assert_close(model(stored), model(counts))
    for ours, dense in zip(model.recommend(stored, k=5), model.recommend(counts, k=5), strict=True):
        torch.testing.assert_close(ours, dense)


def test_other_bad_histories() -> None:
    with pytest.raises(RuntimeError, match="num_items is not known before fit"):
        MultVAE().recommend(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"history must be dense or sparse_csr, got torch.sparse_coo"):
        vae()(torch.zeros(2, ITEMS).to_sparse())
    with pytest.raises(ValueError, match=r"history must have shape \(users, 12\), got \(2, 3\)"):
        vae()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"values must be in \[0, 1\].*'logistic', got 1.0 to 2.0"):
        vae(likelihood="logistic")(torch.tensor([[1.0, 2.0] + [0.0] * 10]))


def fit(model: MultVAE | MultDAE, folder: Any, **options: Any) -> Trainer:
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **off,
        accelerator="cpu",
        use_distributed_sampler=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, movielens(folder))
    return trainer


def movielens(folder: Any) -> MovieLensDataModule:
    if not (folder / "u.data").exists():
        write_u_data(folder, users=120)
    return MovieLensDataModule("100k", str(folder), num_heldout_users=30, batch_size=20)


@pytest.mark.parametrize("kind", [MultVAE, MultDAE])
def test_learns_and_takes_the_number_of_items_from_the_datamodule(kind, tmp_path) -> None:
    """Two kinds of users, each liking half of the items: the seen half tells the rest."""
    torch.manual_seed(0)
    adam = partial(torch.optim.Adam, lr=0.01)
    model = kind(hidden_dims=(), latent_dim=8, recall_at=(3,), ndcg_at=(5,), optimizer=adam)
    trainer = fit(model, tmp_path, max_epochs=40)
    assert model.num_items == 30
    assert trainer.callback_metrics["val/recall@3"] > 0.25  # chance: 3 of 20 unseen items
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.num_items == 30
    results = trainer.test(model, movielens(tmp_path), verbose=False)[0]
    assert results == trainer.test(again, movielens(tmp_path), verbose=False)[0]
    assert 0 < results["test/ndcg@5/se"] < 0.2
    predictions = trainer.predict(again, movielens(tmp_path))
    assert predictions[0][0].shape == (30, 20)
    assert torch.equal(predictions[0][0], trainer.predict(again, movielens(tmp_path))[0][0])


def test_number_of_items_is_asked_for(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_items=None asks the Trainer's datamodule"):
        MultVAE().configure_model()


def test_beta_counts_optimizer_steps_with_accumulated_gradients(tmp_path) -> None:
    model = MultVAE(hidden_dims=(), latent_dim=4, anneal_cap=1.0, total_anneal_steps=100)
    trainer = fit(model, tmp_path, max_epochs=4, accumulate_grad_batches=3)
    assert trainer.global_step == 4  # 60 training users, 3 batches
    assert trainer.callback_metrics["train/beta"] == pytest.approx(0.03)
    assert model.beta() == pytest.approx(0.04)


@pytest.mark.usefixtures("no_trainer")
def test_penalty_of_the_dae_is_adams_coupled_weight_decay_on_matrices(counts) -> None:
    torch.manual_seed(0)
    ours = MultDAE(ITEMS, latent_dim=3, dropout=0.0, l2_penalty=0.01)
    theirs = MultDAE(ITEMS, latent_dim=3, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    groups = [
        {"params": [theirs.item_embedding, theirs.decoder[0].weight], "weight_decay": 0.02},
        {"params": [theirs.item_bias, theirs.decoder[0].bias]},
    ]
    adam, coupled = ours.configure_optimizers(), torch.optim.Adam(groups, lr=1e-3)
    for _ in range(5):
        adam.zero_grad()
        ours.training_step(sparse(counts), 0).backward()
        adam.step()
        coupled.zero_grad()
        dense_nll(theirs(counts), counts, "multinomial", 1.0).backward()
        coupled.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_trainer")
def test_gradients_of_a_training_step_equal_the_dense_loss(counts) -> None:
    """Reparameterised sample, annealed KL, mean over users: in float64 against the formulas."""
    model = vae(dropout=0.0, anneal_cap=0.3, total_anneal_steps=0).double()
    x = counts.double()
    torch.manual_seed(5)
    gradients = torch.autograd.grad(model.training_step(sparse(x), 0), list(model.parameters()))
    torch.manual_seed(5)
    h = dense_forward(model, x)[0]
    mean, log_variance = h.chunk(2, 1)
    q = Normal(mean, (0.5 * log_variance).exp())
    z = mean + torch.randn_like(mean) * q.scale
    logits = model.decode(z)
    loss = -(x * logits.log_softmax(1)).sum(1).mean()
    loss = loss + 0.3 * kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum(1).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the KL is in float32
