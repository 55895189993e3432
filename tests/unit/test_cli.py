import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_methods.cli import RECIPES, main
from tests.cli import run_here
from tests.contract.pieces import ROOT, recipe_names


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command; returns (exit status, stdout, stderr)."""

    def run(*args: str) -> tuple[int | str | None, str, str]:
        status: int | str | None = 0
        try:
            run_here(monkeypatch, tmp_path, *args)
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--config", "mfac/digit"], ["no packaged recipe 'mfac/digit'", "'mfac/digits'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--trainer.max_epoch=3"], ["--trainer.max_epoch=3", "'--trainer.max_epochs'"]),
        (["--trainer.max_epochs=x"], ["trainer.max_epochs", "int", "'x'"]),
        (["--model.nun_classes=3"], ["'nun_classes' is not accepted", "'num_classes'"]),
        (["--model.network.init_args.in_featurs=3"], ["model.network", "'in_featurs'", "'in_features'"]),
        (["--model=lit_methods.supervised.SupervisedModul"], ["'SupervisedModul'", "'SupervisedModule'"]),
        (["--data=lit_methods.datamodule.DigitsDataModule"], ["'datamodule'", "'datamodules'"]),
        (["--model.optimizer=torch.optim.SDG"], ["model.optimizer", "'SDG'", "'SGD'"]),
        (["--model.optimizer=lit_methods.optim.MFACK"], ["'MFACK'", "'MFAC'"]),
        (
            ["--model.optimizer=lit_methods.optim.SSO", "--model.optimizer.init_args.inner_steps=3"],
            ["inner_steps", "it is now steps of inner"],
        ),
        (
            ["--model.optimizer=lit_methods.optim.CBO", "--model.optimizer.init_args.init_std=3"],
            ["init_std", "it is now init.std"],
        ),
        (["--model.optimizer.init_args.num_grad=3"], ["'num_grad'", "'num_grads'"]),
        (["--model.num_classes=1"], ["num_classes must be at least 2", "got 1"]),
        (["--model.optimizer.init_args.lr=-1"], ["configure_optimizers", "lr must be >= 0", "-1.0"]),
        (["--data.batch_size=0"], ["batch_size=0"]),
        (["--trainer.accelerator=quantum"], ["quantum"]),
        (["--trainer.callbacks+=foo.Bar"], ["trainer.callbacks", "foo"]),
    ],
)
def test_mistakes_end_in_one_clear_line(command, args, parts) -> None:
    status, _, err = command("fit", "--config", "mfac/digits", *args)
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert "Traceback" not in err
    assert last.startswith("lit-methods: error: ")
    for part in parts:
        assert part in last


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer: {max_epoch: 3}", ["trainer.max_epoch", "max_epochs"]),
        ("trainer: {max_epochs: [3", ["parsing"]),
        ("model: {class_path: lit_methods.supervised.Supervise}", ["'Supervise'", "'SupervisedModule'"]),
    ],
)
def test_mistakes_in_a_config_file_end_in_one_clear_line(command, tmp_path, text, parts) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    status, _, err = command("fit", "--config", "mfac/digits", "--config", "bad.yaml")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: \xe9\n", ["not a text file in UTF-8"]),
        (bytes(range(256)) * 9, ["not a text file in UTF-8"]),
        (b"", ["Unexpected config"]),
        (b"- 1\n- 2\n", ["Unexpected config"]),
        (b"model: " + b"[" * 5000 + b"]" * 5000, ["nested too deeply"]),
        (b"model: &model\n  init_args: *model\n", ["contains itself"]),
        (b"a: &a [x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(20)),
         ["must hold <= 100000 values", "got"]),
        (b"model: !!python/object/apply:os.system ['echo hi']\n", ["could not determine a constructor"]),
    ],
)  # fmt: skip
def test_files_that_are_no_configuration_end_in_one_line(command, tmp_path, content, parts) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    status, _, err = command("fit", "--config", "bad.yaml")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [("seed_everything", -1, ["seed_everything", "-1"]), ("data", None, ["data is missing", "train_dataloader"])],
)
def test_a_bad_seed_and_missing_data_end_in_one_line(command, tmp_path, key, value, parts) -> None:
    config = {**yaml.safe_load((RECIPES / "mfac/digits.yaml").read_text()), key: value}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    status, _, err = command("fit", "--config", "bad.yaml")
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("lit-methods: error: ")
    for part in parts:
        assert part in last


def _without(*path):
    def change(checkpoint):
        for key in path[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[path[-1]]

    return change


def _of_adam(checkpoint):
    (p,) = params = [torch.nn.Parameter(torch.ones(2))]
    adam = torch.optim.Adam(params)
    p.square().sum().backward()
    adam.step()
    group = {
        **adam.state_dict()["param_groups"][0],
        "params": checkpoint["optimizer_states"][0]["param_groups"][0]["params"],
    }
    checkpoint["optimizer_states"] = [{"state": adam.state_dict()["state"], "param_groups": [group]}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(state_dict={"weight": torch.ones(2)}), "Unexpected key(s) in state_dict"),
        (_without("optimizer_states"), "contains only the model"),
        (_without("loops", "fit_loop"), "KeyError: 'fit_loop'"),
        (_of_adam, "holds the state of another optimizer than MFAC: ['amsgrad', 'betas'"),
        (lambda c: c.update(optimizer_states=2 * c["optimizer_states"]), "the states of 2 optimizers"),
        (lambda c: c["callbacks"]["ExactResume"].update(optimizers=["Adam"]), "with the optimizers ['Adam']"),
        (lambda c: c["optimizer_states"][0]["state"]["mfac"].update(foreign=1), "MFAC, which does not know 'foreign'"),
    ],
)
def test_bad_checkpoints_end_in_one_line(command, tmp_path, trained, change, reason) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    status, _, err = command("fit", "--config=mfac/digits", "--trainer.max_epochs=2", "--ckpt_path=bad.ckpt")
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("lit-methods: error: bad.ckpt ")
    assert reason in last


@pytest.mark.parametrize("subcommand", ["fit", "test"])
@pytest.mark.parametrize(("name", "content"), [("text.ckpt", b"hello"), ("empty.ckpt", b""), ("nowhere.ckpt", None)])
def test_files_that_are_no_checkpoint_end_in_one_line(command, tmp_path, subcommand, name, content) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, _, err = command(subcommand, "--config=mfac/digits", f"--ckpt_path={name}")
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("lit-methods: error: ")
    assert name in last


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The last checkpoint of one epoch of mfac/digits."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, folder, "fit", "--config=mfac/digits", *tiny)
    return folder / "logs/mfac/digits/version_0/checkpoints/last.ckpt"


def test_options_win_over_the_checkpoints_hyperparameters(command, trained) -> None:
    """Lightning lets the checkpoint win, without a word."""
    options = ("--model.optimizer=torch.optim.Adam", "--trainer.max_epochs=2", f"--ckpt_path={trained}")
    status, _, err = command("fit", "--config=mfac/digits", *options)
    assert status == 2
    assert "was written with the optimizers ['MFAC'], the run has ['Adam']" in err.strip().splitlines()[-1]


def test_missing_extra_is_named(command, tmp_path, monkeypatch) -> None:
    (tmp_path / "needy.py").write_text(
        "from lightning.pytorch import LightningModule\n"
        "class Needy(LightningModule):\n"
        "    def __init__(self):\n"
        "        raise ImportError('Needy needs transformers: pip install \"lit-methods[llm]\"')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, _, err = command("fit", "--model", "needy.Needy")
    assert status == 2
    assert err.strip().splitlines()[-1].endswith('pip install "lit-methods[llm]"')


def test_later_errors_keep_their_traceback(command, tmp_path, monkeypatch) -> None:
    (tmp_path / "failing.py").write_text(
        "from lit_methods.supervised import SupervisedModule\n"
        "class Failing(SupervisedModule):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        raise ValueError('in the middle of training')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="in the middle of training"):
        command("fit", "--config", "mfac/digits", "--model", "failing.Failing", "--trainer.fast_dev_run=1")


def test_later_configs_override(command, tmp_path) -> None:
    (tmp_path / "v1.2.yaml").write_text("trainer: {max_epochs: 7}\n")
    status, out, _ = command("fit", "--config", "mfac/digits", "--config", "v1.2.yaml", "--print_config")
    assert status == 0
    assert "max_epochs: 7" in out


def test_recipe_names_may_contain_dots(command, tmp_path, monkeypatch) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model-1.5b.yaml").write_text((RECIPES / "mfac" / "digits.yaml").read_text())
    monkeypatch.setattr("lit_methods.cli.RECIPES", tmp_path)
    status, out, _ = command("fit", "--config", "some/model-1.5b", "--print_config")
    assert status == 0
    assert "DigitsDataModule" in out


def test_second_run_in_the_same_folder_works(command, tmp_path) -> None:
    for _ in range(2):
        status, *_ = command(
            "fit", "--config=mfac/digits", "--trainer.max_steps=2", "--trainer.logger.init_args.version=same"
        )
        assert status == 0


def test_recipes_are_listed_and_printed(command) -> None:
    status, out, _ = command("recipes")
    assert status == 0
    header, *lines = out.splitlines()
    assert header.split("  ")[0] == "recipe"
    assert [line.split()[0] for line in lines] == recipe_names()
    status, out, _ = command("recipes", "mfac/digits")
    assert status == 0
    assert out == (ROOT / "recipes" / "mfac" / "digits.yaml").read_text()
    status, _, err = command("recipes", "mfac/digit")
    assert status == 2
    assert "did you mean 'mfac/digits'" in err


def test_fit_then_test_and_predict_from_its_checkpoint(command, tmp_path) -> None:
    assert command("fit", "--config=mfac/digits", "--trainer.max_epochs=1")[0] == 0
    (checkpoint,) = tmp_path.glob("logs/mfac/digits/version_0/checkpoints/last.ckpt")
    for subcommand in ("test", "predict"):
        status, *_ = command(subcommand, "--config=mfac/digits", f"--ckpt_path={checkpoint}")
        assert status == 0


def test_python_m_is_the_same_command() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "lit_methods", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "mfac/digits" in out


def test_no_subcommand_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["lit-methods"])
    with pytest.raises(SystemExit):
        main()
    assert "subcommand" in capsys.readouterr().err


def test_secrets_are_masked_in_everything_that_is_written(command, tmp_path) -> None:
    config = ["--model.judge=lit_methods.llm.HTTPJudge", "--model.judge.url=http://me:pa55@127.0.0.1:9/?api_key=k3y"]
    config += ['--model.judge.headers={"Authorization": "Bearer t0ken", "X-Api-Key": "k3y"}']
    config += ["--trainer.max_steps=0", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]
    status, _, err = command("fit", "--config", "nash_mp/tiny_intransitive", *config)
    assert status == 0, err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in written)
    assert any(path.name == "hparams.yaml" for path in written)
    for path in written:
        content = path.read_bytes()
        for secret in (b"t0ken", b"k3y", b"pa55"):
            assert secret not in content, path


def test_moved_arguments_are_named(command) -> None:
    status, _, err = command("fit", "--config", "nash_mp/tiny_intransitive", "--model.max_new_tokens=3")
    assert status == 2
    assert "'max_new_tokens' is not accepted" in err
    assert "it is now generation.max_new_tokens" in err
