import torch

from lit_methods.datamodules import SparseTeacherDataModule


def test_few_positive_inputs_explain_a_target_of_unit_variance() -> None:
    data = SparseTeacherDataModule(num_inputs=200, num_relevant=7, train_size=4000, val_size=5, test_size=0)
    data.setup("fit")
    x, y = data.train_data
    assert x.shape == (4000, 200)
    assert 0 <= float(x.min()) < 0.01
    assert 1.99 < float(x.max()) <= 2
    assert int((data.teacher > 0).sum()) == int((data.teacher != 0).sum()) == 7
    torch.testing.assert_close(y[:, 0], x @ data.teacher)
    torch.testing.assert_close(y.var(), torch.tensor(1.0), rtol=0.05, atol=0)
    assert len(data.val_data.x) == 5
    assert data.test_dataloader() == []


def test_noise_has_its_deviation() -> None:
    data = SparseTeacherDataModule(num_inputs=20, train_size=4000, noise_std=0.5)
    data.setup("fit")
    x, y = data.train_data
    torch.testing.assert_close((y[:, 0] - x @ data.teacher).std(), torch.tensor(0.5), rtol=0.05, atol=0)
