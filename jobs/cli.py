"""The `kalm` command: it registers the commands and turns errors into one line and an exit code."""

import logging
import signal
import sys
from types import FrameType

import typer

from jobs import (
    demo,
    encode,
    evaluate,
    explore,
    manage,
    plan,
    rerank,
    serve,
    status,
    sync,
    train_demo,
    truncate,
    verify,
    warm,
)
from kalm_encoder import tracing
from kalm_encoder.errors import InputError, KalmError
from pipeline import logs
from pipeline.logs import LogOptions

logger = logging.getLogger("kalm")

INTERRUPTED, TERMINATED = 130, 143
_signals: list[int] = []

app = typer.Typer(
    help="Pre-encode passages for KaLM-Reranker-V1 into Lance tables, and rerank from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    plan.plan,
    encode.encode,
    status.status,
    rerank.rerank,
    warm.warm,
    verify.verify,
    sync.sync,
    truncate.truncate,
    evaluate.evaluate,
    manage.rejects,
    manage.delete,
    manage.erase,
    manage.publish,
    manage.rollback,
    manage.compact,
    manage.adopt,
    manage.push,
    manage.gc,
    manage.doctor,
    serve.serve,
    explore.explore,
    demo.demo,
    train_demo.train_demo,
):
    app.command()(command)


@app.callback()
def options(
    context: typer.Context,
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks and debug logs, to find out why a command failed."
    ),
    log_format: str = typer.Option(
        "text", help="Format of the log on stderr: text, or json for a log collector."
    ),
) -> None:
    """Set what all commands share; these options come before the command."""
    if log_format not in logs.FORMATS:
        raise InputError(f"--log-format {log_format!r} is not one of {', '.join(logs.FORMATS)}")
    logs.configure(LogOptions(log_format, logging.DEBUG if debug else logging.INFO))
    tracing.start(f"kalm-{context.invoked_subcommand}")


def main() -> None:
    """Run `kalm` and exit: 0 done, 1 failed, 2 bad input, 130 or 143 stopped by a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    try:
        app()
    except KalmError as error:
        if debug:
            raise
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:  # typer turns a KeyboardInterrupt into this exit code
            raise
        _say("stopped; what was committed stays, run again to resume")
        sys.exit(TERMINATED if _signals else INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        _say(f"unexpected {type(error).__name__}: {error} (run `kalm --debug …` to see where)")
        sys.exit(1)
    finally:
        tracing.stop()


def _say(message: str) -> None:
    """Print the last line of a command, in the format of its log."""
    if logs.current().format == logs.JSON:
        logger.error("%s", message)
    else:
        print(f"kalm: {message}", file=sys.stderr)


def _terminate(signum: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C: commit what is finished and leave."""
    _signals.append(signum)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
