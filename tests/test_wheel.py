"""What a user installs: all that the commands need, and neither tests nor benchmarks."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "kalm_encoder", "pipeline")
# Operators copy these from the repository; no command reads them.
NOT_NEEDED = ("jobs/recipes/",)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names of all files in a wheel that was built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, tree / package, ignore=unwanted)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, tree], check=True)
    (built,) = folder.glob("*.whl")
    return [name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name]


def test_it_holds_every_file_of_the_packages(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(wheel) == {name for name in files if not name.startswith(NOT_NEEDED)}
    assert {Path(name).suffix for name in wheel} >= {".py", ".html", ".css", ".js", ".safetensors"}


def test_it_holds_neither_tests_nor_benchmarks(wheel):
    assert {name.partition("/")[0] for name in wheel} == set(PACKAGES)
    assert not [name for name in wheel if "test_" in name or "bench" in name]
