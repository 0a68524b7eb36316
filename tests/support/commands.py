"""`kalm` as a process of its own that does not pay for its imports.

Each process is a fork of a server that has imported torch and Lance and never called them: own
arguments, environment, signals and exit code, but not the four seconds an interpreter needs to
load them. Where the start itself is what a test looks at, and for Ray, start an interpreter.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HANG_S = 600
"""How long tests wait for something: so long that only what hangs reaches it, on any machine."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.commands_imports"])


class Command:
    """A running `kalm`, with what tests use of `subprocess.Popen`."""

    def __init__(self, *arguments, cwd=None, env=None, log=None):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        out, err = (log, log) if log else (f"{self._folder.name}/{n}" for n in ("out", "err"))
        self._files = Path(out), Path(err)
        self.args = list(map(str, arguments))
        self._process = FORKS.Process(
            target=_run, args=(self.args, cwd or os.getcwd(), env or dict(os.environ), out, err)
        )
        self._process.start()
        atexit.register(self.kill)  # one that a failed test left stopped would be waited for
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end; return what it printed, unless there is a log."""
        self.wait(timeout)
        return tuple(file.read_text() if file.exists() else "" for file in self._files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def kalm(*arguments, cwd=None, env=None, check=None, timeout=HANG_S):
    """Run `kalm` to its end; `check` is the exit code that is expected."""
    command = Command(*arguments, cwd=cwd, env=env)
    try:
        done = subprocess.CompletedProcess(command.args, None, *command.communicate(timeout))
    finally:
        command.kill()
    done.returncode = command.returncode
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def _run(arguments, cwd, environment, out, err):
    from jobs.cli import main  # noqa: PLC0415  (imported by the server already)

    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["kalm", *arguments]
    main()
