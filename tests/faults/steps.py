"""The commands that go over all rows of a table, and the table or corpus from which each starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import lance

from tests.conftest import make_texts
from tests.faults.small_parts import stop_before_finish
from tests.faults.world import ROWS, SHARD_SIZE, World, in_fork

FILES = 8
"""Files of the corpora that are made here, so that planning has parts."""


@dataclass(frozen=True)
class Step:
    """A command that goes over all rows of a table.

    Attributes:
        name: Its name in the report.
        command: Makes its arguments from the world and the address of the table.
        begins_with: Makes the table from which it starts, at an address; None starts with none.
        ends_with: Its exit code.
        in_order: Whether the rows come in the same order whatever was killed.
    """

    name: str
    command: Callable[[World, str], list[str]]
    begins_with: Callable[[World, str], None] | None = None
    ends_with: int = 0
    in_order: bool = True


def _encode_sound(world: World, table: str) -> None:
    world.start(world.arguments(table)).join()


def _encode_repeats(world: World, table: str) -> None:
    """Encode all rows of a corpus with repeated ids, up to where they are settled."""
    options = world.s3.arguments if "://" in table else []
    arguments = [*_repeats(world, table), "--workers", "0", *options]
    world.start(arguments, stop_before_finish).join()


def _repeats(world: World, table: str) -> list[str]:
    corpus = _corpus(world, "repeats", [f"p{row % (ROWS * 3 // 4)}" for row in range(ROWS)])
    return [
        "encode", corpus, "--to", table, "--model", str(world.model), "--shard-size",
        str(SHARD_SIZE), "--commit-every", "0", "--on-duplicate", "first",
    ]  # fmt: skip


def _damage(world: World, table: str) -> None:
    """Encode a table, then repeat some rows and change some texts behind its back."""
    _encode_sound(world, table)
    options = world.s3.options if "://" in table else None

    def harm() -> None:
        dataset = lance.dataset(table, storage_options=options)
        dataset.insert(dataset.to_table(filter="id IN ('p3', 'p500')"))
        dataset.update({"text": "'another'"}, where="id IN ('p7', 'p77', 'p777')")
        dataset.tags.update("live", dataset.latest_version)

    in_fork(harm)


def _changed(world: World, table: str) -> list[str]:
    """Return a sync with a corpus in which texts are changed, passages are new, and some lack."""
    corpus = _corpus(world, "changed", [f"p{row + ROWS // 20}" for row in range(ROWS)], edit=10)
    return [
        "sync", corpus, "--to", table, "--model", str(world.model), "--delete-missing",
        "--shard-size", str(SHARD_SIZE),
    ]  # fmt: skip


def _corpus(world: World, name: str, ids: list[str], *, edit: int = 0) -> str:
    """Write a corpus of several files once, and return its glob.

    Args:
        ids: Id of each row. A row's text is that of its id in the world's corpus.
        edit: One text in so many is another; 0 changes none.
    """
    folder = world.folder / name
    if not folder.exists():
        folder.mkdir()
        texts = make_texts(2 * ROWS, seed=7)
        rows = [(id, texts[int(id[1:])]) for id in ids]
        rows = [
            (id, t + " edited" if edit and i % edit == 0 else t) for i, (id, t) in enumerate(rows)
        ]
        for number in range(FILES):
            some = rows[number * len(rows) // FILES : (number + 1) * len(rows) // FILES]
            lines = [json.dumps({"_id": id, "text": text}) for id, text in some]
            (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}/*.jsonl"


def _truncation(world: World, table: str) -> list[str]:
    """Return the truncation of a sound table, which is encoded when it is asked for first."""
    source = _sound(world, f"{table.rpartition('/')[0]}/source.lance")
    return ["truncate", source, "--to", table, "--ratios", "8"]


@cache
def _sound(world: World, table: str) -> str:
    """Encode a table when it is asked for first, and return its address."""
    _encode_sound(world, table)
    return table


TRUNCATE = Step("truncate", _truncation)
FINISH = Step("finish", _repeats, _encode_repeats)
PLANNING = Step("planning", _repeats)
VERIFY = Step("verify", lambda world, table: ["verify", table, "--json"], _damage, ends_with=1)
SYNC = Step("sync", _changed, _encode_sound, in_order=False)
STEPS = (TRUNCATE, VERIFY, FINISH, SYNC)
"""All that go over the rows of a table."""
