"""KaLMSearch: mteb's retrieval and reranking tasks, scored from stored states.

    model = KaLMSearch("KaLM-Embedding/KaLM-Reranker-V1-Nano-R2", "states/", ratios=(4, 32))
    mteb.evaluate(model, mteb.get_tasks(["SciFact", "AskUbuntuDupQuestions"]))

The corpus of each task, subset and split is encoded by an ordinary job into a table of its own;
evaluating again resumes that job, or finds the table complete. The class has the methods of mteb's
SearchProtocol and imports mteb only to describe itself.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_encoder.errors import InputError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import OnMissing
from kalm_encoder.table.reader import PassageTable
from pipeline.messages import Executor
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import in_process

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta


class KaLMSearch:
    """A model for mteb.evaluate.

    Args:
        model: Hub id or directory of the checkpoint.
        folder: Local folder for corpora and tables; None takes a temporary one that is deleted with
            this object.
        ratio: Ratio to score at; None takes the finest stored.
        instruction: The task; None takes the model's default.
        system_instruction: What the model is told before the task; None takes its default.
        on_missing: What becomes of candidates that were not encoded: error, drop or last.
        instructions: Instructions by mteb's task name; one found here replaces `instruction`. The
            instruction of a query itself replaces both.
        execute: `in_process`, or `OnRay(options)` of `pipeline.workers.on_ray.actor`.
        encoding: Settings of every `EncodeJob`: revision, ratios, store_dtype, compute_dtype, …
    """

    def __init__(
        self,
        model: str,
        folder: str | Path | None = None,
        *,
        ratio: int | None = None,
        instruction: str | None = None,
        system_instruction: str | None = None,
        instructions: Mapping[str, str] | None = None,
        on_missing: OnMissing = "error",
        execute: Executor = in_process,
        **encoding: Any,
    ) -> None:
        self._job = EncodeJob(inputs=(), uri="", model=model, **encoding)
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kalm-mteb-")
            folder = self._temporary.name
        self._folder = Path(folder)
        self._ratio = ratio
        self._instruction = instruction
        self._system_instruction = system_instruction
        self._instructions = dict(instructions or {})
        self._on_missing: OnMissing = on_missing
        self._execute = execute

    def index(
        self,
        corpus: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        **kwargs: Any,
    ) -> None:
        """Write the corpus as JSONL and encode what is not encoded yet.

        Raises:
            MismatchError: The table there has another corpus or other settings.
            KalmError: As `pipeline.run.driver.run`.
        """
        table = self.table_path(task_metadata.name, hf_subset, hf_split)
        table.parent.mkdir(parents=True, exist_ok=True)
        file = table.with_name("corpus.jsonl")
        with file.open("w", encoding="utf-8") as lines:
            for row in corpus:
                title = row.get("title") or ""
                passage = {"_id": row["id"], "title": title, "text": row["text"]}
                lines.write(json.dumps(passage) + "\n")
        run(replace(self._job, inputs=(str(file),), uri=str(table)), self._execute)

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Score candidates: `top_ranked`, or the best `top_k` of the table's full-text search.

        Returns:
            P(yes) by query id and passage id, at most top_k per query.

        Raises:
            TableError: `index` was not called, or was not completed.
            InputError: A query is a conversation.
        """
        table = PassageTable.open(str(self.table_path(task_metadata.name, hf_subset, hf_split)))
        reranker = Reranker(table, self._decoder, max_length=self._job.max_length)
        scores: dict[str, dict[str, float]] = {}
        for row in queries:
            query, instruction = row["text"], row.get("instruction")
            if not isinstance(query, str):
                raise InputError(
                    f"query {row['id']!r} of {task_metadata.name} is a conversation: only texts "
                    "can be scored"
                )
            if instruction:
                query = f"{query} {instruction}"  # it is part of both, as in mteb
            else:
                instruction = self._instructions.get(task_metadata.name, self._instruction)
            if top_ranked is None:
                ids = [i for i, _ in table.search(query, top_k)]
            else:
                ids = list(top_ranked.get(row["id"], ()))
            results = reranker.rerank(
                query,
                ids,
                instruction=instruction,
                system_instruction=self._system_instruction,
                ratio=self._ratio,
                top_k=top_k,
                on_missing=self._on_missing,
            )
            scores[row["id"]] = {r.id: r.score for r in results}
        return scores

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The name under which mteb keeps results: checkpoint and all that changes its scores."""
        from mteb.models import ModelMeta

        files = checkpoint.resolve(self._job.model, self._job.revision)
        settings = {
            "ratio": self._ratio or self._job.ratios[0],
            "store_dtype": self._job.store_dtype,
            "max_length": self._job.max_length,
            "instruction": self._instruction,
            "system_instruction": self._system_instruction,
            "instructions": self._instructions,
            "on_missing": self._on_missing if self._on_missing != "error" else None,
        }
        return ModelMeta.create_empty(
            {
                "name": files.name if files.revision else f"local/{files.path.name}",
                "revision": files.revision or files.fingerprint,
                "model_type": ["cross-encoder"],
                "experiment_kwargs": {k: v for k, v in settings.items() if v},
            }
        )

    def table_path(self, task: str, subset: str, split: str) -> Path:
        """Return where the table of one corpus is."""
        parts = [re.sub(r"[^\w.-]", "_", part) for part in (task, subset, split)]
        return self._folder.joinpath(*parts, "passages.lance")

    @cached_property
    def _decoder(self) -> QueryDecoder:
        dtype = self._job.compute_dtype
        return QueryDecoder(self._job.model, revision=self._job.revision, dtype=dtype)
