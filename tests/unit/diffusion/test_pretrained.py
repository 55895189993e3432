from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_methods.diffusion import Denoiser, Diffusion, FDistill, TimeMLP, load_denoiser
from tests.standins.digits_teacher import write_digits_teacher


def saved(module: Diffusion | FDistill, path: Path) -> str:
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", fast_dev_run=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def test_a_checkpoint_of_the_command_line_says_how_it_was_built(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    write_digits_teacher(path)
    denoiser = load_denoiser(str(path))
    assert repr(denoiser.process) == "FlowMatching()"
    assert denoiser.sample_shape == [1, 8, 8]
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(denoiser.net.inner.weight, weights["denoiser.net.inner.weight"])


def test_weights_go_into_a_denoiser_that_is_given(tmp_path: Path) -> None:
    teacher = Denoiser(TimeMLP([2], width=8), "edm", "edm", "edm")
    path = saved(FDistill(teacher), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"denoiser must be given for .*a.ckpt"):
        load_denoiser(path)
    other = Denoiser(TimeMLP([2], width=8), "edm", "edm", "edm")
    assert load_denoiser(path, other) is other, "the student's"
    assert torch.equal(other.net.inner.weight, teacher.net.inner.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_denoiser(path, Denoiser(TimeMLP([2], width=9)))


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.ckpt"):
        load_denoiser("nowhere.ckpt")
    torch.save({"state_dict": {"network.weight": torch.ones(1)}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint must hold one of \['denoiser', 'student'\]"):
        load_denoiser(str(tmp_path / "b.ckpt"))
