"""What the server of tests/commands.py imports before it forks: nothing that starts work."""

import importlib
import os
import warnings

MODULES = (
    "jobs.cli",
    "kalm_encoder.decoder",
    "kalm_encoder.encoder",
    "kalm_encoder.rerank",
    "kalm_serve.app",
    "kalm_serve.engine",
    "kalm_serve.explore_tables",
    "pipeline.driver",
    "pipeline.sync",
    "pipeline.verify",
)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; no command of a test needs the hub
for module in MODULES:
    importlib.import_module(module)
# The server never calls Lance, so its forks are safe: no thread and no lock is lost.
warnings.filterwarnings("ignore", message="lance is not fork-safe")
