"""Metadata columns from the command line to the frameworks that rank by stored states."""

import json

import lancedb
import pytest
from lancedb.index import FTS
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from kalm_encoder import Reranker
from kalm_encoder.adapters.lancedb import KaLMReranker
from kalm_encoder.adapters.langchain import KaLMCompressor
from kalm_encoder.adapters.llama_index import KaLMNodePostprocessor
from kalm_encoder.errors import InputError
from tests.support.commands import kalm

ROWS = [
    {"id": f"d{i}", "text": f"stored state {i}", "lang": ["en", "de"][i % 2], "year": 2000 + i}
    for i in range(12)
]
GERMAN = {row["id"] for row in ROWS if row["lang"] == "de"}
KEEP = ("--keep", "lang,year:int64", "--index-column", "lang")


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory):
    """A corpus and its table, encoded by the command."""
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = ("--model", model_dir)
    kalm("encode", "c.jsonl", "--to", "t.lance", *model, "--workers", 0, *KEEP, cwd=folder, check=0)
    return folder


@pytest.fixture(scope="module")
def reranker(folder):
    return Reranker.open(folder / "t.lance")


def test_the_commands(folder, model_dir):
    def say(*words):
        return kalm(*words, cwd=folder, check=0).stdout

    assert (
        json.loads(say("status", "t.lance", "--json"))["metadata_columns"]
        == "lang:string,year:int64"
    )
    ask = ("rerank", "t.lance", "--query", "state", "--json", "--top-k", 0)
    found = json.loads(say(*ask, "--search", 4, "--where", "lang = 'de' AND year > 2002"))[
        "results"
    ]
    assert len(found) == 4, "the best four of those that satisfy it"
    assert {r["id"] for r in found} < GERMAN - {"d1"}
    found = json.loads(say(*ask, "--ids", "d0,d1,d3,nobody", "--where", "lang = 'de'"))["results"]
    assert {r["id"] for r in found} == {"d1", "d3"}
    changed = [row | {"year": 1900} if row["id"] == "d5" else row for row in ROWS]
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    counts = json.loads(
        say("sync", "new.jsonl", "--to", "t.lance", "--workers", 0, "--json", "--dry-run")
    )
    assert counts["metadata_changed"] == 1
    assert counts["unchanged"] == len(ROWS) - 1
    plan = say(
        "plan", "c.jsonl", "--model", model_dir, "--keep", "lang,year:int64", "--time-limit", 0
    )
    assert "metadata from lang (string), year (int64)" in plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "id"], "the table has a column 'id' of its own: rename"),
        (["--keep", "Checksum_r4"], "the table has a column 'Checksum_r4' of its own"),
        (["--keep", "lang,LANG"], "the column 'LANG' would be kept twice"),
        (["--keep", "a-b"], "the column 'a-b' cannot be kept: a filter could not name it"),
        (["--keep", "year:int"], "'year' cannot be kept as 'int': give one of bool, int32"),
        (["--keep", ","], "--keep is empty"),
        (
            ["--keep", "nothing"],
            "c.jsonl has no field 'nothing' to keep; it has id, text, lang, year",
        ),
        (["--index-column", "lang"], "no metadata column 'lang' to index; the table keeps none"),
        (["--keep", "year:string"], "line 12: field 'year' holds int '2011', which is no string"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_encoded(
    folder, model_dir, options, message
):
    more = ("--to", "u.lance", "--model", model_dir, "--workers", 0)
    done = kalm("encode", "c.jsonl", *more, *options, cwd=folder)
    assert done.returncode in (1, 2)
    assert message in done.stderr


def test_langchain_and_llama_index_filter_and_take_the_metadata_of_the_table(reranker):
    documents = [
        Document(page_content="", id=row["id"], metadata={"year": 0, "page": 1}) for row in ROWS
    ]
    options = {"reranker": reranker, "where": "lang = 'de'", "with_metadata": True}
    best = KaLMCompressor(**options).compress_documents(documents, "state")
    nodes = [NodeWithScore(node=TextNode(id_=row["id"], text="")) for row in ROWS]
    postprocessor = KaLMNodePostprocessor(**options, keep_retrieval_score=True)
    ranked = postprocessor.postprocess_nodes(nodes, query_str="state")
    assert [d.id for d in best] == [n.node.node_id for n in ranked]
    assert {d.id for d in best} == GERMAN
    for document, node in zip(best, ranked, strict=True):
        year = 2000 + int(document.id[1:])
        score = document.metadata.pop("relevance_score")
        assert document.metadata == {"lang": "de", "year": year, "page": 1}
        assert node.node.metadata == {"lang": "de", "year": year, "retrieval_score": None}
        assert node.score == score
    assert documents[0].metadata == {"year": 0, "page": 1}


def test_lancedb_filters_by_the_columns_of_the_passage_table(reranker, tmp_path):
    table = lancedb.connect(tmp_path).create_table(
        "docs", [{"id": r["id"], "text": r["text"]} for r in ROWS]
    )
    table.create_index("text", config=FTS())
    search = table.search("state", query_type="fts").limit(20)
    rows = search.rerank(KaLMReranker(reranker, where="lang = 'de'")).to_list()
    assert {row["id"] for row in rows} == GERMAN


@pytest.mark.parametrize("where", ["language = 'de'", "year = 'x'", "lang"])
def test_an_impossible_filter_is_refused_when_an_adapter_is_made(reranker, where):
    for make in (
        lambda: KaLMReranker(reranker, where=where),
        lambda: KaLMCompressor(reranker=reranker, where=where),
        lambda: reranker.rerank("q", ["d1"], where=where),
        lambda: reranker.table.search("state", 5, where=where),
    ):
        with pytest.raises(InputError, match=r"the filter .* is refused"):
            make()
