"""A real process of `kalm serve`, or a command like it, for tests."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from kalm_encoder.service.app import create_app
from tests.support.commands import HANG_S, Command


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(uri, *arguments, log=None, command="serve", **environment):
    """Start the command, wait until it is ready, and end it as an operator would."""
    port = free_port()
    environment = {**os.environ, **environment}
    process = Command(command, uri, "--port", port, *arguments, env=environment, log=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_S)
    client.process = process
    try:
        wait_until(lambda: ready(client) or process.poll() is not None)
        assert process.poll() is None, Path(log).read_text() if log else "it ended"
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(HANG_S)


def ready(client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


@contextlib.contextmanager
def serving_here(settings):
    """Serve in this process over HTTP; yield a client and the application."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and app.state.live.current)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.config.port}", timeout=HANG_S) as it:
            yield it, app
    finally:
        server.should_exit = True  # what uvicorn does on SIGTERM
        thread.join()
