"""What a process opens before it forks, used in its fork; without the libraries of the tests.

Each line of the file that is written is a name and what its use gave: `works`, or the error.
"""

import multiprocessing
import warnings

from kalm_encoder import PassageEncoder, PassageTable, QueryDecoder, Reranker
from kalm_encoder.errors import KalmError

IDS = ["p1", "p2", "p3"]


def rank(reranker):
    return reranker.rerank("token state", IDS)


def open_and_fork(uri, model, out):
    """Fork before and after tables and models are opened; run it in a process of its own."""
    warnings.filterwarnings("ignore")
    in_fork(out, first=lambda: Reranker.open(uri).rerank("q", ["p1"]))
    reranker, table = Reranker.open(uri), PassageTable.open(uri)
    decoder, encoder = QueryDecoder(model), PassageEncoder(model)
    prompt = decoder.prompt("q")
    in_fork(
        out,
        reranker=lambda: reranker.rerank("q", ["p1"]),
        prompted=lambda: reranker.rerank(prompt, ["p1"]),
        table=lambda: table.take(["p1"]),
        size=lambda: len(table),
        search=lambda: table.search("token", 1),
        decoder=lambda: decoder.score("q", []),
        encoder=lambda: encoder.encode(["text"]),
        reopened=lambda: Reranker.open(uri),
        reopened_table=lambda: PassageTable.open(uri),
        reloaded=lambda: PassageEncoder(model),
    )


def in_fork(out, **uses):
    worker = multiprocessing.get_context("fork").Process(target=child, args=(out, uses))
    worker.start()
    worker.join()
    with out.open("a") as lines:
        lines.write(f"exit {worker.exitcode}\n")


def child(out, uses):
    with out.open("a") as lines:
        for name, use in uses.items():
            try:
                use()
                lines.write(f"{name} works\n")
            except KalmError as error:
                lines.write(f"{name} {error}\n")
