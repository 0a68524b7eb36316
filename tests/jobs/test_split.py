"""Documents from end to end: encode splits them, sync follows them, and a query ranks them."""

import json
import random

import lance
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from langchain_core.documents import Document
from typer.testing import CliRunner

from jobs.cli import app
from kalm_encoder import PassageEncoder, PassageTable, QueryDecoder, Reranker
from kalm_encoder.adapters.lancedb import KaLMReranker
from kalm_encoder.adapters.langchain import KaLMCompressor
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.model.checkpoint import resolve
from kalm_encoder.model.tokens import passage_ids
from kalm_encoder.service.app import create_app
from kalm_encoder.service.settings import Settings
from kalm_encoder.table.location import Location
from pipeline.corpus.passages import join_title
from pipeline.upkeep.erase import erase
from pipeline.upkeep.verify import verify
from tests.conftest import WORDS
from tests.support.serving import wait_until

QUERY = "index query passage"


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(4, 12))).capitalize() + ". "


def document(seed, sentences):
    rng = random.Random(seed)
    return "".join(sentence(rng) for _ in range(sentences))


def kalm(*words):
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def write(file, documents):
    rows = ({"id": i, "title": f"T{i}", "text": t, "lang": "en"} for i, t in documents.items())
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(table):
    columns = ["id", "text", "doc_id", "span_begin", "span_end", "truncated", "lang"]
    return {
        r["id"]: r for r in lance.dataset(str(table), version="live").to_table(columns).to_pylist()
    }


def encode(model_dir, folder, *more):
    return kalm(
        "encode", folder / "c.jsonl", "--to", folder / "t.lance", "--model", model_dir, "--workers",
        0, "--ratios", "2,16", "--max-length", 128, "--keep", "lang", "--shard-size", 2, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def split_table(model_dir, tmp_path_factory):
    """Documents a to d, the longest of about 60 passages of at most 64 tokens."""
    folder = tmp_path_factory.mktemp("split")
    documents = {name: document(name, n) for name, n in zip("abcd", (1, 30, 200, 4), strict=True)}
    write(folder / "c.jsonl", documents)
    encode(model_dir, folder, "--split", 64, "--overlap", 8)
    return folder / "t.lance", documents


def test_split_documents_follow_their_corpus(model_dir, tmp_path, split_table, monkeypatch):
    """A row per passage; an edit encodes what it touches; a shorter document loses the surplus."""
    table, documents = split_table
    write(tmp_path / "c.jsonl", documents)
    printed = encode(model_dir, tmp_path, "--split", 64, "--overlap", 8)
    assert "0 passages truncated" in printed and "rejected" not in printed
    found = rows(tmp_path / "t.lance")
    assert found == rows(table) and "a#0" in found and "a#1" not in found
    for row in found.values():
        body = documents[row["doc_id"]][row["span_begin"] : row["span_end"]]
        assert row["text"] == f"T{row['doc_id']} {body}".strip() and not row["truncated"]
    assert encode(model_dir, tmp_path, "--split", 64, "--overlap", 8).startswith(str(tmp_path))

    counted = []
    tokenise = PassageEncoder.tokenise
    monkeypatch.setattr(
        PassageEncoder, "tokenise", lambda self, t: counted.extend(t) or tokenise(self, t)
    )
    text = documents["c"]
    middle = text.index(". ", len(text) // 2) + 2
    edited = documents | {"c": text[:middle] + document("new", 8) + text[middle:]}
    write(tmp_path / "c.jsonl", edited)
    sync = ("sync", tmp_path / "c.jsonl", "--to", tmp_path / "t.lance", "--workers", 0, "--json")
    counts = json.loads(kalm(*sync))
    now = rows(tmp_path / "t.lance")
    new = {r["text"] for r in now.values()} - {r["text"] for r in found.values()}
    touched = [
        row for row in now.values() if row["doc_id"] == "c"
        and row["span_begin"] <= middle + len(document("new", 8)) and middle <= row["span_end"]
    ]  # fmt: skip
    assert len(now) > len(found) and sorted(counted) == sorted(new)
    assert len(counted) <= len(touched) + 1
    assert counts["changed"] + counts["new"] == len(counted) and counts["metadata_changed"] > 10

    write(tmp_path / "c.jsonl", documents | {"c": text[: len(text) // 3]})
    counts = json.loads(kalm(*sync))
    assert counts["surplus"] > 10 and counts["missing"] == 0
    assert not json.loads(kalm(*sync))["changed"]
    kept = rows(tmp_path / "t.lance")
    ids = [row["id"] for row in kept.values() if row["doc_id"] == "c"]
    assert sorted(ids, key=lambda id: int(id[2:])) == [f"c#{k}" for k in range(len(ids))]
    verified = verify(str(tmp_path / "t.lance"), inputs=[str(tmp_path / "c.jsonl")], sample=5)
    assert not verified.problems and verified.rows == len(kept)

    feed = [
        {"op": "delete", "id": "d"},
        {"op": "upsert", "id": "b", "lang": "en", "text": text[:900]},
    ]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(record) + "\n" for record in feed))
    kalm("sync", tmp_path / "f.jsonl", "--changes", *sync[2:])
    now = rows(tmp_path / "t.lance")
    of_b = sorted((r for r in now.values() if r["doc_id"] == "b"), key=lambda r: r["span_begin"])
    assert {i for i in now if i[0] in "acd"} == {i for i in kept if i[0] in "ac"}
    assert [r["id"] for r in of_b] == [f"b#{k}" for k in range(len(of_b))]
    assert of_b[-1]["span_end"] == 900 and len(of_b) < sum(i[0] == "b" for i in kept)

    erase(Location(str(tmp_path / "t.lance")), ["b", "c#0"], wait_s=0)
    kalm(*sync)
    left = set(rows(tmp_path / "t.lance"))
    assert left == {i for i in kept if i[0] in "acd"} - {"c#0"}


def test_what_cannot_be_split_is_refused(model_dir, tmp_path, split_table):
    write(tmp_path / "c.jsonl", split_table[1])
    for more, words in (
        (("--overlap", 8), "give both"),
        (("--split", 8), "between 32 and the 128"),
        (("--split", 64, "--overlap", 32), "a quarter"),
        (("--split", 64, "--on-duplicate", "last"), "would mix"),
    ):
        with pytest.raises(InputError, match=words):
            encode(model_dir, tmp_path, *more)


def test_a_document_has_the_score_of_its_passages(model_dir, split_table):
    """MaxP is the largest score of its passages; the mean is that of the best two."""
    table, documents = split_table
    reranker = Reranker.open(table, model=model_dir)
    passages = reranker.rerank(QUERY, list(rows(table)))
    scores = {name: [r for r in passages if r.id.startswith(f"{name}#")] for name in documents}
    every = {"group_by": "doc_id", "max_passages": 1000}
    ranked = reranker.rerank(QUERY, list(documents), **every)
    spans = {i: (row["span_begin"], row["span_end"]) for i, row in rows(table).items()}
    assert [r.id for r in ranked] == sorted(documents, key=lambda d: -scores[d][0].score)
    for result in ranked:
        best = scores[result.id][0]
        assert (result.passage_id, result.span) == (best.id, spans[best.id])
        assert result.score == pytest.approx(max(r.score for r in scores[result.id]), abs=1e-6)
    for result in reranker.rerank(QUERY, list(documents), aggregate="mean_top_2", **every):
        expected = [r.score for r in scores[result.id][:2]]
        assert result.score == pytest.approx(sum(expected) / len(expected), abs=1e-6)

    # Passages stand for their document alone, and the document's own id for all of them.
    some = [scores["c"][-1].id, scores["c"][-2].id, "d"]
    named = {r.id: r for r in reranker.rerank(QUERY, some, group_by="doc_id")}
    assert named["c"].passage_id == scores["c"][-2].id and named["d"].id == "d"
    both = reranker.rerank(QUERY, [some[0], "c"], **every)
    assert [r.passage_id for r in both] == [scores["c"][0].id]
    last = reranker.rerank(QUERY, ["none", "a"], group_by="doc_id", on_missing="last")
    assert [(r.id, r.ratio, r.passage_id) for r in last][1] == ("none", None, None)
    with pytest.raises(MissingIdsError, match="none"):
        reranker.rerank(QUERY, ["none", "a"], group_by="doc_id")
    with pytest.raises(InputError, match="it has lang, doc_id"):
        reranker.rerank(QUERY, ["a"], group_by="title")


def test_a_long_document_costs_no_more_than_its_best_passages(model_dir, split_table, monkeypatch):
    table, _ = split_table
    reranker, scored = Reranker.open(table, model=model_dir), []
    score_pairs = QueryDecoder.score_pairs
    monkeypatch.setattr(
        QueryDecoder, "score_pairs", lambda self, p: scored.append(len(p)) or score_pairs(self, p)
    )
    [result] = reranker.rerank(QUERY, ["c"], group_by="doc_id", max_passages=3)
    count = sum(row["doc_id"] == "c" for row in rows(table).values())
    assert scored == [count, 3] and result.ratio == 2
    members = PassageTable.open(table).members(["c"], "doc_id")
    coarse = reranker.rerank(QUERY, [m.id for m in members], ratio=16)[:3]
    best = reranker.rerank(QUERY, [r.id for r in coarse])[0]
    assert (result.passage_id, result.score) == (best.id, pytest.approx(best.score, abs=1e-6))


def test_documents_are_ranked_at_the_command_line(model_dir, split_table):
    table, documents = split_table
    asked = ("rerank", table, "--query", QUERY, "--group-by", "doc_id")
    printed = json.loads(kalm(*asked, "--ids", "a,b,c,d", "--json"))["results"]
    assert {r["id"] for r in printed} == set(documents)
    assert all(r["passage_id"].startswith(f"{r['id']}#") for r in printed)
    assert printed[0]["passage_id"].split("#")[0] in kalm(*asked, "--search", 20)


def test_a_service_and_the_frameworks_rank_documents(split_table):
    """The answers are those of the library; a key sees no document that its predicate hides."""
    table, documents = split_table
    ranked = Reranker.open(table).rerank(QUERY, list(documents), group_by="doc_id")
    keys = {"all": None, "b": "doc_id = 'b'"}
    with TestClient(create_app(Settings(str(table), keys=keys, max_candidates=150))) as client:
        wait_until(lambda: client.get("/health").status_code == 200)

        def ask(key="all", **fields):
            body = {"query": QUERY, "document_ids": list(documents), "group_by": "doc_id"} | fields
            return client.post("/rerank", json=body, headers={"Authorization": f"Bearer {key}"})

        found = ask(return_documents=True, return_metadata=True).json()["results"]
        assert [(r["id"], r["passage_id"], tuple(r["span"])) for r in found] == [
            (r.id, r.passage_id, r.span) for r in ranked
        ]
        for result, expected in zip(found, ranked, strict=True):
            assert result["relevance_score"] == pytest.approx(expected.score, abs=1e-6)
            assert list(documents)[result["index"]] == result["id"]
            assert result["document"]["text"] == rows(table)[result["passage_id"]]["text"]
            assert result["metadata"]["doc_id"] == result["id"]
        hidden = ask("b", on_missing="drop").json()["results"]
        assert [r["id"] for r in hidden] == ["b"]
        unknown = ask("b", document_ids=["b", "z"])
        assert (
            ask("b", document_ids=["b", "c"]).text.replace("'c'", "'z'").replace('"c"', '"z"')
            == unknown.text
        )
        assert ask(aggregate="sum").status_code == 422
        assert ask(group_by="title").status_code == 422
        texts = ask(document_ids=None, documents=["a text"])
        assert texts.status_code == 422 and "ids, not texts" in texts.text

    items = [Document(page_content="", metadata={"id": i}) for i in documents]
    best = KaLMCompressor(reranker=table, group_by="doc_id").compress_documents(items, QUERY)
    assert [(d.metadata["id"], d.metadata["passage_id"]) for d in best] == [
        (r.id, r.passage_id) for r in ranked
    ]
    passages = pa.table({"id": [i for i in rows(table) if i[0] in "ab"]})
    kept = KaLMReranker(table, group_by="doc_id").rerank_vector(QUERY, passages)
    best_of = [r.passage_id for r in ranked if r.id in "ab"]
    assert sorted(kept["id"].to_pylist()) == sorted(best_of)
    with pytest.raises(InputError, match="it has lang, doc_id"):
        KaLMReranker(table, group_by="title")


def test_a_plan_counts_passages_and_says_what_truncation_would_lose(model_dir, split_table):
    table, documents = split_table
    how = ("--model", model_dir, "--max-length", 128, "--json", "--split", 64, "--overlap", 8)
    plan = json.loads(kalm("plan", table.with_name("c.jsonl"), *how))
    tokenizer = resolve(str(model_dir)).tokenizer()
    texts = [join_title(f"T{name}", text) for name, text in documents.items()]
    lengths = passage_ids(tokenizer, texts)[1]
    lost = sum(max(0, n - 128) for n in lengths)
    assert (plan["passages"]["value"], plan["documents"]["value"]) == (len(rows(table)), 4)
    assert plan["lost_by_truncation"]["value"] == lost > 1000
    assert plan["lost_share"] == pytest.approx(lost / sum(lengths))
    assert plan["lengths"]["max"] <= 64 and plan["truncated"]["value"] == 0
    assert f"{lost:,} tokens" in kalm("plan", table.with_name("c.jsonl"), *how[:4], *how[5:])


def test_an_evaluation_judges_documents(model_dir, split_table, tmp_path):
    """What is said once in a long document is found, and the ranking names documents."""
    table, documents = split_table
    queries = {f"q{i}": {"_id": f"q{i}", "text": t.split(". ")[0]} for i, t in documents.items()}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries.values()))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\t{i}\t1\n" for i in documents))
    printed = kalm(
        "evaluate", "--corpus", table.with_name("c.jsonl"), "--queries", tmp_path / "q.jsonl",
        "--qrels", tmp_path / "qrels.tsv", "--model", model_dir, "--ratios", 4, "--max-length", 128,
        "--split-tokens", 64, "--overlap", 8, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert "r4" in printed
    for run in (tmp_path / "out/runs").glob("*.trec"):
        ranked = [line.split()[:3:2] for line in run.read_text().splitlines()]
        assert {document for _, document in ranked} <= set(documents)
        assert len(ranked) == len({tuple(pair) for pair in ranked})
