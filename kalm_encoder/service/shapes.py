"""What requests may hold: the union of the Cohere, Jina, vLLM and TEI shapes, and our own fields.

Fields nobody here knows are ignored, as those services do. Answers are plain dictionaries, made in
app.py.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

Query = Annotated[str, Field(max_length=32_768)]
Id = Annotated[str, Field(max_length=4_096)]
Stage = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)] | None]


class Shape(BaseModel):
    """Unknown fields are ignored; NaN and Infinity are no numbers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Document(Shape):
    """A candidate: a stored id, a text, or both (the text is read where the id is unknown)."""

    id: Id | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _is_something(self) -> Document:
        if self.id is None and self.text is None:
            raise ValueError("a document needs an id or a text")
        return self


class Options(Shape):
    """How to score."""

    instruction: Annotated[
        str | None,
        Field(max_length=8_192, validation_alias=AliasChoices("instruction", "instruct")),
    ] = None
    ratio: Annotated[int | None, Field(ge=1, le=1 << 20)] = None
    cascade: Annotated[list[Stage] | None, Field(max_length=8)] = None
    max_ms: Annotated[float | None, Field(gt=0)] = None
    filter: str | None = None


class RerankRequest(Options):
    """POST /rerank, /v1/rerank, /v2/rerank."""

    query: Query
    model: str | None = None
    documents: list[str | Document] | None = None
    document_ids: list[Id] | None = None
    top_n: Annotated[int | None, Field(ge=0)] = None
    return_documents: bool = False
    raw_scores: bool = False
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None

    @model_validator(mode="after")
    def _has_candidates(self) -> RerankRequest:
        if (self.documents is None) == (self.document_ids is None):
            raise ValueError("give documents or document_ids, one of them")
        return self

    def candidates(self) -> list[Document]:
        """Return the candidates in the order of the request."""
        if self.document_ids is not None:
            return [Document(id=i) for i in self.document_ids]
        return [as_document(d) for d in self.documents or []]


class ScoreRequest(Options):
    """POST /score and /v1/score: one query against all, or pair by pair."""

    model: str | None = None
    queries: Annotated[
        Query | list[Query], Field(validation_alias=AliasChoices("queries", "text_1"))
    ]
    documents: Annotated[
        str | list[str | Document] | None,
        Field(validation_alias=AliasChoices("documents", "text_2")),
    ] = None
    document_ids: list[Id] | None = None

    @model_validator(mode="after")
    def _pairs_up(self) -> ScoreRequest:
        if (self.documents is None) == (self.document_ids is None):
            raise ValueError("give documents or document_ids, one of them")
        if isinstance(self.queries, list) and len(self.queries) not in (1, len(self.candidates())):
            raise ValueError("give one query, or as many as there are documents")
        return self

    def candidates(self) -> list[Document]:
        """Return the candidates in the order of the request."""
        if self.document_ids is not None:
            return [Document(id=i) for i in self.document_ids]
        documents = [self.documents] if isinstance(self.documents, str) else self.documents or []
        return [as_document(d) for d in documents]

    def pairs(self) -> list[tuple[str, Document]]:
        """Return (query, candidate) in the order of the answer."""
        candidates = self.candidates()
        queries = [self.queries] if isinstance(self.queries, str) else self.queries
        if len(queries) == 1:
            queries = queries * len(candidates)
        return list(zip(queries, candidates, strict=True))


class TeiRequest(Shape):
    """POST /rerank with --tei: Text Embeddings Inference."""

    query: Query
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class ExploreRequest(Shape):
    """POST /explore/search: a first stage over a table's text, reranked."""

    query: Annotated[str, Field(min_length=1, max_length=32_768)]
    k: Annotated[int, Field(ge=1)] = 50
    instruction: Annotated[str | None, Field(max_length=8_192)] = None
    ratio: Annotated[int | None, Field(ge=1, le=1 << 20)] = None
    cascade: Annotated[list[Stage] | None, Field(max_length=8)] = None
    table: str | None = None


class PassageRequest(Shape):
    """POST /explore/passage: the whole text of one passage."""

    id: Id
    table: str | None = None


def as_document(given: str | Document) -> Document:
    """Return a plain string as a text."""
    return Document(text=given) if isinstance(given, str) else given


def problems(errors: list[Any]) -> str:
    """Return what is wrong with a request, without repeating what it held."""
    shown = [f"{'.'.join(str(p) for p in e['loc'])[:200]}: {e['msg'][:200]}" for e in errors[:5]]
    return "; ".join(shown)
