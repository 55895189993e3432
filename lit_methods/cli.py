"""The ``lit-methods`` command: Lightning's CLI over our pieces or yours, with packaged recipes and one-line errors."""

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lit_methods
from lit_methods import recipes
from lit_methods.masking import mask_secrets

RECIPES = Path(recipes.__file__).parent
DESCRIPTION = "Published methods as Lightning software. 'lit-methods recipes' lists what 'fit --config NAME' can run."
SETUP_ERRORS = (ValueError, TypeError, ImportError, OSError, LookupError, AttributeError, MisconfigurationException)

MAX_CONFIG_VALUES, MAX_CONFIG_DEPTH = 100_000, 50  # a recipe has some 100 values, ten levels deep
LOADING = {"resume_start", "restore_model", "restore_datamodule", "restore_callbacks", "restore_training_state"}
LOADING |= {"check_optimizers"}  # of ExactResume; the others are Lightning's


def main() -> None:
    """Entry point of the console script and of ``python -m lit_methods``."""
    if sys.argv[1:2] == ["recipes"]:
        show_recipes()
        return
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning 2.6 beside torch 2.13
    LitMethodsCLI()


def fail(message: str) -> NoReturn:
    """Print one error line and exit with status 2."""
    sys.stderr.write(f"lit-methods: error: {message}\n")
    sys.exit(2)


def show_recipes() -> None:
    """``lit-methods recipes [NAME]``: list the packaged recipes, or print one."""
    parser = argparse.ArgumentParser(prog="lit-methods recipes", description="List packaged recipes, or print one.")
    parser.add_argument("name", nargs="?", help="a recipe to print, for example mfac/digits")
    name = parser.parse_args(sys.argv[2:]).name
    if name is None:
        rows = [(n, *(h[k] for k in ("method", "shows", "minutes", "extra"))) for n, h in recipe_headers().items()]
        rows.insert(0, ("recipe", "method", "shows", "minutes on 2 cores", "extra"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        sys.stdout.write("\n".join(lines) + "\n")
    elif (path := RECIPES / f"{name}.yaml").is_file():
        sys.stdout.write(path.read_text())
    else:
        fail(f"no packaged recipe named {name!r}{_did_you_mean(name, recipe_headers())}")


def recipe_headers() -> dict[str, dict[str, str]]:
    """Recipe name -> the ``# key: value`` lines that open its file."""
    headers = {}
    for path in sorted(RECIPES.glob("*/*.yaml")):
        opening = path.read_text().split("\n\n", 1)[0]
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        headers[name] = dict(re.findall(r"^# ([a-z]+): (.*)$", opening, re.MULTILINE))
    return headers


class LitMethodsCLI(LightningCLI):
    """``LightningCLI`` over any module and datamodule by class path; ``--config`` also takes packaged recipe names."""

    def __init__(self) -> None:
        super().__init__(
            parser_class=_Parser,
            parser_kwargs={
                "prog": "lit-methods",
                "description": DESCRIPTION,
                "version": lit_methods.__version__,
                "allow_abbrev": False,
            },
            save_config_kwargs={"overwrite": True},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose ``--config`` takes paths and packaged recipe names."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=_RecipeOrFile, help="Path or packaged recipe; later ones win.")
        return parser

    def instantiate_classes(self) -> None:
        """Build trainer, module and datamodule; a wrong argument or a missing extra ends in one line."""
        try:
            super().instantiate_classes()
        except SETUP_ERRORS as error:
            if "JSONARGPARSE_DEBUG" in os.environ:
                raise
            fail(explain(str(error)))

    def _set_seed(self) -> None:
        """Seed the generators, or say what a seed may be."""
        try:
            super()._set_seed()
        except ValueError as error:
            fail(f"seed_everything: {error}")

    def _parse_ckpt_path(self) -> None:
        """Leave the model as it is configured; Lightning lets the checkpoint's hyperparameters win over options."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; a wrong argument of an optimizer or a checkpoint that cannot be loaded ends in one line."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if "JSONARGPARSE_DEBUG" in os.environ:
                raise
            if self.datamodule is None and isinstance(error, MisconfigurationException) and "dataloader" in str(error):
                fail(f"data is missing, and the model has none of its own: {error}")
            if "configure_optimizers" in frames and isinstance(error, SETUP_ERRORS):
                fail(f"configure_optimizers: {error}")
            if frames & LOADING:
                path, reason = str(self.trainer.ckpt_path), " ".join(str(error).split())
                if path not in reason:
                    reason = f"{path} cannot be loaded: {type(error).__name__}: {reason}"
                fail(shorten(reason, 400))
            raise


class _Parser(LightningArgumentParser):
    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The configuration as text for files, hyperparameters and checkpoints, with secrets masked."""
        text = super().dump(*args, **kwargs)
        config = yaml.safe_load(text)
        masked = mask_secrets(config)
        return text if masked == config else yaml.safe_dump(masked, sort_keys=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        fail(explain(message, self._all_options()))

    def _all_options(self) -> set[str]:
        subparsers = (a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return {option for parser in (self, *chain(*subparsers)) for option in parser._option_string_actions}


class _RecipeOrFile(ActionConfigFile):
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if not os.path.isfile(values):
            recipe = RECIPES / f"{values}.yaml"
            if not recipe.is_file():
                fail(f"--config: no file and no packaged recipe {values!r}{_did_you_mean(values, recipe_headers())}")
            values = str(recipe)
        _check_config(values)
        super().__call__(parser, cfg, values, option_string)


def _check_config(path: str) -> None:
    """Refuse a file whose parsing would end in a traceback, or not end."""
    try:
        document = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        size = _expanded_size(document, {}) if document is not None else 0
    except yaml.YAMLError:
        return  # jsonargparse says where
    except UnicodeDecodeError:
        fail(f"--config: {path} is not a text file in UTF-8")
    except RecursionError:
        fail(f"--config: {path} is nested too deeply, or contains itself")
    if size > MAX_CONFIG_VALUES:
        fail(f"--config: {path} must hold <= {MAX_CONFIG_VALUES} values with its aliases written out, got {size}")


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """Number of values below a YAML node, each as often as it is referred to."""
    if depth > MAX_CONFIG_DEPTH:
        raise RecursionError
    if id(node) not in known:
        pairs: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = chain.from_iterable(pairs) if isinstance(node, yaml.MappingNode) else pairs
        known[id(node)] = 1 + sum(_expanded_size(child, known, depth + 1) for child in nodes)
    return known[id(node)]


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Condense a nested jsonargparse message to one line and add close matches.

    Args:
        message: the parser's error, possibly over many lines.
        options: command line options that an unrecognised argument is compared with.
    """
    message = re.sub(r"NestedArg\(key='[^']*', val=(.*?)\)", r"\1", message)
    lazy = r"No ([\w.]+) attribute (\w+)"  # lazy_loader's words for what follows
    message = re.sub(lazy, r"module '\1' has no attribute '\2'", message)
    keys: list[str] = re.findall(r'Parser key "([^"]+)"', message)
    reasons = []
    for line in message.splitlines():
        line = re.sub(r'^[\s-]*(Parser key "[^"]+":)?\s*', "", line)
        line = re.sub(r"^Type typing\..* expects a function or a callable class: ", "", line)
        line = re.sub(r"Problem with given class_path '([^']+)':?", r"\1:", line)
        line = re.sub(r"\.? Got value: .*", "", line)
        if line and not re.match(_NOISE, line):
            reasons.append(line)
    text = " ".join(dict.fromkeys(reasons))
    given = re.search(r"Given value: (.*)", message)
    if "Expected a" in text and given:
        text += f", got {given[1]!r}"
    prefix = f"{'.'.join(keys)}: " if keys else ""
    return prefix + text + _close_matches(message, options)


_NOISE = (
    r"Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Expected a path but|Parser key|Subclass types expect|a class path \(str\)|a dict with"
)


def _close_matches(message: str, options: Iterable[str]) -> str:
    """What the user may have meant, from the unknown name in ``message`` and the names that exist there."""
    if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message):
        return _did_you_mean(found[1], options)
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module = importlib.import_module(found[1])
        submodules = (m.name for m in pkgutil.iter_modules(getattr(module, "__path__", [])))
        return _did_you_mean(found[2], [*dir(module), *submodules])
    if found := re.search(r"Option '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message):
        name = found[1] or found[2]
        classes = re.findall(r"class_path(?:=| )'([\w.]+)'", message[: found.end() + 200])
        moved = getattr(_import(classes[-1]), "moved_arguments", {}) if classes else {}
        if name in moved:
            return f"; it is now {moved[name]}"
        names = list(inspect.signature(_import(classes[-1])).parameters) if classes else [o[2:] for o in options]
        return _did_you_mean(name, names)
    return ""


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    matches = get_close_matches(name, sorted(set(candidates)), n=2)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
