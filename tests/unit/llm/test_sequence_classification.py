import importlib
import json
import math
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BertConfig, BertForSequenceClassification

from lit_methods.batches import TokenBatch
from lit_methods.datamodules import TensorDataModule
from lit_methods.llm import SequenceClassification
from lit_methods.optim import MFAC

TINY = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def quiet_trainer(**arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"enable_checkpointing": False, "use_distributed_sampler": False} | arguments)


def rows(n: int, labels=None) -> TokenBatch:
    """Rows of 3 to 6 tokens; the label says whether the first token is below 10."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (n, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (n, 1), generator=generator)).long()
    return TokenBatch(ids * mask, mask, torch.zeros_like(ids), (ids[:, 0] < 10).long() if labels is None else labels)


def data(batch: TokenBatch) -> TensorDataModule:
    return TensorDataModule(train=batch, val=batch, test=batch, batch_size=16)


def learn(labels, epochs=15, **arguments) -> dict[str, float]:
    torch.manual_seed(0)
    module = SequenceClassification(TINY, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), **arguments)
    trainer, rows_ = quiet_trainer(max_epochs=epochs), data(rows(96, labels))
    trainer.fit(module, rows_)
    (results,) = trainer.test(module, rows_, verbose=False)
    return results


def test_learns_to_classify() -> None:
    assert learn(None)["test/accuracy"] > 0.9


def test_learns_to_regress() -> None:
    ids = rows(96).input_ids
    results = learn(ids[:, 0] / 4, epochs=40, num_labels=None)
    assert set(results) == {"test/loss", "test/pearson", "test/spearman"}
    assert results["test/pearson"] > 0.9


def test_takes_mfac() -> None:
    module = SequenceClassification(TINY, optimizer=lambda p: MFAC(p, lr=1e-2, num_grads=8, damping=1e-3))
    before = module.network.classifier.weight.clone()
    quiet_trainer(max_steps=3).fit(module, data(rows(48)))
    assert not torch.equal(module.network.classifier.weight, before)


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("constant", [False, True])
def test_classification_metrics_equal_scikit_learn(num_labels, constant) -> None:
    torch.manual_seed(0)
    names = ["accuracy", "matthews"] + (["f1"] if num_labels == 2 else [])
    batch = rows(50, torch.randint(num_labels, (50,)))
    module = SequenceClassification(TINY, num_labels, metrics=names)
    for layer in (module.network.bert.pooler.dense, module.network.classifier):
        torch.nn.init.normal_(layer.weight)
    module.network.classifier.bias.data[0] = 100.0 * constant
    (results,) = quiet_trainer().test(module, data(batch), verbose=False)
    logits = module.eval()(*batch[:3])
    guesses, truth = logits.argmax(1).tolist(), batch.labels.tolist()
    assert (len(set(guesses)) == 1) == constant
    assert results["test/accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    assert results["test/matthews"] == pytest.approx(matthews_corrcoef(truth, guesses), abs=1e-6)
    if num_labels == 2:
        assert results["test/f1"] == pytest.approx(f1_score(truth, guesses))
    assert results["test/loss"] == pytest.approx(cross_entropy(logits, batch.labels).item(), rel=1e-5)


def test_regression_metrics_equal_scipy() -> None:
    torch.manual_seed(1)
    batch = rows(50, torch.rand(50) * 5)
    module = SequenceClassification(TINY, num_labels=None)
    (results,) = quiet_trainer().test(module, data(batch), verbose=False)
    values = module.eval()(*batch[:3])
    assert values.shape == (50,)
    assert results["test/pearson"] == pytest.approx(pearsonr(values.tolist(), batch.labels.tolist())[0], abs=1e-4)
    assert results["test/spearman"] == pytest.approx(spearmanr(values.tolist(), batch.labels.tolist())[0], abs=1e-4)
    assert results["test/loss"] == pytest.approx(mse_loss(values, batch.labels).item(), rel=1e-5)


def test_padding_changes_nothing() -> None:
    module, batch = SequenceClassification(TINY).eval(), rows(5)
    wider = [torch.nn.functional.pad(tensor, (0, 3)) for tensor in batch[:3]]
    torch.testing.assert_close(module(*wider), module(*batch[:3]))


def test_predictions_are_probabilities_or_values() -> None:
    batch = rows(20)
    probabilities = torch.cat(quiet_trainer().predict(SequenceClassification(TINY, num_labels=3), data(batch)))
    assert probabilities.shape == (20, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
    values = torch.cat(quiet_trainer().predict(SequenceClassification(TINY, num_labels=None), data(batch)))
    assert values.shape == (20,)


def test_models_without_token_types() -> None:
    fields = {"model_type": "distilbert", "vocab_size": 20, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    assert SequenceClassification(fields)(*rows(3)[:3]).shape == (3, 2)


@pytest.mark.parametrize(
    ("warmup", "factors"),
    [(None, [1, 1, 1, 1, 1]), (0.0, [1, 0.8, 0.6, 0.4, 0.2]), (0.4, [0, 0.5, 1, 2 / 3, 1 / 3])],
)
def test_schedule(warmup, factors) -> None:
    seen = []

    class Recorder(SequenceClassification):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(self.optimizers().param_groups[0]["lr"])

    module = Recorder(TINY, warmup=warmup, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    quiet_trainer(max_epochs=1).fit(module, data(rows(80)))
    assert seen == pytest.approx(factors)


def test_schedule_needs_an_end() -> None:
    module = SequenceClassification(TINY, warmup=0.1)
    with pytest.raises(ValueError, match=r"warmup=0\.1 needs a run with an end: set the Trainer's max_epochs"):
        quiet_trainer(max_epochs=-1).fit(module, data(rows(16)))


@pytest.fixture
def saved(tmp_path) -> BertForSequenceClassification:
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    model = BertForSequenceClassification(BertConfig(**fields))
    model.save_pretrained(tmp_path)
    return model


def test_loads_a_folder_in_training_mode(saved, tmp_path) -> None:
    module = SequenceClassification(str(tmp_path), num_labels=2)
    assert module.network.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    for name, tensor in saved.state_dict().items():
        assert torch.equal(module.network.state_dict()[name], tensor)


def test_architecture_completes_and_checks_a_loaded_configuration(saved, tmp_path) -> None:
    """Old configurations do not say what family they are of."""
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    del found["model_type"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="model_type"):
        SequenceClassification(str(tmp_path))
    module = SequenceClassification(str(tmp_path), architecture=TINY)
    assert torch.equal(module.network.bert.pooler.dense.weight, saved.bert.pooler.dense.weight)
    with pytest.raises(ValueError, match=r"architecture says hidden_size=32, but .* has 16"):
        SequenceClassification(str(tmp_path), architecture={**TINY, "hidden_size": 32})
    with pytest.raises(ValueError, match="architecture has no model_type"):
        SequenceClassification(str(tmp_path), architecture={"hidden_size": 16})


def test_direct_build_loads_from_checkpoint(tmp_path) -> None:
    module, trainer = SequenceClassification(TINY, num_labels=3), quiet_trainer(max_steps=1)
    trainer.fit(module, data(rows(16)))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True).eval()
    batch = rows(4)
    torch.testing.assert_close(loaded(*batch[:3]), module.eval()(*batch[:3]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 1}, "num_labels must be at least 2, or None for regression, got 1"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\).*got -0\.1"),
        ({"warmup": math.nan}, "warmup must be"),
        ({"metrics": []}, "metrics must name some of"),
        ({"metrics": ["bleu"]}, r"metrics must name some of \['accuracy', 'f1', 'matthews'\] .* got \['bleu'\]"),
        ({"metrics": ["f1"], "num_labels": 3}, r"metrics must name some of \['accuracy', 'matthews'\]"),
        ({"metrics": ["accuracy"], "num_labels": None}, r"metrics must name some of \['pearson', 'spearman'\]"),
        ({"model": {"hidden_size": 8}}, r"model has no model_type among \['hidden_size'\]"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassification(**({"model": TINY} | arguments))


def test_no_transformers(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lit_methods.llm.sequence_classification")
    with pytest.raises(ModuleNotFoundError, match=r'needs transformers: pip install "lit-methods\[llm\]"'):
        importlib.import_module("lit_methods.llm.sequence_classification")
