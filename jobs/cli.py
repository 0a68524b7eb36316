"""The `kalm` command: registers the commands and turns errors into one line and an exit code."""

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
)
from kalm_encoder.errors import KalmError

INTERRUPTED, TERMINATED = 130, 143
_signals: list[int] = []

app = typer.Typer(
    help="Pre-encode passages for KaLM-Reranker-V1 into Lance tables, and rerank from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan.plan)
app.command()(encode.encode)
app.command()(status.status)
app.command()(rerank.rerank)
app.command()(verify.verify)
app.command()(sync.sync)
app.command()(truncate.truncate)
app.command()(evaluate.evaluate)
for command in (
    manage.rejects,
    manage.delete,
    manage.publish,
    manage.rollback,
    manage.compact,
    manage.gc,
    manage.doctor,
):
    app.command()(command)
app.command()(serve.serve)
app.command()(explore.explore)
app.command()(demo.demo)
app.command()(train_demo.train_demo)


@app.callback()
def options(
    debug: bool = typer.Option(False, help="Show tracebacks and debug logs."),
) -> None:
    """Options before the command."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if not debug:
        for noisy in ("httpx", "httpx2", "ray", "transformers", "filelock", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def main() -> None:
    """Run `kalm`: exit code 0 done, 1 failed, 2 bad input, 130/143 stopped by a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    try:
        app()
    except KalmError as error:
        if debug:
            raise
        print(f"kalm: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise
        print("kalm: stopped; what was finished is committed, run again to resume", file=sys.stderr)
        sys.exit(TERMINATED if _signals else INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        print(
            f"kalm: unexpected {type(error).__name__}: {error} (kalm --debug … shows where)",
            file=sys.stderr,
        )
        sys.exit(1)


def _terminate(signum: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C: commit what is there and leave."""
    _signals.append(signum)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
