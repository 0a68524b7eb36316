"""Describes requests: the union of the Cohere, Jina, vLLM and TEI shapes, and our own fields.

Those services ignore fields they do not know, so these models do too. Answers are plain
dictionaries; answers.py makes them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from kalm_encoder.errors import InputError
from kalm_encoder.rerank.grouping import MAX_PASSAGES, Aggregate
from kalm_encoder.rerank.results import OnMissing

MAX_RATIO = 1 << 20
"""Largest ratio a request may ask for; far above any passage, it keeps numbers small."""


def _decimal(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Query = Annotated[str, Field(max_length=32_768)]
Id = Annotated[
    str, Field(max_length=4_096), BeforeValidator(_decimal, json_schema_input_type=str | int)
]
"""An id; an integer stands for its decimal string, as at encoding."""
Ratio = Annotated[int, Field(ge=1, le=MAX_RATIO)]
Instruction = Annotated[str, Field(max_length=8_192)]
Stage = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)] | None]


class Request(BaseModel):
    """The base of all requests: unknown fields are ignored; NaN and Infinity are not numbers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Document(Request):
    """A candidate: a stored id, a text, or both. The text is used if the id is not stored."""

    model_config = ConfigDict(extra="allow")  # `rank_fields` may name any field

    id: Id | None = None
    text: str | None = None


class Options(Request):
    """The fields that say how to score."""

    instruction: Annotated[
        Instruction | None, Field(validation_alias=AliasChoices("instruction", "instruct"))
    ] = None
    system_instruction: Instruction | None = None
    ratio: Ratio | None = None
    cascade: Annotated[list[Stage] | None, Field(max_length=8)] = None
    max_ms: Annotated[float | None, Field(gt=0)] = None
    filter: str | None = None
    on_missing: OnMissing = "error"
    group_by: str | None = None
    aggregate: Aggregate = "max"
    max_passages: Annotated[int, Field(ge=1)] = MAX_PASSAGES


class CandidatesRequest(Options):
    """Options, and the candidates to score: documents or ids. One text may come without a list.

    With `rank_fields` the text of a document is made of these fields of it, as Cohere does it.
    """

    model: str | None = None
    documents: Annotated[
        str | list[str | Document] | None,
        Field(validation_alias=AliasChoices("documents", "text_2")),
    ] = None
    document_ids: list[Id] | None = None
    rank_fields: Annotated[list[str] | None, Field(min_length=1)] = None

    def candidates(self) -> list[Document]:
        """Return the candidates in the order of the request.

        Raises:
            InputError: The request gives both documents and ids, or neither; or a document has
                neither an id nor a text.
        """
        if (self.documents is None) == (self.document_ids is None):
            raise InputError("give either documents or document_ids")
        given = [self.documents] if isinstance(self.documents, str) else self.documents or []
        documents = [self._document(place, one) for place, one in enumerate(given)]
        return documents + [Document(id=one) for one in self.document_ids or []]

    def _document(self, place: int, given: str | Document) -> Document:
        if isinstance(given, str):
            return Document(text=given)
        if self.rank_fields is not None:
            fields = given.model_dump()
            values = [fields[name] for name in self.rank_fields if fields.get(name) is not None]
            if not all(isinstance(value, str) for value in values):
                raise InputError(f"documents[{place}]: a field in rank_fields does not hold a text")
            given = Document(id=given.id, text=" ".join(values).strip() if values else None)
        if given.id is None and given.text is None:
            names = ", ".join(self.rank_fields or ["text"])
            raise InputError(
                f"documents[{place}] has neither an id nor a text in the field {names}: give one, "
                "or name the fields of its text as rank_fields"
            )
        return given


class RerankRequest(CandidatesRequest):
    """POST /rerank, /v1/rerank, /v2/rerank."""

    query: Query
    top_n: Annotated[int | None, Field(ge=0)] = None
    return_documents: bool = False
    return_metadata: bool = False
    raw_scores: bool = False
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None


class ScoreRequest(CandidatesRequest):
    """POST /score and /v1/score: one query against all candidates, or pair by pair."""

    queries: Annotated[
        Query | list[Query], Field(validation_alias=AliasChoices("queries", "text_1"))
    ]

    def pairs(self) -> list[tuple[str, Document]]:
        """Return the (query, candidate) pairs in the order of the answer.

        Raises:
            InputError: There are several queries, but not one per candidate.
        """
        candidates = self.candidates()
        queries = [self.queries] if isinstance(self.queries, str) else self.queries
        if len(queries) == 1:
            queries = queries * len(candidates)
        if len(queries) != len(candidates):
            raise InputError("give one query, or as many queries as there are documents")
        return list(zip(queries, candidates, strict=True))


class TeiRequest(Request):
    """POST /rerank with --tei, in the shape of Text Embeddings Inference."""

    query: Query
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class ExploreRequest(Options):
    """POST /explore/search: a full-text search over a table, reranked."""

    query: Annotated[Query, Field(min_length=1)]
    k: Annotated[int, Field(ge=1)] = 50
    table: str | None = None


class PassageRequest(Request):
    """POST /explore/passage: the whole text of one passage."""

    id: Id
    table: str | None = None
