"""The layering of CONTRIBUTING.md holds."""

import re
import subprocess
import sys

from tests.contract.layers import forbidden_imports
from tests.contract.pieces import ROOT


def test_no_import_is_forbidden() -> None:
    assert forbidden_imports(ROOT) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys, lit_methods; loaded = set(sys.modules);"
        "assert not loaded & {'torch', 'lightning', 'numpy', 'sklearn', 'transformers'}, loaded"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_optimizers_do_not_load_lightning() -> None:
    script = (
        "import sys, lit_methods.optim as o; [getattr(o, n) for n in o.__all__];"
        "assert not {'lightning', 'torchmetrics', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_private_names_of_torch_are_imported_in_one_place() -> None:
    private = re.compile(
        r"^\s*(from torch[\w.]*\._[\w.]+ import|from torch[\w.]* import .*\b_|import torch[\w.]*\._)", re.M
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("lit_methods", "callbacks", "datamodules")
        for path in (ROOT / folder).rglob("*.py")
        if private.search(path.read_text())
    }
    assert found == {"lit_methods/optim/foundation/private_names.py"}
