"""Mult-VAE beside EASE, RecBole's MultiVAE and cornac's VAECF: quality on MovieLens-100K, and the cost of a step.

    PYTHONPATH=<a folder with the peers> python -m tests.benchmarks.bench_mult_vae [quality] [wmf] [epoch] [step]

Peers are trained on the same users and items and ranked by our metrics on the same held-out users. RecBole's and
cornac's own splits hold out interactions of known users, so their models are driven directly: RecBole's ``MultiVAE``
by ``calculate_loss`` with its Trainer's optimizer (Adam), cornac's ``VAECF`` by ``fit``.
"""

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from lit_methods.batches import InteractionBatch
from lit_methods.datamodules import MovieLensDataModule
from lit_methods.metrics import NDCGAtK, RecallAtK, top_unseen_items
from lit_methods.vi import EASE, MultDAE, MultVAE
from tests.benchmarks import harness

SEEDS = range(5)
EPOCHS = 45
Scores = Callable[[InteractionBatch], Tensor]
Result = dict[str, float]


def movielens() -> MovieLensDataModule:
    """MovieLens-100K with 150 + 150 held-out users, from ``data/movielens`` or recbole's wheel."""
    data = MovieLensDataModule("100k", num_heldout_users=150, batch_size=100)
    data.prepare_data()
    data.setup("fit")
    return data


def training_histories(data: MovieLensDataModule) -> InteractionBatch:
    """All training users in one batch."""
    assert data.train_data is not None
    return data.transform(data.train_data)  # type: ignore[misc]


def evaluate(scores: Scores, data: MovieLensDataModule) -> Result:
    """Recall@20, Recall@50 and NDCG@100 of validation and test users."""
    result = {}
    for stage, users in (("val", data.val_data), ("test", data.test_data)):
        batch = data.transform(users)  # type: ignore[misc]
        with torch.no_grad():
            ranked, _ = top_unseen_items(scores(batch).clone(), batch, 100)
        for name, metric in (("recall@20", RecallAtK(20)), ("recall@50", RecallAtK(50)), ("ndcg@100", NDCGAtK(100))):
            metric.update(ranked, batch.target_items, batch.target_offsets)
            result[f"{stage}/{name}"] = float(metric.compute())
    return result


def fit(make: Callable[[], LightningModule], seed: int, data: MovieLensDataModule) -> Result:
    """Train by the Trainer, keep the epoch with the best validation NDCG@100."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/ndcg@100", mode="max", save_weights_only=True)
        trainer = Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=[best],
        )
        module = make()
        data.seed = seed
        trainer.fit(module, data)
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return evaluate(module.eval(), data)


def popularity(data: MovieLensDataModule) -> Scores:
    assert data.num_items is not None
    counts = training_histories(data).items.bincount(minlength=data.num_items).float()
    return lambda batch: counts.expand(batch.num_users, -1)


def dense(batch: InteractionBatch, num_items: int, shift: int = 0) -> Tensor:
    x = torch.zeros(batch.num_users, num_items + shift)
    x[batch.rows(), batch.items + shift] = 1
    return x


class _RecBoleUsers:
    """What RecBole's MultiVAE asks of its dataset: users and items from 1, item 0 is padding."""

    def __init__(self, histories: InteractionBatch, num_items: int) -> None:
        self.histories, self.num_items = histories, num_items

    def num(self, field: str) -> int:
        return self.histories.num_users + 1 if field == "user_id" else self.num_items + 1

    def history_item_matrix(self) -> tuple[Tensor, Tensor, Tensor]:
        h = self.histories
        lengths = functional.pad(h.offsets.diff(), (1, 0))
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        places = torch.arange(len(h.items)) - h.offsets[:-1].repeat_interleave(h.offsets.diff())
        ids[h.rows() + 1, places] = h.items + 1
        return ids, (ids > 0).float(), lengths


def recbole_model(histories: InteractionBatch, num_items: int, total_anneal_steps: int) -> nn.Module:
    """RecBole's ``latent_dimension`` is that of the mean and the log variance together."""
    module = harness.peer("recbole.model.general_recommender.multivae")
    assert module is not None
    config = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "NEG_PREFIX": "neg_",
        "device": torch.device("cpu"),
        "mlp_hidden_size": [600],
        "latent_dimension": 400,
        "dropout_prob": 0.5,
        "anneal_cap": 0.2,
        "total_anneal_steps": total_anneal_steps,
    }
    return module.MultiVAE(config, _RecBoleUsers(histories, num_items))


def recbole(seed: int, data: MovieLensDataModule) -> Result:
    torch.manual_seed(seed)
    assert data.num_items is not None
    histories = training_histories(data)
    model: Any = recbole_model(histories, data.num_items, 150)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)

    def scores(batch: InteractionBatch) -> Tensor:
        return model(dense(batch, data.num_items or 0, shift=1))[0][:, 1:]

    best = {"val/ndcg@100": 0.0}
    for _ in range(EPOCHS):
        recbole_epoch(model.train(), adam, histories.num_users)
        model.eval()
        best = max(best, evaluate(scores, data), key=lambda result: result["val/ndcg@100"])
    return best


def recbole_epoch(model: Any, adam: torch.optim.Optimizer, num_users: int) -> None:
    for users in (1 + torch.randperm(num_users)).split(100):
        adam.zero_grad()
        model.calculate_loss({"user_id": users}).backward()
        adam.step()


def cornac_dataset(histories: InteractionBatch) -> Any:
    cornac = harness.peer("cornac.data")
    assert cornac is not None
    rows, items = histories.rows().tolist(), histories.items.tolist()
    return cornac.Dataset.from_uir([(user, item, 1.0) for user, item in zip(rows, items, strict=True)], seed=0)


def cornac(seed: int, data: MovieLensDataModule) -> Result:
    """It has no early stopping: the best of three numbers of epochs and two betas on validation."""
    models = harness.peer("cornac.models")
    assert models is not None
    assert data.num_items is not None
    train_set = cornac_dataset(training_histories(data))
    columns = torch.tensor([train_set.iid_map[item] for item in range(data.num_items)])
    best = {"val/ndcg@100": 0.0}
    for beta in (0.2, 1.0):
        for epochs in (10, 20, 45):
            model = models.VAECF(
                k=200, autoencoder_structure=[600], n_epochs=epochs, batch_size=100, beta=beta, seed=seed
            )
            model.fit(train_set)

            def scores(batch: InteractionBatch, vae: Any = model.vae) -> Tensor:
                x = torch.zeros(batch.num_users, len(columns))
                x[batch.rows(), columns[batch.items]] = 1
                return vae.decode(vae.encode(x)[0])[:, columns]

            best = max(best, evaluate(scores, data), key=lambda r: r["val/ndcg@100"])
    return best


OURS: dict[str, Callable[[], LightningModule]] = {
    "Mult-VAE, beta to 0.2": lambda: MultVAE(total_anneal_steps=150),
    "Mult-VAE, beta to 1": lambda: MultVAE(anneal_cap=1.0, total_anneal_steps=150),
    "Mult-VAE, beta 0": lambda: MultVAE(anneal_cap=0.0),
    "Mult-VAE, gaussian": lambda: MultVAE(likelihood="gaussian", total_anneal_steps=150),
    "Mult-VAE, logistic": lambda: MultVAE(likelihood="logistic", total_anneal_steps=150),
    "Mult-DAE": lambda: MultDAE(l2_penalty=1e-4),
}


def row(name: str, results: list[Result]) -> dict[str, Any]:
    """Means over seeds, and their standard deviation for NDCG@100."""
    keys = [f"{stage}/{metric}" for stage in ("val", "test") for metric in ("recall@20", "recall@50", "ndcg@100")]
    values: dict[str, Any] = {"method": name, "seeds": len(results)}
    values |= {key: round(mean(result[key] for result in results), 4) for key in keys}
    for key in ("val/ndcg@100", "test/ndcg@100"):
        values[f"{key} std"] = round(stdev(r[key] for r in results), 4) if len(results) > 1 else ""
    return values


def quality() -> None:
    data = movielens()
    assert data.num_items is not None
    rows = [
        row("popularity", [evaluate(popularity(data), data)]),
        row("EASE, l2 100", [evaluate(EASE(training_histories(data), data.num_items, 100.0), data)]),
    ]
    contenders: dict[str, Callable[[int], Result]] = {
        name: lambda seed, make=make: fit(make, seed, data)  # type: ignore[misc]
        for name, make in OURS.items()
    }
    if harness.peer("recbole.model.general_recommender.multivae"):
        contenders["RecBole MultiVAE"] = lambda seed: recbole(seed, data)
    if harness.peer("cornac.models"):
        contenders["cornac VAECF"] = lambda seed: cornac(seed, data)
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for seed in SEEDS:
        for name, run in contenders.items():
            results[name].append(run(seed))
    rows += [row(name, found) for name, found in results.items()]
    harness.save("mult_vae", "MovieLens-100K, 150 test users", rows, ("lightning", "recbole", "cornac"))


def wmf() -> None:
    """Weighted matrix factorisation, the paper's baseline, by implicit's ALS; its settings are chosen on validation."""
    als = harness.peer("implicit.cpu.als")
    if als is None:
        return
    data = movielens()
    shape = (training_histories(data).num_users, data.num_items or 0)

    def matrix(batch: InteractionBatch) -> sparse.csr_matrix:
        ones = torch.ones(len(batch.items)).numpy()
        return sparse.csr_matrix((ones, batch.items.numpy(), batch.offsets.numpy()), (batch.num_users, shape[1]))

    def result(seed: int, factors: int, alpha: float, regularization: float) -> Result:
        model = als.AlternatingLeastSquares(
            factors=factors, alpha=alpha, regularization=regularization, random_state=seed, num_threads=1
        )
        model.fit(matrix(training_histories(data)), show_progress=False)

        def scores(batch: InteractionBatch) -> Tensor:
            users = model.recalculate_user(range(batch.num_users), matrix(batch))
            return torch.from_numpy(users @ model.item_factors.T)

        return evaluate(scores, data)

    grid = list(product((16, 32, 64, 128), (1.0, 5.0, 20.0), (1.0, 10.0, 30.0, 100.0)))
    best = max(grid, key=lambda settings: result(0, *settings)["val/ndcg@100"])
    found = row("WMF, implicit", [result(seed, *best) for seed in SEEDS])
    found |= dict(zip(("factors", "alpha", "regularization"), best, strict=True))
    harness.save("mult_vae", "MovieLens-100K, 150 test users: WMF", [found], ("implicit",))


def epoch(rounds: int = 10, epochs: int = 5) -> None:
    """Training epochs on MovieLens-100K, without evaluation; ours by the Trainer, peers in bare loops."""
    data = movielens()
    assert data.num_items is not None
    histories = training_histories(data)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def ours(make: Callable[[], LightningModule]) -> None:
        off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(
            **off,
            max_epochs=epochs,
            accelerator="cpu",
            enable_checkpointing=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        ).fit(make(), data)

    contenders: dict[str, Callable[[], object]] = {
        "ours, Mult-VAE in the Trainer": lambda: ours(OURS["Mult-VAE, beta to 0.2"]),
        "ours, Mult-DAE in the Trainer": lambda: ours(OURS["Mult-DAE"]),
    }
    if harness.peer("recbole.model.general_recommender.multivae"):
        model: Any = recbole_model(histories, data.num_items, 150)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        users = histories.num_users
        contenders["RecBole MultiVAE"] = lambda: [recbole_epoch(model, adam, users) for _ in range(epochs)]
    if vaecf := harness.peer("cornac.models.vaecf.vaecf"):
        train_set = cornac_dataset(histories)
        vae = vaecf.VAE(200, [train_set.num_items, 600], "tanh", "mult")
        contenders["cornac VAECF"] = lambda: vaecf.learn(vae, train_set, epochs, 100, 1e-3, 0.2, False)
    seconds = harness.alternate(contenders, rounds=rounds, warmup=1, clock=time.process_time)
    per_epoch = {name: [value / epochs for value in values] for name, values in seconds.items()}
    rows = harness.ratios(per_epoch, "ours, Mult-VAE in the Trainer")
    harness.save("mult_vae", "a training epoch on MovieLens-100K, CPU time", rows, ("lightning", "recbole", "cornac"))


NUM_ITEMS, BATCH = 20_108, 500  # MovieLens-20M's; 73.1 interactions a user


def synthetic(users: int, seed: int = 0) -> InteractionBatch:
    """Users of MovieLens-20M's shape: log-normal history lengths with mean 73, items by a power law."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(users, generator=generator) + 3.78).exp().clamp(5, 1500).long()
    weights = (torch.arange(NUM_ITEMS) + 50.0) ** -1.1
    items = torch.cat([torch.multinomial(weights, int(n), generator=generator) for n in lengths])
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    return InteractionBatch(items, offsets, None, items[:0], torch.zeros_like(offsets))


def with_all_items(histories: InteractionBatch) -> InteractionBatch:
    """The last user gets the items that nobody has, for peers that know only items they have seen."""
    known = histories.items.bincount(minlength=NUM_ITEMS) > 0
    items = torch.cat([histories.items, (~known).nonzero().squeeze(1)])
    offsets = histories.offsets.clone()
    offsets[-1] = len(items)
    return histories._replace(items=items, offsets=offsets)


def part(histories: InteractionBatch, start: int, stop: int) -> InteractionBatch:
    offsets = histories.offsets[start : stop + 1]
    zeros = torch.zeros_like(offsets)
    return InteractionBatch(histories.items[offsets[0] : offsets[-1]], offsets - offsets[0], None, zeros[:0], zeros)


def ours_step(batches: list[InteractionBatch], autocast: bool = False) -> Callable[[], None]:
    torch.manual_seed(0)
    model = MultVAE(NUM_ITEMS, total_anneal_steps=0)  # beta is 0.2 from the start: no Trainer is asked for its steps
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    optimizer = model.configure_optimizers()

    def loss(batch: InteractionBatch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.training_step(batch, 0)

    return stepper(batches, optimizer, loss)


def stepper(
    batches: list[InteractionBatch], optimizer: torch.optim.Optimizer, loss: Callable[[InteractionBatch], Tensor]
) -> Callable[[], None]:
    turn = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        loss(batches[next(turn) % len(batches)]).backward()
        optimizer.step()

    return step


def dense_step(batches: list[InteractionBatch], fused: bool) -> Callable[[], None]:
    """The method as one writes it in plain torch, without waste: dense rows, ``log_softmax``, Adam."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(NUM_ITEMS, 600), nn.Tanh(), nn.Linear(600, 400))
    decoder = nn.Sequential(nn.Linear(200, 600), nn.Tanh(), nn.Linear(600, NUM_ITEMS))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=fused)

    def loss(batch: InteractionBatch) -> Tensor:
        x = dense(batch, NUM_ITEMS)
        mu, logvar = encoder(functional.dropout(functional.normalize(x), 0.5)).chunk(2, 1)
        logits = decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
        kl = 0.5 * (logvar.exp() - logvar + mu**2 - 1).sum(1).mean()
        return -(x * logits.log_softmax(1)).sum(1).mean() + 0.2 * kl

    return stepper(batches, optimizer, loss)


def recbole_step(histories: InteractionBatch, batches: list[InteractionBatch]) -> Callable[[], None]:
    model: Any = recbole_model(histories, NUM_ITEMS, 0)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    turn = iter(range(10**9))

    def step() -> None:
        start = next(turn) % len(batches) * BATCH
        adam.zero_grad()
        model.calculate_loss({"user_id": torch.arange(start + 1, start + BATCH + 1)}).backward()
        adam.step()

    return step


def cornac_step(histories: InteractionBatch) -> Callable[[], None]:
    """One epoch by its ``learn``, which makes a new Adam."""
    vaecf = harness.peer("cornac.models.vaecf.vaecf")
    assert vaecf is not None
    train_set = cornac_dataset(histories)
    vae = vaecf.VAE(200, [train_set.num_items, 600], "tanh", "mult")
    return lambda: vaecf.learn(vae, train_set, 1, BATCH, 1e-3, 0.2, False)


def output_layer_floor() -> Callable[[], None]:
    """The three products of the output layer: logits, and the gradients of its input and its matrix."""
    hidden, weight = torch.randn(BATCH, 600), torch.randn(NUM_ITEMS, 600)
    logits, gradient = torch.empty(BATCH, NUM_ITEMS), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden, out=gradient)

    return products


def step(rounds: int = 10) -> None:
    """One update at MovieLens-20M's shape."""
    histories = synthetic(BATCH * 4)
    batches = [part(histories, start, start + BATCH) for start in range(0, BATCH * 4, BATCH)]
    contenders: dict[str, Callable[[], object]] = {
        "ours": ours_step(batches),
        "ours, bf16 autocast": ours_step(batches, autocast=True),
        "plain torch, dense, fused Adam": dense_step(batches, fused=True),
        "plain torch, dense, default Adam": dense_step(batches, fused=False),
        "floor: the output layer's three products": output_layer_floor(),
    }
    if harness.peer("recbole.model.general_recommender.multivae"):
        contenders["RecBole MultiVAE"] = recbole_step(histories, batches)
    if harness.peer("cornac.models.vaecf.vaecf"):
        contenders["cornac VAECF"] = cornac_step(with_all_items(histories))
    seconds = harness.alternate(contenders, rounds=rounds, warmup=1, clock=time.process_time)
    if "cornac VAECF" in seconds:
        seconds["cornac VAECF"] = [value / len(batches) for value in seconds["cornac VAECF"]]
    rows = harness.ratios(seconds, "ours")
    flops = 2 * BATCH * 600 * NUM_ITEMS * 3
    for found in rows:
        found["output layer's flop / s"] = f"{flops / found['median_ms'] * 1e3:.2e}"
    harness.save("mult_vae", f"one update, {NUM_ITEMS} items, {BATCH} users, CPU time", rows, ("recbole", "cornac"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in sys.argv[1:] or ["quality", "wmf", "epoch", "step"]:
        {"quality": quality, "wmf": wmf, "epoch": epoch, "step": step}[section]()
