"""KaLMCrossEncoder answers the calls of sentence-transformers' CrossEncoder from stored states.

    model = KaLMCrossEncoder("passages.lance")
    model.rank("how are states read?", ["d1", "d2", "d3"], top_k=2)  # [{"corpus_id": 1, "score": …
    model.predict([("how are states read?", "d1"), ("another query", "d7")])

Documents are ids of the table. With an encoder they are texts, which are encoded in each call. With
match_text they are texts too, and only those that the table does not hold are encoded, if there is
an encoder. This module does not import sentence-transformers.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalm_encoder.errors import InputError, MismatchError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import OnMissing
from kalm_encoder.rerank.texts import encode_texts, keys_of, naming_texts
from kalm_encoder.table.ids import Id, as_id

if TYPE_CHECKING:
    from kalm_encoder.model.encoder import PassageEncoder


class KaLMCrossEncoder:
    """Scores (query, document) pairs by P(yes). The score of a pair depends on no other pair.

    Args:
        reranker: An open Reranker, or the address of a passage table.
        encoder: Encoder of the table's model; with one, documents are texts. Their states are
            float32, so their scores are not rounded to the table's store_dtype.
        match_text: Whether documents are texts that are scored from stored states if the table
            holds them.
        instruction: Description of the task; None takes the model's default.
        system_instruction: What the model is told before the task; None takes its default.
        ratio: Any multiple of a stored ratio; None takes the finest stored.
        on_missing: What becomes of ids that the table does not hold, and of such texts without an
            encoder: "error" raises, "drop" leaves them out of a ranking, and "last" gives them a
            score of 0.

    Attributes:
        num_labels: Number of scores per pair, which sentence-transformers' evaluators ask for.
        model_card_data: Takes what these evaluators record, and keeps nothing.

    Raises:
        MismatchError: If the encoder has another passage length than the table.
        InputError: If the ratio or on_missing is impossible, or if texts are to be matched and the
            reranker was opened without that.
    """

    num_labels = 1

    def __init__(
        self,
        reranker: Reranker | str | os.PathLike[str],
        *,
        encoder: PassageEncoder | None = None,
        match_text: bool = False,
        instruction: str | None = None,
        system_instruction: str | None = None,
        ratio: int | None = None,
        on_missing: OnMissing = "error",
    ) -> None:
        self._reranker = Reranker.of(reranker, match_text=match_text)
        self._match_text = match_text
        self._reranker.stages(ratio=ratio, on_missing=on_missing)
        spec = self._reranker.table.spec
        if encoder is not None and encoder.max_length != spec.max_length:
            raise MismatchError(
                "max_length",
                f"{self._reranker.table.uri} has max_length {spec.max_length}, the encoder "
                f"{encoder.max_length}: load it with PassageEncoder({spec.model!r}, "
                f"max_length={spec.max_length})",
            )
        self._encoder = encoder
        self._options: dict[str, Any] = {
            "instruction": instruction,
            "system_instruction": system_instruction,
            "ratio": ratio,
            "on_missing": on_missing,
        }
        self.model_card_data = NoCard()

    def rank(
        self,
        query: str,
        documents: Sequence[Id],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | int | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
        *,
        num_workers: int | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool | None = None,
        convert_to_tensor: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query.

        Args:
            query: Raw text.
            documents: Ids, or texts if there is an encoder or `match_text`. A repeated one is in
                the result twice.
            top_k: Number of results to keep; None keeps all.
            return_documents: Whether to add each given document to its result as "text".
            prompt_name: Must be None, as `instruction` says what the task is. A number, which older
                callers give as a batch size, is ignored.
            prompt: Must be None for the same reason.
            batch_size: Ignored, because batches have a token budget.
            show_progress_bar: Ignored.
            activation_fn: Must be None or a Sigmoid, which makes P(yes).
            device: Must be None or the device of the decoder.
            pool: Must be None.
            chunk_size: Ignored, as it is without a pool.
            num_workers: Ignored, as sentence-transformers ignores it.
            apply_softmax: Must be false, because P(yes) is not normalised over documents.
            convert_to_numpy: Ignored, because scores are Python floats.
            convert_to_tensor: Ignored for the same reason.

        Returns:
            {"corpus_id": position, "score": P(yes)} per document, best first; ties are broken by
            margin and then by position.

        Raises:
            InputError: If an option would change the scores.
            MissingIdsError: If the table does not hold some ids, and on_missing is "error".
            MissingTextsError: The same with `match_text`.
        """
        self._refuse(prompt_name, prompt, activation_fn, apply_softmax, device, pool)
        found = self._scores([(query, document) for document in documents])
        scores = {place: score for place, score in enumerate(found) if score is not None}
        order = sorted(scores, key=scores.__getitem__, reverse=True)[:top_k]
        ranked: list[dict[str, Any]] = [{"corpus_id": i, "score": scores[i][0]} for i in order]
        if return_documents:
            for row in ranked:
                row["text"] = documents[row["corpus_id"]]
        return ranked

    def predict(
        self,
        inputs: Sequence[Sequence[Id]] | Sequence[Id],
        prompt_name: str | int | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
        *,
        num_workers: int | None = None,
    ) -> Any:
        """Score pairs.

        Args:
            inputs: n (query, document) pairs, or a single one; documents as in `rank`.
            prompt_name: As in `rank`, like the five below.
            prompt: As above.
            batch_size: Ignored.
            show_progress_bar: Ignored.
            activation_fn: As in `rank`.
            apply_softmax: As in `rank`.
            convert_to_numpy: Whether to return an array; False returns a list of scalar tensors.
            convert_to_tensor: Whether to return one tensor. It overrides `convert_to_numpy`.
            device: As in `rank`, like the three below.
            pool: As above.
            chunk_size: Ignored.
            num_workers: Ignored.

        Returns:
            P(yes), (n,) float32 in input order; a scalar for a single pair.

        Raises:
            InputError: If an option would change the scores, or on_missing is "drop".
            MissingIdsError: If the table does not hold some ids, and on_missing is "error".
            MissingTextsError: The same with `match_text`.
        """
        self._refuse(prompt_name, prompt, activation_fn, apply_softmax, device, pool)
        if self._options["on_missing"] == "drop":
            raise InputError("predict returns a score per pair and drops none: use on_missing=last")
        single = len(inputs) > 0 and isinstance(inputs[0], str)
        pairs: Any = [inputs] if single else inputs
        found = [score[0] for score in self._scores(pairs) if score is not None]
        scores = np.array(found, dtype=np.float32)
        result: Any = scores if convert_to_numpy else list(torch.from_numpy(scores))
        if convert_to_tensor:
            result = torch.from_numpy(scores)
        return result[0] if single else result

    def _refuse(
        self,
        prompt_name: object,
        prompt: object,
        activation_fn: object,
        apply_softmax: object,
        device: object,
        pool: object,
    ) -> None:
        """Refuse what would change the scores of a CrossEncoder; here it would change nothing."""
        own = self._reranker.decoder.device
        devices = (str(own), own.type)
        elsewhere = f"the decoder is on {own}; Reranker.open takes a device"
        task = "give the task as instruction to KaLMCrossEncoder"
        margins = "leave it out for P(yes), or take the margins of Reranker.rerank"
        for name, given, changes, remedy in (
            ("prompt_name", prompt_name, isinstance(prompt_name, str), task),
            ("prompt", prompt, isinstance(prompt, str), task),
            ("activation_fn", activation_fn, not _is_sigmoid(activation_fn), margins),
            ("apply_softmax", apply_softmax, apply_softmax, "leave it out: scores are P(yes)"),
            ("device", device, device and str(device) not in devices, elsewhere),
            ("pool", pool, pool is not None, "leave it out: this process scores"),
        ):
            if changes:
                raise InputError(f"{name}={given!r} cannot be used here: {remedy}")

    def _scores(self, pairs: Sequence[tuple[str, Id]]) -> list[tuple[float, float] | None]:
        """Return (score, margin) per pair, or None for what was dropped; score each pair once."""
        table, named = self._reranker.table, [(query, as_id(given)) for query, given in pairs]
        if self._match_text or self._encoder is not None:
            texts = list(dict.fromkeys(document for _, document in named))
            keys = keys_of(texts, table.ids_by_text(texts) if self._match_text else {})
            named = [(query, keys[document]) for query, document in named]
        documents = defaultdict(list)
        for query, key in named:
            documents[query].append(key)
        passages: dict[str, PassageStates] = {}
        if self._encoder is not None:
            encode = partial(self._encoder.encode, ratio=table.spec.ratios[0])
            passages = encode_texts(keys.values(), encode)
        found = {}
        for query, wanted in documents.items():
            with naming_texts(table.uri):
                results = self._reranker.rerank(query, wanted, passages=passages, **self._options)
            for r in results:
                found[query, r.id] = r.score, r.margin
        return [found.get(pair) for pair in named]


def _is_sigmoid(function: object) -> bool:
    return function in (None, torch.sigmoid) or isinstance(function, torch.nn.Sigmoid)


class NoCard:
    """Stands for a model card, in which sentence-transformers' evaluators record their metrics."""

    def set_evaluation_metrics(self, *_: object) -> None:
        """Keep nothing: this model is not saved, and the evaluator returns its metrics."""
