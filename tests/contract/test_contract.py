"""Every public piece keeps the promises of its kind."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract import callback_checks, cases, datamodule_checks, module_checks, optimizer_checks
from tests.contract.pieces import ROOT, kind_of, pieces, public_objects

CASES: dict[str, dict[str, Any]] = {
    "optimizer": cases.OPTIMIZERS,
    "module": cases.MODULES,
    "datamodule": cases.DATAMODULES,
    "callback": cases.CALLBACKS,
}
CHECKS: dict[str, list[Callable[..., None]]] = {
    "optimizer": optimizer_checks.CHECKS,
    "module": module_checks.CHECKS,
    "datamodule": datamodule_checks.CHECKS,
    "callback": callback_checks.CHECKS,
}


@pytest.mark.parametrize(
    ("kind", "piece", "check"),
    [
        pytest.param(kind, piece, check, id=f"{piece.rpartition('.')[2]}-{check.__name__.removeprefix('check_')}")
        for kind in CHECKS
        for piece in pieces(kind)
        for check in CHECKS[kind]
    ],
)
def test_piece(
    kind: str, piece: str, check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert piece in CASES[kind], f"{piece} is public but has no case in tests/contract/cases/"
    case = CASES[kind][piece]
    if reason := case.not_applicable.get(check.__name__):
        pytest.skip(reason)
    available = {"case": case, "folder": tmp_path, "monkeypatch": monkeypatch}
    check(**{name: available[name] for name in inspect.signature(check).parameters})


def test_every_case_belongs_to_a_piece() -> None:
    stale = [piece for kind in CASES for piece in CASES[kind] if piece not in pieces(kind)]
    assert not stale, f"cases without a public piece: {stale}"


def test_every_exemption_names_a_check_and_gives_a_reason() -> None:
    for kind, by_piece in CASES.items():
        names = {check.__name__ for check in CHECKS[kind]}
        for piece, case in by_piece.items():
            for check, reason in case.not_applicable.items():
                assert check in names, f"{piece}: there is no check {check!r} of kind {kind}"
                assert len(reason.split()) >= 4, f"{piece}: write why {check} does not apply, got {reason!r}"


def test_every_other_public_name_has_unit_tests() -> None:
    """Functions, networks and the like have no case; a unit test file must use them by name."""
    text = "".join(path.read_text() for path in (ROOT / "tests" / "unit").rglob("test_*.py"))
    submodules = [path for path, obj in public_objects().items() if inspect.ismodule(obj)]
    others = [path for path, obj in public_objects().items() if kind_of(obj) == "other" and path not in submodules]
    words = set(re.findall(r"\w+", text))
    untested = [path for path in others if path.rpartition(".")[2] not in words]
    assert not untested, f"no unit test uses {untested}"
