"""Who may import whom (see CONTRIBUTING.md)."""

import ast
import sys
from pathlib import Path

FOUNDATION = {"lit_methods._moved", "lit_methods.batches", "lit_methods.fractional_noise"}
PIECES_BELOW_FAMILIES = FOUNDATION | {"lit_methods.optim", "lit_methods.metrics", "lit_methods.nets"}
SHARED_MODULES = {
    f"lit_methods.{name}" for name in ("hyperparameters", "lr_find", "masking", "precision", "supervised", "swa")
}
SHARED_FAMILIES = {"lit_methods.games", "lit_methods.diffusion"}
OPTIM_THIRD_PARTY = {"torch", "numpy", "scipy"}
DATAMODULE_THIRD_PARTY = {
    "torch", "lightning", "torchdata", "numpy", "scipy", "sklearn", "matplotlib", "h5py", "gymnasium", "minari",
    "tokenizers", "transformers", "datasets", "pyarrow",
}  # fmt: skip
STANDARD_LIBRARY = sys.stdlib_module_names


def forbidden_imports(root: Path) -> list[str]:
    """``file:line: reason`` for every import below ``root`` that the layering forbids."""
    problems = []
    for folder in ("lit_methods", "callbacks", "datamodules"):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            if folder == "lit_methods" and relative.parts[1] in ("callbacks", "datamodules", "recipes"):
                continue  # the symbolic links
            parts = relative.with_suffix("").parts
            module = ".".join(parts if folder == "lit_methods" else ("lit_methods", *parts))
            for node in ast.walk(ast.parse(path.read_text())):
                for target in _targets(node, module):
                    if reason := _reason(module, target):
                        problems.append(f"{relative}:{node.lineno}: {module} imports {target}: {reason}")
    return problems


def _targets(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return ["." * node.level + (node.module or "")]
        return [f"{node.module}.{a.name}" if node.module == "lit_methods" else str(node.module) for a in node.names]
    return []


def _reason(module: str, target: str) -> str | None:
    top = target.partition(".")[0]
    if target.startswith("."):
        return "import by the full name"
    if top in ("callbacks", "datamodules", "recipes", "tests"):
        return f"write lit_methods.{top}" if top != "tests" else "the package must not need its tests"
    layer = _layer(module)
    if top == "lazy_loader":
        return None
    if top != "lit_methods":
        if layer == "lit_methods.optim" and top not in OPTIM_THIRD_PARTY | STANDARD_LIBRARY:
            return "optimizers need torch only"
        if layer == "lit_methods.datamodules" and top not in DATAMODULE_THIRD_PARTY | STANDARD_LIBRARY:
            return "not among the packages that datamodules may use"
        if layer == "lit_methods.batches" and top not in {"torch"} | STANDARD_LIBRARY:
            return "batch contracts need torch only"
        return None
    if layer in ("lit_methods", "lit_methods.cli", "lit_methods.__main__", "lit_methods.callbacks"):
        return None
    below = _layer(target)
    if below == layer:
        return None
    if layer in PIECES_BELOW_FAMILIES:
        return None if below in FOUNDATION else "this layer imports nothing above lit_methods.batches"
    if layer == "lit_methods.datamodules":
        return None if below in FOUNDATION else "datamodules know no method"
    allowed = PIECES_BELOW_FAMILIES | SHARED_FAMILIES | SHARED_MODULES
    return None if below in allowed else "a family imports no other family, datamodule or callback"


def _layer(module: str) -> str:
    return ".".join(module.split(".")[:2])
