"""Starts `kalm`, unless a folder of the user's would be imported in place of one of our packages.

`jobs` and `pipeline` are common names, and a folder on PYTHONPATH comes before what is installed.
This is the one place below `jobs` that names it, because a shadowed `jobs` could not say so itself.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run `kalm`; see `jobs.cli.main`. The exit code is 2 if one of our packages is shadowed."""
    for name in ("jobs", "pipeline"):
        spec, wanted = find_spec(name), OURS / name
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != wanted / "__init__.py":
            sys.stderr.write(
                f"kalm: error: Python imports {found} as {name!r} and not {wanted}, which kalm "
                "needs. Take its folder off PYTHONPATH, or rename it\n"
            )
            sys.exit(2)
    import_module("jobs.cli").main()
