"""Errors name the file, and nothing is unpickled."""

import ast
import gzip
from pathlib import Path

import pytest

import lit_methods.datamodules
from lit_methods.datamodules.reading import open_unpacked, reading

FOLDER = Path(lit_methods.datamodules.__file__).parent


@pytest.mark.parametrize("error", [OSError("no"), EOFError(), KeyError("x"), MemoryError(), UnicodeError("u")])
def test_errors_of_libraries_get_the_files_name(error):
    message = rf"a/b\.bin is damaged or not a table \({type(error).__name__}"
    with pytest.raises(ValueError, match=message), reading("a/b.bin", "a table"):
        raise error


def test_errors_that_name_the_file_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), reading(tmp_path / "x", "a table"):
        (tmp_path / "x").open()
    with pytest.raises(ValueError, match=r"^row 3 of x$"), reading("x", "a table"):
        raise ValueError("row 3 of x")


def test_unpacking_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_methods.datamodules.reading._ALWAYS", 1000)
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match=r"zeros\.gz would unpack from"), open_unpacked(path) as file:
        file.read()
    path.write_bytes(gzip.compress(bytes(900)))
    with open_unpacked(path) as file:
        assert file.read() == bytes(900)


def test_no_reader_unpickles():
    """A pickle runs whatever its writer wants; joblib and scikit-learn's fetchers read pickles."""
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & set(names), path
                assert not any(name.startswith("fetch_") for name in names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                safe = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                owner = getattr(node.func.value, "id", "")
                assert owner != "np" or safe.get("allow_pickle") is False, path
                assert owner != "torch" or safe.get("weights_only") is True, path
