"""Refuses work in a process that was forked from one with an open table or model.

The threads of Lance and torch, and the locks that they hold, do not survive a fork: what was opened
before would hang or crash without a word.
"""

from __future__ import annotations

import os

from kalm_encoder.errors import KalmError

_owner: int | None = None
"""Id of the process that first opened a table or a model here, or in the process it came from."""


def check_process() -> None:
    """Note that this process opens or uses a table or a model.

    Raises:
        KalmError: If this is a fork of a process that did so before.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif _owner != os.getpid():
        raise KalmError(
            f"process {os.getpid()} was forked from process {_owner} after that one had opened a "
            "table or a model, whose threads a fork does not keep. Start workers with the method "
            'spawn (multiprocessing.get_context("spawn"); gunicorn without --preload), or open '
            "tables and models in the workers alone"
        )
