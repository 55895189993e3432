"""Do the unit tests of a file notice when one operator of it is another one?

    python -m tests.mutation FILE [--tests PATH ...] [--select EXPRESSION] [--number 20] [--seed 0] [--timeout 300]

Draws single changes of FILE at random (an operator, a comparison, a constant, a condition), runs the unit tests with
each, in a process of its own, and prints the ones that no test noticed. Each of these is a hole in the tests, or
changes nothing that matters. The file on disk stays as it is. By hand, on POSIX systems: it takes minutes.
"""

import argparse
import ast
import copy
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import lightning.pytorch  # noqa: F401  (imported once here, so that no mutant pays for it)
import pytest
import scipy.sparse  # noqa: F401

ROOT = Path(__file__).parents[1]
SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


def code_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: no annotations, defaults, docstrings, decorators or messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.Raise | ast.JoinedStr) or name in ("annotation", "returns", "defaults", "kw_defaults"):
            continue
        if isinstance(node, ast.keyword) and node.arg == "strict":
            continue
        if name == "decorator_list" or (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from code_nodes(child)


def changes_of(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
        new = copy.deepcopy(node)
        new.op = SWAPPED[type(node.op)]()
        yield new
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[i] = SWAPPED[type(op)]()
            yield new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp):
        new = copy.deepcopy(node)
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield new


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def mutants(source: str) -> list[tuple[str, str]]:
    """What was changed, and the changed source, in the order of the file."""
    found = []
    for number, node in enumerate(code_nodes(ast.parse(source))):
        for choice, new in enumerate(changes_of(node)):
            tree = ast.parse(source)  # anew, for a replacement changes it
            nodes = list(code_nodes(tree))
            change = list(changes_of(nodes[number]))[choice]
            mutant = ast.unparse(ast.fix_missing_locations(Replace(nodes[number], change).visit(tree)))
            old, new_text = (ast.unparse(n).split("\n")[0] for n in (node, new))
            found.append((f"line {node.lineno}: {old}  ->  {new_text}", mutant))
    return found


def survives(path: Path, mutant: str, tests: list[str], timeout: int) -> bool:
    """Whether all tests pass with the mutant in place of the file's source; a hang is a failure."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        get_code = SourceFileLoader.get_code

        def get_mutant(self: SourceFileLoader, fullname: str) -> object:
            is_mutant = Path(self.path).resolve() == path
            return compile(mutant, str(path), "exec") if is_mutant else get_code(self, fullname)

        SourceFileLoader.get_code = get_mutant  # type: ignore[method-assign, assignment]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))
    for _ in range(timeout * 10):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def tests_of(path: Path) -> list[str]:
    """The test file of the same name, or the test folder that mirrors the file's."""
    folder = ROOT / "tests" / "unit" / path.relative_to(ROOT).parent.relative_to("lit_methods")
    alone = folder / f"test_{path.stem}.py"
    return [str(alone if alone.exists() else folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tests", nargs="+", help="default: those that mirror the file")
    parser.add_argument("--select", default="", help="as pytest's -k, to leave out slow tests")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one mutant")
    arguments = parser.parse_args()
    path = arguments.file.resolve()
    tests, source = [*(arguments.tests or tests_of(path)), "-k", arguments.select], path.read_text()
    if not survives(path, source, tests, arguments.timeout):
        sys.exit(f"{' '.join(tests)} fail without any change")
    every = mutants(source)
    drawn = sorted(random.Random(arguments.seed).sample(range(len(every)), min(arguments.number, len(every))))
    lived = []
    for i in drawn:
        if survives(path, every[i][1], tests, arguments.timeout):
            lived.append(every[i][0])
            print(f"  {arguments.file} {every[i][0]}", flush=True)
    print(f"{arguments.file}: {len(drawn) - len(lived)} of {len(drawn)} mutants caught (of {len(every)})", flush=True)


if __name__ == "__main__":
    main()
