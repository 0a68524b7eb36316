"""What the server of commands.py imports before it forks: nothing that starts work."""

import importlib
import os
import warnings

MODULES = (
    "jobs.cli",
    "kalm_encoder.model.decoder",
    "kalm_encoder.model.encoder",
    "kalm_encoder.rerank.reranker",
    "kalm_encoder.service.app",
    "kalm_encoder.service.explore.tables",
    "pipeline.run.driver",
    "pipeline.upkeep.sync",
    "pipeline.upkeep.verify",
)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; no command of a test needs the hub
for module in MODULES:
    importlib.import_module(module)
# The server never calls Lance, so its forks are safe: no thread and no lock is lost.
warnings.filterwarnings("ignore", message="lance is not fork-safe")
