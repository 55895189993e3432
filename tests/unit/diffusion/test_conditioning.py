from pathlib import Path

import pytest
import torch

from lit_methods.diffusion import Labels, Sequences, Vectors


def test_null_conditions_of_every_kind(tmp_path: Path) -> None:
    assert Labels(3).nulls(2).tolist() == [3, 3]
    assert Vectors(4).nulls(2).shape == (2, 4)
    torch.save(torch.arange(6.0).view(2, 3), tmp_path / "null.pt")
    words = Sequences(2, 3, str(tmp_path / "null.pt"), dropout=0.5)
    assert words.nulls(2)[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    cond = torch.full((100, 2, 3), 9.0)
    words.check(cond)
    dropped = words.drop(cond, torch.Generator().manual_seed(0))
    assert 30 < int((dropped[:, 0, 0] == 0).sum()) < 70
    assert set(dropped[:, 1, 2].tolist()) == {5.0, 9.0}


def test_bad_sequences(tmp_path: Path) -> None:
    torch.save(torch.zeros(3, 2), tmp_path / "null.pt")
    with pytest.raises(ValueError, match=r"null_file must hold a tensor \(2, 3\), got \(3, 2\)"):
        Sequences(2, 3, str(tmp_path / "null.pt"))
    with pytest.raises(FileNotFoundError, match="there is no nowhere"):
        Sequences(2, 3, "nowhere")
    with pytest.raises(ValueError, match="length and features must be >= 1"):
        Sequences(0, 3)
    with pytest.raises(ValueError, match=r"cond must be floating-point \(batch, 2, 3\), got torch.float32 \(5, 3, 2\)"):
        Sequences(2, 3).check(torch.zeros(5, 3, 2))
