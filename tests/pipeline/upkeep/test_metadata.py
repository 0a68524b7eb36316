"""Metadata columns follow their corpus, whatever is done to the table."""

import json
import random
from dataclasses import replace

import lance
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kalm_encoder import PassageEncoder, PassageTable
from kalm_encoder.errors import CorruptRowError, IncompleteError, InputError, MismatchError
from kalm_encoder.table.location import Location
from pipeline.corpus.passages import FieldOptions
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.delete import compact, delete
from pipeline.upkeep.erase import erase
from pipeline.upkeep.facts import table_facts
from pipeline.upkeep.sync import retry_rejects, sync
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import WORDS

COLUMNS = (("title", "string"), ("lang", "string"), ("year", "int64"), ("tags", "list<string>"))
NAMES = [name for name, _ in COLUMNS]
LANGS, YEARS, TAGS = (
    ("en", "de", "it's", "", None),
    (1999, 2020, None),
    (["a"], ["a", "b"], [], None),
)


def make_row(rng):
    return {
        "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))),
        "title": rng.choice(["T", "U", None]),
        "lang": rng.choice(LANGS),
        "year": rng.choice(YEARS),
        "tags": rng.choice(TAGS),
    }


def write(job, corpus):
    with open(job.inputs[0], "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": id} | row) + "\n" for id, row in corpus.items())


def new_job(model_dir, folder, **options):
    job = EncodeJob(
        inputs=(str(folder / "c.jsonl"),), uri=str(folder / "t.lance"), model=str(model_dir),
        fields=FieldOptions(keep=COLUMNS), shard_size=8, **options,
    )  # fmt: skip
    rng = random.Random(0)
    corpus = {f"p{i}": make_row(rng) for i in range(20)}
    write(job, corpus)
    return job, corpus


def stored(uri, version="live"):
    """The title-joined text and the metadata of each row, by id."""
    rows = lance.dataset(uri, version=version).to_table(columns=["id", "text", *NAMES]).to_pylist()
    found = {row.pop("id"): row for row in rows}
    assert len(found) == len(rows)
    return found


def expected(corpus):
    joined = {
        i: f"{row['title']} {row['text']}" if row["title"] else row["text"]
        for i, row in corpus.items()
    }
    return {i: {**row, "text": joined[i]} for i, row in corpus.items()}


@pytest.fixture
def count_encoded(monkeypatch):
    """The number of passages that reach the encoder, each time."""
    counts, real = [], PassageEncoder.start

    def counting(self, tokens, **options):
        counts.append(len(tokens))
        return real(self, tokens, **options)

    monkeypatch.setattr(PassageEncoder, "start", counting)
    return counts


def test_metadata_that_change_alone_encode_nothing(model_dir, tmp_path, count_encoded):
    job, corpus = new_job(model_dir, tmp_path, index_columns=("lang", "tags"))
    run(job, in_process)
    assert stored(job.uri) == expected(corpus)
    states = PassageTable.open(job.uri).take(["p1", "p2"])
    count_encoded.clear()
    corpus["p1"] |= {"lang": "fr", "tags": ["neu"]}
    corpus["p2"] |= {"year": None}
    corpus["p3"] |= {"text": "another text"}
    corpus["q"] = {"title": "T", "text": "new", "lang": "fr", "year": 7, "tags": None}
    write(job, corpus)
    changes, summary = sync(job, in_process, dry_run=True)
    assert (changes.unchanged, changes.changed, changes.new, changes.metadata_changed) == (
        17,
        1,
        1,
        2,
    )
    assert [p.check for p in verify(job.uri, inputs=job.inputs).problems] == ["corpus"] * 3
    sync(job, in_process)
    assert sum(count_encoded) == 2, "the new passage and the changed one"
    table = PassageTable.open(job.uri)
    assert stored(job.uri) == expected(corpus)
    for old, new in zip(states, table.take(["p1", "p2"]), strict=True):
        assert (old.states == new.states).all()
    assert verify(job.uri, inputs=job.inputs).num_problems == 0
    for where in ("lang = 'fr'", "array_contains(tags, 'neu')"):
        scan = table.dataset.scanner(filter=where, columns=["id"])
        assert "ScalarIndexQuery" in scan.explain_plan(), where
    assert table.known(corpus, where="lang = 'fr'") == {"p1", "q"}
    assert table.known(corpus, where="array_contains(tags, 'neu')") == {"p1"}
    count_encoded.clear()
    corpus["p4"] |= {"lang": "fr"}
    write(job, corpus)
    changes, summary = sync(job, in_process)
    assert (changes.metadata_changed, summary, count_encoded) == (1, None, [])
    assert stored(job.uri) == expected(corpus)
    version = PassageTable.open(job.uri).version
    changes, _ = sync(job, in_process)
    assert (changes.metadata_changed, PassageTable.open(job.uri).version) == (0, version)


@pytest.mark.parametrize("step", ["merge", "_index", "change"])
def test_an_interrupted_sync_of_metadata_is_finished(model_dir, tmp_path, monkeypatch, step):
    job, corpus = new_job(model_dir, tmp_path, index_columns=("lang",))
    run(job, in_process)
    before = expected(corpus)
    corpus["p1"] |= {"lang": "fr"}
    write(job, corpus)

    class KillError(BaseException):
        pass

    def kill(*args, **kwargs):
        raise KillError

    with monkeypatch.context() as broken:
        broken.setattr(SealedTable, step, kill)
        with pytest.raises(KillError):
            sync(job, in_process)
    assert stored(job.uri) == before
    sync(job, in_process)
    assert stored(job.uri) == expected(corpus)
    assert PassageTable.open(job.uri).known(corpus, where="lang = 'fr'") == {"p1"}
    assert verify(job.uri, inputs=job.inputs).num_problems == 0


def test_an_index_may_come_later_and_only_of_what_is_kept(model_dir, tmp_path, count_encoded):
    job, _ = new_job(model_dir, tmp_path)
    run(job, in_process)
    count_encoded.clear()
    with pytest.raises(InputError, match="complete without an index of year: `kalm sync`"):
        run(replace(job, index_columns=("year",)), in_process)
    for start in (run, sync):
        with pytest.raises(
            InputError, match="no metadata column 'id' to index; the table keeps title"
        ):
            start(replace(job, index_columns=("id",)), in_process)
    sync(replace(job, index_columns=("year",)), in_process)
    plan = PassageTable.open(job.uri).dataset.scanner(filter="year = 2020").explain_plan()
    assert ("ScalarIndexQuery" in plan, count_encoded) == (True, [])
    assert table_facts(Location(job.uri))["metadata_columns"] == (
        "title:string,lang:string,year:int64,tags:list<string>"
    )
    with pytest.raises(MismatchError, match="begun with metadata_columns"):
        run(replace(job, fields=FieldOptions(keep=COLUMNS[:2])), in_process)
    with pytest.raises(MismatchError, match=r"keeps title:string.*, this job title:string: give"):
        sync(replace(job, fields=FieldOptions(keep=COLUMNS[:1])), in_process)


def test_a_rejected_value_is_retried_after_it_was_mended(model_dir, tmp_path, count_encoded):
    job, corpus = new_job(model_dir, tmp_path, max_rejected=0.1)
    corpus["p5"]["year"] = "soon"
    write(job, corpus)
    assert run(job, in_process).num_rejected == 1
    (reject,) = RejectStore(Location(job.uri)).read()
    assert (reject.line, reject.reason) == (6, "field 'year' holds str 'soon', which is no int64")
    count_encoded.clear()
    corpus["p5"]["year"] = 2030
    write(job, corpus)
    retry_rejects(job, in_process)
    assert sum(count_encoded) == 1
    assert stored(job.uri) == expected(corpus)
    assert RejectStore(Location(job.uri)).read() == []


def test_a_changed_byte_of_metadata_is_found(model_dir, tmp_path):
    job, corpus = new_job(model_dir, tmp_path)
    corpus["p7"]["lang"] = "a rare language"
    write(job, corpus)
    run(job, in_process)
    for file in (tmp_path / "t.lance" / "data").glob("*.lance"):
        raw = file.read_bytes()
        file.write_bytes(raw.replace(b"a rare language", b"a rare lanGuage"))
    assert [(p.id, p.detail) for p in verify(job.uri).problems] == [
        ("p7", "metadata do not match their checksum")
    ]
    with pytest.raises(CorruptRowError, match="metadata of row 'p7'"):
        PassageTable.open(job.uri).metadata(["p7"])
    with pytest.raises(IncompleteError, match="metadata of row 'p7'"):
        truncate(job.uri, str(tmp_path / "u.lance"), ratios=(8,))


class Upkeep(RuleBasedStateMachine):
    """Whatever is done to a table, its metadata are those of the corpus, and filters see them."""

    model_dir = folder = None

    @initialize(data=st.data())
    def begin(self, data):
        seed = data.draw(st.integers(0, 2**32))
        folder = self.folder / f"{random.Random().getrandbits(64):x}"
        folder.mkdir()
        self.rng, self.count = random.Random(seed), 0
        self.job, self.corpus = new_job(self.model_dir, folder, index_columns=("lang",))
        run(self.job, in_process)

    @rule()
    def change_and_sync(self):
        for id in self.rng.sample(sorted(self.corpus), min(len(self.corpus), 4)):
            row = make_row(self.rng)
            if self.rng.random() < 0.5:
                row["text"], row["title"] = self.corpus[id]["text"], self.corpus[id]["title"]
            self.corpus[id] = row
        for id in self.rng.sample(sorted(self.corpus), 1):
            del self.corpus[id]
        self.count += 1
        self.corpus[f"new{self.count}"] = make_row(self.rng)
        write(self.job, self.corpus)
        sync(self.job, in_process, delete_missing=True)

    @rule()
    def remove(self):
        for id in self.rng.sample(sorted(self.corpus), 1):
            del self.corpus[id]
            delete(Location(self.job.uri), [id])

    @rule()
    def erase(self):
        for id in self.rng.sample(sorted(self.corpus), 1):
            del self.corpus[id]
            erase(Location(self.job.uri), [id], wait_s=0)

    @rule()
    def compact(self):
        compact(Location(self.job.uri))

    @rule()
    def truncate(self):
        ratio = 2 * PassageTable.open(self.job.uri).spec.ratios[0]
        self.count += 1
        smaller = self.job.uri.replace(".lance", f"{self.count}.lance")
        truncate(self.job.uri, smaller, ratios=(ratio,), shard_size=7)
        self.job = replace(self.job, uri=smaller, ratios=(ratio,))

    @rule()
    def begin_anew(self):
        write(self.job, self.corpus)
        run(replace(self.job, new_generation=True), in_process)
        publish(Location(self.job.uri))

    @invariant()
    def rows_are_those_of_the_corpus(self):
        if not hasattr(self, "job"):
            return
        assert stored(self.job.uri) == expected(self.corpus)
        table = PassageTable.open(self.job.uri)
        indexes = {name for i in table.dataset.describe_indices() for name in i.field_names}
        assert indexes == {"id", "text", "lang"}
        lang, year = self.rng.choice(LANGS), self.rng.choice([1999, 2020])
        quoted = "NULL" if lang is None else "'" + lang.replace("'", "''") + "'"
        where = f"lang = {quoted} OR year > {year}"
        assert table.known(self.corpus, where=where) == {
            id for id, row in self.corpus.items()
            if (lang is not None and row["lang"] == lang) or (row["year"] or 0) > year
        }  # fmt: skip

    def teardown(self):
        if hasattr(self, "job"):
            assert verify(self.job.uri).num_problems == 0


@pytest.mark.hypothesis
def test_metadata_follow_the_corpus_through_any_upkeep(model_dir, tmp_path):
    Upkeep.model_dir, Upkeep.folder = model_dir, tmp_path
    machine = settings(max_examples=3, stateful_step_count=6)
    Upkeep.TestCase.settings = machine
    Upkeep.TestCase().runTest()
