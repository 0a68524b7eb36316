"""Ranks passages by id: it takes their stored states from the table and scores them.

Table and decoder meet only in this package; neither knows of the other.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

from kalm_encoder.errors import InputError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.model.checkpoint import Device, Dtype
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.pairs import Pair, Prompt
from kalm_encoder.process import check_process
from kalm_encoder.rerank.candidates import CandidateReader
from kalm_encoder.rerank.cascade import Stage, choose_stages
from kalm_encoder.rerank.grouping import MAX_PASSAGES, Aggregate, Grouping, rank_documents
from kalm_encoder.rerank.match import check_match
from kalm_encoder.rerank.results import OnMissing, RerankResult, TextResult
from kalm_encoder.rerank.texts import Encode, rank_texts
from kalm_encoder.table.cache.disk_cache import DiskCache
from kalm_encoder.table.ids import Id, as_id, as_ids
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.restricted import RestrictedTable

CHUNK_CANDIDATES = 128
"""Number of candidates that are read together while the decoder scores those before them."""
TIMED_CHUNK_CANDIDATES = 16
"""The same with a time budget, which is checked between two chunks: smaller chunks keep it more
exactly, larger ones use the decoder better."""

ScorePairs = Callable[[Sequence[Pair]], list[tuple[float, float]]]
"""Returns the score and the margin of each pair, as QueryDecoder.score_pairs does."""


class Reranker:
    """A passage table and the decoder that belongs to it.

    Args:
        table: The open table.
        decoder: Decoder of the same checkpoint.
        max_length: Passage length that the caller relies on; None takes what the table records.
        score_pairs: Function that scores in place of the decoder's own, for a service whose
            requests share batches.

    Raises:
        MismatchError: If table and decoder do not belong together.
    """

    def __init__(
        self,
        table: PassageTable,
        decoder: QueryDecoder,
        *,
        max_length: int | None = None,
        score_pairs: ScorePairs | None = None,
    ) -> None:
        check_match(table, decoder, max_length=max_length)
        self.table = table
        self.decoder = decoder
        self._score_pairs = score_pairs
        self._candidates = CandidateReader(table, decoder)
        self._reopen: Callable[[], Reranker] | None = None

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        version: int | str | None = None,
        max_length: int | None = None,
        storage_options: dict[str, str] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        hot_bytes: int = 0,
        index_bytes: int = 0,
        match_text: bool = False,
        disk_cache: DiskCache | None = None,
    ) -> Reranker:
        """Open a table and load the decoder for it; the encoder is never loaded.

        Args:
            uri: Address of the table.
            model: Hub id or directory of the model; None takes what the table records.
            revision: Hub revision of the model; if both are None, what the table records.
            version: Version number or tag of the table; None takes the tag `live`.
            max_length: Passage length that the caller relies on; None takes what the table records.
            storage_options: Storage options of Lance.
            device: Device of the decoder; None takes the first GPU, or the CPU if there is none.
            dtype: Dtype of the decoder; None takes bfloat16 on a GPU and float32 on a CPU.
            hot_bytes: Memory on the device for passages that come back with the same instructions.
                They are not read again, and the fixed part of their prompt is not computed again.
            index_bytes: Memory for an index of the table's rows; see PassageTable.load_index.
            match_text: Whether `rerank_texts` is wanted. It needs that index, for which 0 is then
                no limit.
            disk_cache: Cache of states on the local disk, for a table on an object store.

        Raises:
            TableError: If there is no such table, or it is not complete.
            InputError: If texts are to be matched and the index would be larger than the limit.
            CheckpointError: If the model cannot be loaded.
            MismatchError: If table and model do not belong together; it names the field.
        """
        stored: dict[str, Any] = {
            "storage_options": storage_options,
            "index_bytes": index_bytes,
            "match_text": match_text,
            "disk_cache": disk_cache,
        }
        table = PassageTable.open(uri, version=version, **stored)
        if model is None:
            model, revision = table.spec.model, revision or table.spec.revision
        where = {"revision": revision, "device": device, "dtype": dtype}
        loaded: dict[str, Any] = where | {"hot_bytes": hot_bytes}
        decoder = QueryDecoder(os.fspath(model), **loaded)
        reranker = cls(table, decoder, max_length=max_length)
        more: dict[str, Any] = {"model": model, "version": table.version, "max_length": max_length}
        reranker._reopen = partial(cls.open, table.uri, **more, **stored, **loaded)
        return reranker

    def __reduce__(self) -> tuple[Callable[[], Reranker], tuple[()]]:
        """Pickle the address alone: the copy opens the same version and loads the model again."""
        if self._reopen is None:
            raise InputError(
                "only a Reranker made by Reranker.open can be pickled: this one was made of an "
                "open table and a decoder"
            )
        return self._reopen, ()

    @classmethod
    def of(cls, given: Reranker | str | os.PathLike[str], *, match_text: bool = False) -> Reranker:
        """Return an open reranker as it is, and open one for the address of a table.

        Raises:
            InputError: If texts are to be matched, and the reranker was opened without that.
        """
        if not isinstance(given, Reranker):
            return cls.open(given, match_text=match_text)
        if match_text:
            given.table.ids_by_text([])
        return given

    def restricted(self, where: str) -> Reranker:
        """Return a reranker of those rows that satisfy a predicate, as if there were no others.

        It shares the decoder and the threads that read.

        Args:
            where: SQL predicate over the columns of the table, such as "tenant = 'a'".

        Raises:
            InputError: If Lance cannot apply the predicate to the columns of this table.
        """
        table = RestrictedTable(self.table, where)
        made = Reranker(table, self.decoder, score_pairs=self._score_pairs)
        made._candidates = self._candidates.of(table)
        return made

    def rerank(
        self,
        query: str | Prompt,
        ids: Sequence[Id],
        *,
        instruction: str | None = None,
        system_instruction: str | None = None,
        ratio: int | None = None,
        top_k: int | None = None,
        cascade: Sequence[Stage] | None = None,
        max_ms: float | None = None,
        on_missing: OnMissing = "error",
        where: str | None = None,
        passages: Mapping[Any, PassageStates] | None = None,
        group_by: str | None = None,
        aggregate: Aggregate = "max",
        max_passages: int = MAX_PASSAGES,
    ) -> list[RerankResult]:
        """Score stored passages against a query.

        Args:
            query: Raw text, or a prompt that the decoder made of it with its instructions.
            ids: Candidates in any order; an integer stands for its decimal string. A repeated one
                is scored once, and so are stored passages with the same text.
            instruction: Description of the task; None takes the model's default.
            system_instruction: What the model is told before the task; None takes its default.
            ratio: Any multiple of a stored ratio; None takes the finest stored.
            top_k: Number of results to keep, the best first; None keeps all.
            cascade: Stages (ratio, how many of the best go on), coarse first, instead of `ratio`:
                [(32, 20), (4, None)] scores all at ratio 32 and the best 20 again at 4.
            max_ms: Time budget in milliseconds. The first stage scores all candidates, however long
                it takes; later stages score the best first and stop in time. Without a `cascade`
                there are two stages: `cascade.coarse_ratio`, then `ratio`.
            on_missing: What becomes of ids that the table does not hold. "error" raises, "drop"
                leaves them out, and "last" puts them behind all others, with a score of 0.
            where: SQL predicate over the columns of the table, such as "lang = 'en'". Candidates
                whose rows do not satisfy it are left out, and so are those without a row.
            passages: Freshly encoded states at the finest stored ratio, by id; they are used
                instead of those of the table.
            group_by: Metadata column that names the document of a passage, such as "doc_id". Then
                documents are ranked, and the candidates may be documents, which stand for all of
                their passages, or passages.
            aggregate: What gives the score of a document: "max" is the score of its best passage,
                "mean_top_2" the mean of its best two.
            max_passages: Most passages of a document that are scored as asked for. If it has more
                candidates, they are chosen by a first stage at `cascade.coarse_ratio`.

        Returns:
            The results of the last stage first, the best of each stage first, ties in the order of
            `ids`. Scores are P(yes), never normalised over the candidates. Scores of different
            ratios are not comparable. With `group_by` they are `grouping.DocumentResult`s, which
            have the best passage of each document and its span.

        Raises:
            MissingIdsError: If the table does not hold some ids; it names all of them.
            InputError: If an id is no id, or if ratio, top_k, cascade, max_ms, on_missing, where,
                group_by, aggregate or max_passages is impossible.
        """
        check_process()
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k {top_k} must be at least 1")
        stages = self.stages(ratio=ratio, cascade=cascade, max_ms=max_ms, on_missing=on_missing)
        deadline = None if max_ms is None else time.monotonic() + max_ms / 1000
        prompt = query
        if isinstance(prompt, str):
            prompt = self.decoder.prompt(prompt, instruction, system_instruction)
        if group_by is not None:
            if passages:
                raise InputError("documents are ranked by stored passages: leave out passages")
            grouping = Grouping(group_by, aggregate, max_passages)
            rank = partial(self.rerank, prompt, where=where)
            documents = rank_documents(
                rank, self.table, ids, grouping, stages=stages, max_ms=max_ms,
                on_missing=on_missing,
            )  # fmt: skip
            return [*documents[:top_k]]
        given = {as_id(i): passage for i, passage in (passages or {}).items()}
        candidates = list(dict.fromkeys(as_ids(ids)))
        if where is not None:
            allowed = self.table.known(candidates, where=where)
            candidates = [i for i in candidates if i in allowed]
        places = {i: place for place, i in enumerate(candidates)}
        left = list(places)
        ranked: list[RerankResult] = []
        for number, (stage_ratio, keep) in enumerate(stages):
            until = deadline if number else None  # the first stage scores all in any case
            scored = self._score(prompt, left, stage_ratio, until, given, on_missing)
            scored.sort(key=lambda r: (-r.score, -r.margin, places[r.id]))
            # Candidates that this stage did not reach keep their scores and come after the others.
            reached = {result.id for result in scored}
            ranked = [*scored, *(r for r in ranked if r.id not in reached)]
            left = [result.id for result in scored][:keep]
        if on_missing == "last":
            missing = places.keys() - {result.id for result in ranked}
            ranked += [RerankResult(i, 0.0, -math.inf, None) for i in places if i in missing]
        return ranked[:top_k]

    def rerank_texts(
        self,
        query: str | Prompt,
        texts: Sequence[str],
        *,
        encode: Encode | None = None,
        **options: Any,
    ) -> list[TextResult]:
        """Score texts against a query; those that the table holds are scored from stored states.

        Args:
            query: As in `rerank`.
            texts: Raw texts in any order, each exactly as it was encoded, title included, if its
                stored states are to be found. A repeated one is scored once.
            encode: Function that makes the states of texts that are not stored at the finest stored
                ratio, such as the method `encode` of a PassageEncoder. None makes none, and
                `on_missing` says what becomes of these texts.
            options: Options of `rerank`, except `passages` and `group_by`.

        Returns:
            One result per text, as `rerank` orders them. The score of a stored text is that of its
            id.

        Raises:
            MissingTextsError: If texts are neither stored nor encoded, and on_missing is "error".
            InputError: If the table was opened without `match_text`, or an option is impossible.
        """
        return rank_texts(partial(self.rerank, query, **options), self.table, texts, encode)

    def stages(
        self,
        *,
        ratio: int | None = None,
        cascade: Sequence[Stage] | None = None,
        max_ms: float | None = None,
        on_missing: OnMissing = "error",
    ) -> list[Stage]:
        """Return the stages of a request with these options of `rerank`.

        Raises:
            InputError: If an option is impossible.
        """
        if max_ms is not None and max_ms <= 0:
            raise InputError(f"max_ms {max_ms} must be above 0")
        if on_missing not in get_args(OnMissing):
            raise InputError(f"on_missing {on_missing!r} must be error, drop or last")
        return choose_stages(self.table.spec, ratio, cascade, timed=max_ms is not None)

    def _score(
        self,
        prompt: Prompt,
        ids: Sequence[str],
        ratio: int,
        deadline: float | None,
        given: Mapping[str, PassageStates],
        on_missing: OnMissing,
    ) -> list[RerankResult]:
        """Score candidates until the deadline and return those that were scored."""
        size = CHUNK_CANDIDATES if deadline is None else TIMED_CHUNK_CANDIDATES
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        score_pairs = self._score_pairs or self.decoder.score_pairs
        scores: dict[Hashable, tuple[float, float]] = {}
        results: list[RerankResult] = []
        took, began = 0.0, time.monotonic()
        for chunk, found in self._candidates.read_ahead(prompt, chunks, ratio, given):
            if on_missing == "error" and len(found) < len(chunk):
                raise self._candidates.missing(ids, given)
            if deadline is not None and time.monotonic() + took > deadline:
                break
            new: dict[Hashable, Pair] = {}
            for same, pair in found.values():
                if same not in scores:
                    new.setdefault(same, pair)
            scores |= zip(new, score_pairs(list(new.values())), strict=True)
            results += [RerankResult(i, *scores[same], ratio) for i, (same, _) in found.items()]
            took, began = time.monotonic() - began, time.monotonic()
        return results
