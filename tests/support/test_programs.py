"""A run without Chromium says so, and how to get it, instead of looking like a pass."""

import pytest

from tests.support import programs


def test_a_test_without_its_program_is_skipped_and_the_last_lines_say_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    reasons = ["no CUDA device"]
    for needed in (("chromium", "chromedriver"), ("nginx",), ("nginx",)):
        with pytest.raises(pytest.skip.Exception) as skipped:
            programs.require(*needed)
        reasons.append(f"('tests/test_x.py', 24, '{skipped.value}')")
    assert list(programs.advice(reasons)) == [
        "1 test was skipped: chromium, chromedriver are missing: "
        "apt-get install chromium chromium-driver",
        "2 tests were skipped: nginx is missing: apt-get install nginx",
    ]
