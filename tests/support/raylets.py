"""A Ray cluster of several raylets on this machine, started as an operator starts one.

Its processes share a folder that their environment names: whatever is left at the end is found by
that and killed, and no other Ray on this machine is touched.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.support.commands import HANG_S
from tests.support.serving import free_port, wait_until

FOLDER = "RAY_TMPDIR"
NODE = ("--num-cpus=1", "--object-store-memory=80000000", "--block")


@dataclass(frozen=True)
class Raylets:
    """A running cluster; `environment` is what a client of it needs."""

    dashboard: str
    environment: dict[str, str]

    def listed(self, what: str) -> list[dict]:
        """Return what the cluster knows of its nodes, actors or tasks."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        url = f"{self.dashboard}/api/v0/{what}"
        answer = httpx.get(url, params={"limit": 1000}, headers=token, timeout=HANG_S)
        answer.raise_for_status()
        return answer.json()["data"]["result"]["result"]


@contextlib.contextmanager
def own_environment() -> Generator[dict[str, str]]:
    """Yield an environment for Ray commands; at the end kill all processes that have it."""
    # Short, as paths of sockets may not be long.
    folder = tempfile.mkdtemp(prefix="kalm", dir="/tmp")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("RAY_")
    }
    try:
        yield {
            **inherited,
            FOLDER: folder,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(FOLDER) == folder:
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def raylets(count: int, logs: Path) -> Generator[Raylets]:
    """Start `ray start --head` and `count - 1` further nodes with one CPU each."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{dashboard}"
    head = [f"--port={port}", f"--dashboard-port={dashboard}"]
    head += ["--head", f"--dashboard-agent-listen-port={agent}"]
    commands = [head, *[[f"--address=127.0.0.1:{port}"]] * (count - 1)]
    with own_environment() as environment:
        for number, command in enumerate(commands):
            log = logs / f"node{number}.log"
            # Two raylets in one folder would remove each other's copies of our packages.
            own = f"--temp-dir={environment[FOLDER]}/{number}"
            start(["ray", "start", *command, own, *NODE], environment, log)
        wait_until(lambda: answers(agent))  # it starts submitted jobs
        yield Raylets(url, {**environment, "RAY_API_SERVER_ADDRESS": url})


def start(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Start a node and wait until it says that it runs."""
    with log.open("w") as output:
        node = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd="/")
    wait_until(lambda: node.poll() is not None or "Ray runtime started" in log.read_text())
    assert node.poll() is None, log.read_text()


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
