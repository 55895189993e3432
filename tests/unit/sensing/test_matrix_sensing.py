import math

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.batches import EntriesBatch, MatrixBatch, RankOneBatch, SensingBatch
from lit_methods.datamodules import SensingDataModule
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing, rebalance_factors_


def all_entries(matrix) -> EntriesBatch:
    rows, columns = matrix.shape
    index = torch.arange(rows * columns)
    return EntriesBatch(index // columns, index % columns, (rows * columns) ** 0.5 * matrix.flatten())


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def descend(module, batch, steps, lr=0.1):
    """Plain gradient descent without a Trainer."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()


def low_rank(n=20, r=2):
    u = torch.linalg.qr(random(n, r)).Q
    return u @ u.T


@pytest.mark.parametrize("dense", [True, False])
def test_symmetric_gradient_is_the_papers(dense):
    a = random(30, 6, 6)
    a = (a + a.mT) / 2
    m = low_rank(6, 2)
    x = random(2, 6, 4, seed=1)
    module = SymmetricSensing(6, 4, (1.0, 0.5)).double()
    module.factor.data.copy_(x)
    batch = SensingBatch(a, (a * m).sum((1, 2))) if dense else all_entries(m)
    module.training_step(batch, 0).backward()
    residual = x @ x.mT - m
    if dense:  # A*A(R) = mean_i <A_i, R> A_i
        residual = torch.einsum("mij,rm->rij", a, torch.einsum("mij,rij->rm", a, residual)) / 30
    torch.testing.assert_close(module.factor.grad, residual @ x)


@pytest.mark.parametrize("dense", [True, False])
def test_asymmetric_gradients_are_the_papers(dense):
    a = random(40, 5, 7)
    m = random(5, 7, seed=2)
    module = AsymmetricSensing(5, 7, 3, (1.0, 0.5)).double()
    batch = SensingBatch(a, (a * m).sum((1, 2))) if dense else all_entries(m)
    module.training_step(batch, 0).backward()
    f, g = module.left.detach(), module.right.detach()
    residual = f @ g.mT - m
    if dense:
        residual = torch.einsum("mij,rm->rij", a, torch.einsum("mij,rij->rm", a, residual)) / 40
    torch.testing.assert_close(module.left.grad, residual @ g)
    torch.testing.assert_close(module.right.grad, residual.mT @ f)


def test_measurements_are_isotropic_and_batches_of_both_kinds_agree():
    data = SensingDataModule(rows=8, columns=6, rank=2, num_measurements=20000, symmetric=False, dtype="float64")
    data.setup("fit")
    matrix = data.val_data.matrix[0]
    assert float(data.train_data.values.square().mean() / matrix.square().sum()) == pytest.approx(1, abs=0.05)
    f, g = random(3, 8, 4), random(3, 6, 4, seed=1)
    entries = all_entries(matrix)
    index = entries.rows * 6 + entries.columns
    dense = SensingBatch(48**0.5 * torch.eye(48, dtype=torch.float64).reshape(48, 8, 6)[index], entries.values)
    torch.testing.assert_close(entries.measure(f, g), dense.measure(f, g))
    torch.testing.assert_close(entries.measure(f, g).square().mean(-1), (f @ g.mT).square().sum((-2, -1)))


def test_rank_one_measurements_are_those_of_their_matrices_and_isotropic():
    data = SensingDataModule(8, 6, 2, 20000, "rank_one", symmetric=False, dtype="float64")
    data.setup("fit")
    a, b, values = data.train_data
    (matrix,) = data.val_data.matrix
    assert float(values.square().mean() / matrix.square().sum()) == pytest.approx(1, abs=0.05)
    dense = SensingBatch(a[:50, :, None] * b[:50, None], values[:50])
    torch.testing.assert_close((dense.matrices * matrix).sum((1, 2)), values[:50])
    f, g = random(3, 8, 4), random(3, 6, 4, seed=1)
    torch.testing.assert_close(RankOneBatch(a[:50], b[:50], values[:50]).measure(f, g), dense.measure(f, g))


@pytest.mark.parametrize("measurements", ["gaussian", "rank_one", "entries"])
def test_the_adjoint_is_autograds(measurements):
    """<A(F G^T), v> = <F G^T, A*(v)> with A* from the gradient at any other point, A being linear."""
    data = SensingDataModule(8, 6, 2, 40, measurements, symmetric=False, dtype="float64")
    data.setup("fit")
    v, eye = random(40, seed=3), torch.eye(6, dtype=torch.float64)
    m = random(8, 6, seed=4).requires_grad_()
    (adjoint,) = torch.autograd.grad(data.train_data.measure(m, eye) @ v, m)
    f, g = random(8, 3), random(6, 3, seed=1)
    torch.testing.assert_close(data.train_data.measure(f, g) @ v, (f @ g.T * adjoint).sum())


@pytest.mark.parametrize("measurements", ["gaussian", "rank_one", "entries"])
def test_recovers_from_fewer_measurements_than_entries(measurements):
    data = SensingDataModule(20, 15, 1, 250, measurements, symmetric=False, dtype="float64")
    data.setup("fit")
    torch.manual_seed(0)
    module = AsymmetricSensing(20, 15, 1, (0.5,)).double()
    descend(module, data.train_data, 1500, lr=0.1)
    assert float((module() - data.val_data.matrix).detach().square().sum()) < 1e-8


def test_superfluous_eigenvalues_decay_like_one_over_t():
    """For M = 0 each eigenvalue l of X X^T obeys l <- l (1 - lr l)^2; the card's numbers at l = 0.09, t = 1000."""
    module = SymmetricSensing(4, 4).double()
    module.factor.data.copy_(0.3 * torch.eye(4))
    descend(module, all_entries(torch.zeros(4, 4, dtype=torch.float64)), 1000)
    value = 0.09
    for _ in range(1000):
        value *= (1 - 0.1 * value) ** 2
    torch.testing.assert_close(module()[0], value * torch.eye(4, dtype=torch.float64))
    assert value == pytest.approx(0.0047269, abs=1e-7)
    assert value == pytest.approx(1 / (2 * 0.1 * 1000 + 1 / 0.09), rel=0.003)


def test_imbalance_is_conserved_to_second_order():
    m = random(6, 6)
    drift = []
    for lr in (1e-3, 1e-4):
        torch.manual_seed(0)
        module = AsymmetricSensing(6, 6, 3, (1.0,)).double()
        before = (module.left.mT @ module.left - module.right.mT @ module.right).detach()
        descend(module, all_entries(m), 1, lr)
        after = module.left.mT @ module.left - module.right.mT @ module.right
        drift.append(float((after - before).norm().detach()))
    assert drift[0] / drift[1] == pytest.approx(100, rel=0.01)


def test_the_three_rates():
    """k > r: the symmetric factorisation is stuck at 1/t^2, the asymmetric is not, and one step makes it fast."""
    torch.manual_seed(0)
    matrix = low_rank()
    batch = all_entries(matrix)
    exact, over = SymmetricSensing(20, 2).double(), SymmetricSensing(20, 4).double()
    two = AsymmetricSensing(20, 20, 4, (0.5, 0.25)).double()
    rebalanced = AsymmetricSensing(20, 20, 4, (0.5, 0.05)).double()
    descend(rebalanced, batch, 400)
    beta = rebalance_factors_(rebalanced.left.data, rebalanced.right.data, beta=0.5)
    torch.testing.assert_close(beta, torch.tensor([0.5, 0.5], dtype=torch.float64))
    descend(rebalanced, batch, 100)
    early = ((rebalanced() - matrix) ** 2).sum((-2, -1)).detach()
    descend(rebalanced, batch, 200)
    late = ((rebalanced() - matrix) ** 2).sum((-2, -1)).detach()
    rate = (late / early).log() / 200
    torch.testing.assert_close(rate, torch.full_like(rate, 2 * math.log(1 - 0.1 * 0.5**2)), rtol=0.05, atol=0)
    for module in (exact, over, two):
        descend(module, batch, 2000)
    errors = [float(e) for m in (exact, over, two) for e in ((m() - matrix) ** 2).sum((-2, -1)).detach()]
    assert errors[0] < 1e-25
    assert errors[1] == pytest.approx(2 / (2 * 0.1 * 2000) ** 2, rel=0.6)
    assert errors[2] < 1e-20 < errors[3] < 1e-8


def test_evaluation_logs_errors_of_every_run(tmp_path):
    module = AsymmetricSensing(6, 5, 3, (0.5, 0.25))
    data = SensingDataModule(6, 5, 2, 60, symmetric=False, steps_per_epoch=3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, use_distributed_sampler=False, **quiet)
    trainer.fit(module, data)
    assert trainer.global_step == 3
    logged = trainer.callback_metrics
    errors = (module() - data.val_data.matrix).square().sum((-2, -1))
    assert float(logged["val/error/0.5"]) == pytest.approx(float(errors[0]), rel=1e-5)
    assert float(logged["val/error"]) == pytest.approx(float(errors.max()), rel=1e-5)
    assert float(logged["val/sigma_min/0.25"]) == pytest.approx(
        float(torch.linalg.svdvals(module.left[1])[-1]), rel=1e-4
    )
    f, g = module.left[0], module.right[0]
    assert float(logged["val/imbalance/0.5"]) == pytest.approx(float((f.T @ f - g.T @ g).norm()), rel=1e-4)
    torch.testing.assert_close(trainer.predict(module, data)[0], module().detach())


def fit(module, data, folder):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, default_root_dir=folder, use_distributed_sampler=False, **quiet).fit(module, data)


def test_a_problem_that_the_factors_cannot_solve_is_refused(tmp_path):
    """Before anything is trained: in the Trainer's sanity check."""
    asymmetric = SensingDataModule(6, rank=2, symmetric=False, num_measurements=40)
    with pytest.raises(ValueError, match="matrix is not symmetric and cannot be X X"):
        fit(SymmetricSensing(6, 3), asymmetric, tmp_path)
    for size, measurements in ((7, "gaussian"), (8, "entries")):
        data = SensingDataModule(6, rank=2, measurements=measurements, num_measurements=36)
        with pytest.raises(
            ValueError, match=rf"The data's matrix is \(6, 6\), but the factors make one of \({size}, 6"
        ):
            fit(AsymmetricSensing(size, 6, 3), data, tmp_path)
    batch = SensingBatch(torch.ones(2, 6, 5), torch.ones(2))
    with pytest.raises(ValueError, match=r"matrices must be \(batch, 5, 6\) to measure left right\^T, got \(2, 6, 5\)"):
        batch.measure(torch.ones(5, 3), torch.ones(6, 3))  # as many entries, which would go unnoticed


def test_initial_scales():
    torch.manual_seed(0)
    module = AsymmetricSensing(400, 200, 300, (2.0, 0.1), imbalance=4)
    assert float(module.left[0].std()) == pytest.approx(2 / 20, rel=0.02)
    assert float(module.left[1].std()) == pytest.approx(0.1 / 20, rel=0.02)
    assert float(module.right[0].std()) == pytest.approx(2 / 4 / 200**0.5, rel=0.02)
    assert float(SymmetricSensing(400, 300, (1.0,)).factor.std()) == pytest.approx(1 / 20, rel=0.02)


def test_matrix_batch_is_the_validation_contract():
    module = SymmetricSensing(3, 1)
    assert torch.equal(module.predict_step(MatrixBatch(torch.zeros(1, 3, 3)), 0), module())
