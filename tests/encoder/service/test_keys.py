"""A key that sees only some rows: the others are to it as if they were not there."""

import json
import random

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.service.access import read_keys
from kalm_encoder.service.app import create_app
from kalm_encoder.service.filters import check_filter
from kalm_encoder.service.live import LiveTable, open_live
from kalm_encoder.service.settings import Settings
from kalm_encoder.table.location import Location
from kalm_encoder.table.restricted import RestrictedTable
from pipeline.corpus.passages import FieldOptions
from pipeline.table.publish import publish
from tests.conftest import encode_table, make_texts
from tests.support.serving import wait_until

KEEP = FieldOptions(
    keep=(("tenant", "string"), ("year", "int64"), ("score", "float64"), ("tags", "list<string>"))
)
KEYS = {"key-a": "tenant = 'a'", "key-b": "tenant = 'b' AND year > 2000", "operator": None}


def make_rows():
    rng = random.Random(1)
    return [
        {
            "id": f"p{i:02}",
            "text": text,
            "tenant": rng.choice(["a", "b", None]),
            "year": rng.choice([1999, 2020, 2021, None]),
            "score": rng.choice([0.5, float("nan"), None]),
            "tags": rng.choice([["x"], ["x", "y"], [], None]),
        }
        for i, text in enumerate(make_texts(30, longest=8))
    ]


ROWS = {row["id"]: row for row in make_rows()}
SEEN = {
    "key-a": {i for i, row in ROWS.items() if row["tenant"] == "a"},
    "key-b": {i for i, row in ROWS.items() if row["tenant"] == "b" and (row["year"] or 0) > 2000},
    "operator": set(ROWS),
}


@pytest.fixture(scope="module")
def uri(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    file = folder / "c.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    encode_table(model_dir, file, folder / "t.lance", fields=KEEP, index_columns=("tenant",))
    return folder / "t.lance"


@pytest.fixture(scope="module", params=["indexed", "on disk"])
def client(uri, request):
    settings = Settings(
        str(uri), keys=KEYS, filter_columns=frozenset({"year", "tags"}), with_encoder=True,
        index_bytes=1 << 20 if request.param == "indexed" else 0, hot_bytes=1 << 24,
        match_text=request.param == "indexed",
    )  # fmt: skip
    with TestClient(create_app(settings)) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        yield client


def ask(client, key, path="/rerank", **body):
    reply = client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
    answer = reply.json()
    return reply.status_code, {n: v for n, v in answer.items() if n not in ("id", "created")}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_sees_the_rows_of_its_predicate_and_their_metadata(client, key):
    ids = list(ROWS)
    # All rows are asked for by the operator, so that what one key may not see is kept in memory.
    assert len(ask(client, "operator", query="q", document_ids=ids)[1]["results"]) == len(ROWS)
    options = {"on_missing": "drop", "return_metadata": True, "return_documents": True}
    status, answer = ask(client, key, query="q", document_ids=ids, **options)
    assert (status, {r["id"] for r in answer["results"]}) == (200, SEEN[key])
    for result in answer["results"]:
        row = ROWS[result["id"]]
        score = row["score"] if row["score"] == row["score"] else None  # JSON has no NaN
        assert result["document"]["text"] == row["text"]
        assert result["metadata"] == {
            "tenant": row["tenant"], "year": row["year"], "score": score, "tags": row["tags"],
        }  # fmt: skip
    where = "year = 2021 OR array_contains(tags, 'y')"
    _, answer = ask(client, key, query="q", document_ids=ids, filter=where)
    right = {i for i in SEEN[key] if ROWS[i]["year"] == 2021 or "y" in (ROWS[i]["tags"] or [])}
    assert {r["id"] for r in answer["results"]} == right
    headers = {"Authorization": f"Bearer {key}"}
    assert client.get("/info", headers=headers).json()["rows"] == len(SEEN[key])
    assert client.get("/metrics", headers=headers).status_code == (403 if KEYS[key] else 200)


@pytest.mark.parametrize("key", ["key-a", "key-b"])
@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank", "/score"])
def test_a_hidden_id_answers_as_one_that_is_not_there(client, key, path):
    seen, hidden, absent = min(SEEN[key]), min(set(ROWS) - SEEN[key]), "p99"
    for options in (
        {},
        {"on_missing": "drop"},
        {"on_missing": "last"},
        {"on_missing": "last", "return_documents": True, "return_metadata": True},
        {"filter": "year > 0 OR year IS NULL"},
        {"filter": "year > 'x'"},
        {"cascade": [[8, 1], [4, None]], "on_missing": "drop"},
    ):
        query = {"queries": "q"} if path == "/score" else {"query": "q"}
        for make in (
            lambda id: {"document_ids": [id]},
            lambda id: {"document_ids": [seen, id, id]},
            lambda id: {"documents": [{"id": id, "text": "a text"}, {"id": seen}]},
        ):
            # The first request brings what can be seen into memory, where its last bit may differ.
            bodies = ({**query, **make(i), **options} for i in (absent, hidden, absent))
            _, (status, one), (other_status, other) = (ask(client, key, path, **b) for b in bodies)
            assert status == other_status
            assert json.loads(json.dumps(one).replace(hidden, absent)) == other
            assert ROWS[hidden]["text"] not in json.dumps(one)


@pytest.mark.parametrize("key", KEYS)
def test_a_text_is_found_among_the_rows_that_the_key_sees(client, key):
    texts = sorted({row["text"] for row in ROWS.values()})
    seen = {ROWS[id]["text"] for id in SEEN[key]}
    if not client.app.state.live.settings.match_text:
        seen = set()
    _, answer = ask(client, key, query="q", documents=[*texts, "nowhere"], return_metadata=True)
    found = {r["index"]: r for r in answer["results"]}
    assert {text for n, text in enumerate(texts) if found[n]["stored"]} == seen
    assert [n for n, result in found.items() if "metadata" in result and not result["stored"]] == []
    assert key == "operator" or seen < set(texts), "some texts are hidden"


def test_nobody_is_answered_without_a_key_of_the_file(client):
    for headers in ({}, {"Authorization": "Bearer key-"}, {"Authorization": "Bearer tenant = 'a'"}):
        for path in ("/info", "/metrics"):
            assert client.get(path, headers=headers).status_code == 401


def test_no_row_is_looked_up_for_a_hidden_or_absent_id(uri):
    """So the time does not tell them apart either."""
    view = RestrictedTable(PassageTable.open(str(uri)), "tenant = 'a'")
    hidden = sorted(set(ROWS) - SEEN["key-a"])
    assert {member.id for member in view.members(["a", "b", *ROWS], "tenant")} == SEEN["key-a"]
    view._dataset = None
    assert view.members(["b", *hidden, "p99"], "tenant") == []
    assert view.known([*hidden, "p99"]) == view.known(hidden, where="year > 0") == set()
    assert view.find([*hidden, "p99"]) == {}
    for ids in (hidden, ["p99"]):
        with pytest.raises(MissingIdsError):
            view.take(ids)


HOLDS = {
    "year = 2020": lambda r: None if r["year"] is None else r["year"] == 2020,
    "year > 2020": lambda r: None if r["year"] is None else r["year"] > 2020,
    "year IS NULL": lambda r: r["year"] is None,
    "tenant = 'a'": lambda r: None if r["tenant"] is None else r["tenant"] == "a",
    "tenant IN ('a', 'c')": lambda r: None if r["tenant"] is None else r["tenant"] == "a",
    "array_contains(tags, 'y')": lambda r: None if r["tags"] is None else "y" in r["tags"],
    "score < 1": lambda r: None if r["score"] is None else r["score"] < 1,
    "id <> 'p03'": lambda r: r["id"] != "p03",
}
PREDICATES = st.recursive(
    st.sampled_from(sorted(HOLDS)),
    lambda inner: st.one_of(
        inner.map(lambda p: f"NOT ({p})"),
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda p: f"({' '.join(p)})"),
    ),
    max_leaves=4,
)


def truth(predicate, row):
    """Evaluate a predicate with the three values of SQL."""
    values = {f"v{n}": holds(row) for n, holds in enumerate(HOLDS.values())}
    for n, text in enumerate(HOLDS):
        predicate = predicate.replace(text, f"Is(v{n})")
    for word, sign in (("NOT", "~"), ("AND", "&"), ("OR", "|")):
        predicate = predicate.replace(word, sign)
    return eval(predicate, {"Is": Three, **values}).value


class Three:
    """True, False or None."""

    def __init__(self, value):
        self.value = value

    def __invert__(self):
        return Three(None if self.value is None else not self.value)

    def __and__(self, other):
        both = {self.value, other.value}
        return Three(False if False in both else None if None in both else True)

    def __or__(self, other):
        both = {self.value, other.value}
        return Three(True if True in both else None if None in both else False)


@pytest.mark.hypothesis
@given(predicate=PREDICATES, other=PREDICATES)
def test_filters_and_keys_equal_brute_force(uri, predicate, other):
    table = PassageTable.open(str(uri))
    columns = [*table.dataset.schema.names]
    where = check_filter(predicate, columns)
    right = {id for id, row in ROWS.items() if truth(predicate, row)}
    assert table.known(ROWS, where=where) == right
    view = RestrictedTable(table, where)
    assert (len(view), view.known(ROWS), set(view.find(list(ROWS)))) == (len(right), right, right)
    both = {id for id in right if truth(other, ROWS[id])}
    assert view.known(ROWS, where=check_filter(other, columns)) == both
    word = next(iter(ROWS.values()))["text"].split()[0]
    having = {id for id in both if word in ROWS[id]["text"].split()}
    found = view.search(word, 100, where=check_filter(other, columns))
    assert {id for id, _ in found} == having


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON object that maps each key"),
        ("[]", "must be a JSON object"),
        ("{}", "must be a JSON object"),
        ('{"a": "x = 1", "a": null}', "has a key twice"),
        ('{"secret": ""}', 'predicate of key 1 of .* is "": give one'),
        ('{"secret": 5}', "predicate of key 1 of .* is 5: give one"),
        ('{"ok": null, " secret": null}', "key 2 of .* is empty, or holds a space"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused_without_showing_a_key(tmp_path, content, message):
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read_keys(file)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "predicate", ["owner = 'a'", "lower(tenant) = 'a'", "tenant", "year = 'x'"]
)
def test_a_predicate_that_the_table_cannot_apply_is_refused_at_the_start(uri, predicate):
    with pytest.raises(InputError, match=r"the predicate .* of a key is refused"):
        open_live(Settings(str(uri), keys={"k": predicate}))


def test_a_version_without_the_column_of_a_key_does_not_take_over(model_dir, tmp_path):
    file, uri = tmp_path / "c.jsonl", tmp_path / "t.lance"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    encode_table(model_dir, file, uri, fields=KEEP)
    live = LiveTable(Settings(str(uri), keys=KEYS, refresh_s=0.05))
    live.load()
    version = live.current.table.version
    encode_table(model_dir, file, uri, new_generation=True)
    publish(Location(str(uri)))
    wait_until(lambda: live.failed_swaps)
    assert live.current.table.version == version
    assert set(live.current.under("tenant = 'a'").table.known(ROWS)) == SEEN["key-a"]
    live.close()
