"""What a request may hold: the union of the Cohere, Jina, vLLM and TEI shapes, and our own fields.

Those services ignore fields they do not know, so these models do too. Answers are plain
dictionaries; answers.py makes them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_RATIO = 1 << 20
"""Largest ratio a request may ask for; far above any passage, it keeps numbers small."""

Query = Annotated[str, Field(max_length=32_768)]
Id = Annotated[str, Field(max_length=4_096)]
Ratio = Annotated[int, Field(ge=1, le=MAX_RATIO)]
Stage = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)] | None]


class Request(BaseModel):
    """The base of all requests: unknown fields are ignored; NaN and Infinity are not numbers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Document(Request):
    """A candidate: a stored id, a text, or both. The text is used if the id is not stored."""

    id: Id | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> Document:
        if self.id is None and self.text is None:
            raise ValueError("a document needs an id or a text")
        return self


def _text_as_document(given: Any) -> Any:
    return {"text": given} if isinstance(given, str) else given


def _one_as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Candidate = Annotated[
    Document, BeforeValidator(_text_as_document, json_schema_input_type=str | Document)
]
Candidates = Annotated[
    list[Candidate], BeforeValidator(_one_as_list, json_schema_input_type=str | list[Candidate])
]
Queries = Annotated[
    list[Query], BeforeValidator(_one_as_list, json_schema_input_type=Query | list[Query])
]


class Options(Request):
    """How to score."""

    instruction: Annotated[
        str | None,
        Field(max_length=8_192, validation_alias=AliasChoices("instruction", "instruct")),
    ] = None
    ratio: Ratio | None = None
    cascade: Annotated[list[Stage] | None, Field(max_length=8)] = None
    max_ms: Annotated[float | None, Field(gt=0)] = None
    filter: str | None = None


class CandidatesRequest(Options):
    """Options, and the candidates to score: documents or ids."""

    model: str | None = None
    documents: list[Candidate] | None = None
    document_ids: list[Id] | None = None

    @model_validator(mode="after")
    def _has_candidates(self) -> CandidatesRequest:
        if (self.documents is None) == (self.document_ids is None):
            raise ValueError("give either documents or document_ids")
        return self

    @property
    def candidates(self) -> list[Document]:
        """The candidates, in the order of the request."""
        if self.documents is not None:
            return self.documents
        return [Document(id=i) for i in self.document_ids or []]


class RerankRequest(CandidatesRequest):
    """POST /rerank, /v1/rerank, /v2/rerank."""

    query: Query
    top_n: Annotated[int | None, Field(ge=0)] = None
    return_documents: bool = False
    raw_scores: bool = False
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None


class ScoreRequest(CandidatesRequest):
    """POST /score and /v1/score: one query against all candidates, or pair by pair."""

    queries: Annotated[Queries, Field(validation_alias=AliasChoices("queries", "text_1"))]
    documents: Annotated[
        Candidates | None, Field(validation_alias=AliasChoices("documents", "text_2"))
    ] = None

    @model_validator(mode="after")
    def _pairs_up(self) -> ScoreRequest:
        if len(self.queries) not in (1, len(self.candidates)):
            raise ValueError("give one query, or as many queries as there are documents")
        return self

    def pairs(self) -> list[tuple[str, Document]]:
        """Return the (query, candidate) pairs in the order of the answer."""
        candidates = self.candidates
        queries = self.queries * len(candidates) if len(self.queries) == 1 else self.queries
        return list(zip(queries, candidates, strict=True))


class TeiRequest(Request):
    """POST /rerank with --tei, in the shape of Text Embeddings Inference."""

    query: Query
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class ExploreRequest(Options):
    """POST /explore/search: a full-text search over a table, reranked."""

    query: Annotated[Query, Field(min_length=1)]
    k: Annotated[int, Field(ge=1)] = 50
    table: str | None = None


class PassageRequest(Request):
    """POST /explore/passage: the whole text of one passage."""

    id: Id
    table: str | None = None
