"""Long documents, split against truncated: what the demo checkpoint's ranking of them is worth.

A document is made of texts of the held-out documentation, in the order of the hashes of their ids.
A question is about one of these texts, and its document alone is relevant.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from jobs.demo_training.held_out import write_collection
from jobs.evaluation.collection import read_folder
from jobs.evaluation.experiment import Experiment, evaluate
from kalm_encoder.model.checkpoint import DEMO_NAME
from pipeline.workers.local import in_process
from tests.bench.data import FOLDER, bar

TEXTS, WINDOW, DEPTH = 24, 512, 10
"""Texts per document, tokens of the encoder's window, and documents that are reranked."""
SPLITS = {"truncated": None, "split 512, 64": (512, 64)}


def main() -> list[str]:
    folder = FOLDER / "long-documents"
    write_long_collection(folder / "collection")
    reached: dict[str, float] = {}
    for name, split in SPLITS.items():
        found = evaluate(
            Experiment(
                collection=read_folder(folder / "collection"), model=DEMO_NAME,
                folder=folder / "out", ratios=(4,), depth=DEPTH, max_length=WINDOW, split=split,
            ),
            in_process,
        )  # fmt: skip
        for setting in found.settings:
            low, high = setting.intervals["nDCG@10"]
            value = setting.metrics["nDCG@10"]
            print(f"{name}: {setting.name} nDCG@10 {value:.3f} [{low:.3f}, {high:.3f}]")
        print(f"{name}: {found.num_passages} rows, {found.num_tokens} tokens", flush=True)
        reached[name] = found.settings[1].metrics["nDCG@10"]
    gain = reached["split 512, 64"] - reached["truncated"]
    return [bar("nDCG@10 of long documents, split less truncated", gain, ">=", 0.0)]


def write_long_collection(folder: Path) -> None:
    """Write the held-out collection with TEXTS of its texts in each document."""
    write_collection(folder)
    rows = map(json.loads, (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {row["_id"]: row["text"] for row in rows}
    order = sorted(texts, key=lambda id: xxhash.xxh3_64_intdigest(id.encode()))
    document_of, lines = {}, []
    for number, ids in enumerate(order[i : i + TEXTS] for i in range(0, len(order), TEXTS)):
        document_of |= dict.fromkeys(ids, f"document-{number}")
        text = "\n\n".join(texts[id] for id in ids)
        lines.append(json.dumps({"_id": f"document-{number}", "text": text}) + "\n")
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    judgements = folder / "qrels" / "test.tsv"
    head, *judged = judgements.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in judged)
    moved = [f"{query}\t{document_of[id]}\t{relevance}" for query, id, relevance in pairs]
    judgements.write_text("\n".join([head, *moved, ""]), encoding="utf-8")
