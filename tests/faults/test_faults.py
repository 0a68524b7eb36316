"""The short version of `make faults`; the long one runs for about twenty minutes."""

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_no_row_is_lost_doubled_or_changed_under_faults():
    command = [sys.executable, "-m", "tests.faults", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    summary = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(
        r"ok: (\d+) faults in \d+ runs, \d+ rows checked: 0 lost, 0 doubled, 0 different, "
        r"0 manual steps; control: (\d+) rows wrong; .*",
        summary,
    )
    assert found, summary
    assert int(found[1]) >= 50, "too few faults to show anything"
    assert int(found[2]) > 0, "the control went right: these faults show nothing"
