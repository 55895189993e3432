import shutil
import subprocess
import sys
import zipfile

from tests.contract.pieces import ROOT

FOLDERS = ("lit_methods", "callbacks", "datamodules", "recipes")


def test_wheel_holds_the_tree_under_one_package(tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix() if folder == "lit_methods" else f"lit_methods/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix in (".py", ".pyi", ".yaml", ".md", ".typed")
    }
    assert packed == expected
