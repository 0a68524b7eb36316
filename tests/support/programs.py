"""Programs that pip cannot install: a test that needs one is skipped where it is missing.

The last lines of a test run name the missing programs and the command that installs them, so that
a skip is never mistaken for a pass.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

PACKAGES = {
    "azurite-blob": "npm (then npm install -g azurite)",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "curl": "curl",
    "java": "default-jdk-headless",
    "nginx": "nginx",
}
"""The Debian package of each program."""


def require(*programs: str) -> None:
    """Skip the test that calls this, or that asks for the fixture that does, unless all exist."""
    if missing := [name for name in programs if not shutil.which(name)]:
        pytest.skip(f"missing program: {', '.join(missing)}")


def advice(skip_reasons: Iterable[str]) -> Iterator[str]:
    """Yield one line for each set of programs that tests were skipped for."""
    found = (re.search(r"missing program: ([\w, -]+)", reason) for reason in skip_reasons)
    for names, count in sorted(Counter(match[1] for match in found if match).items()):
        programs = names.split(", ")
        tests = "test was" if count == 1 else "tests were"
        be = "is" if len(programs) == 1 else "are"
        packages = " ".join(PACKAGES[name] for name in programs)
        yield f"{count} {tests} skipped: {names} {be} missing: apt-get install {packages}"
