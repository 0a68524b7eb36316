"""`kalm` says so where a user's own folder would be imported in place of one of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# The installed `kalm` script, unlike `python -c`, does not put the folder on the path itself.
SCRIPT = "import sys; sys.path.remove(''); from kalm_encoder.command import main; main()"


def kalm(*arguments, cwd, path):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )  # fmt: skip


@pytest.mark.parametrize("package", ["jobs", "pipeline"])
def test_a_users_own_package_is_named_and_not_run(tmp_path, package):
    mine = tmp_path / package
    mine.mkdir()
    (mine / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    (mine / "cli.py").write_text("raise RuntimeError('the wrong module')")
    refused = kalm("--help", cwd=tmp_path, path=[".", REPOSITORY])
    assert refused.returncode == 2, refused.stderr
    assert (
        f"Python imports {mine}/__init__.py as '{package}' and not {REPOSITORY / package}"
        in refused.stderr
    )
    assert refused.stderr.count("\n") == 1
    # Both remedies of the message.
    assert kalm("--help", cwd=tmp_path, path=[REPOSITORY]).returncode == 0
    mine.rename(tmp_path / "another_name")
    assert kalm("--help", cwd=tmp_path, path=[".", REPOSITORY]).returncode == 0


def test_a_users_own_module_is_named_as_well(tmp_path):
    (tmp_path / "jobs.py").write_text("raise RuntimeError('the wrong module')")
    refused = kalm("--help", cwd=tmp_path, path=[tmp_path, REPOSITORY])
    assert (refused.returncode, f"imports {tmp_path}/jobs.py as" in refused.stderr) == (2, True)


def test_a_folder_that_is_no_package_is_in_nobodys_way(tmp_path):
    (tmp_path / "jobs").mkdir()
    assert kalm("--help", cwd=tmp_path, path=[tmp_path, REPOSITORY]).returncode == 0
