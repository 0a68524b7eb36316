"""`kalm plan` before, `kalm encode` after: what was planned is what was made.

The model is tiny and its weights are random: lengths and bytes do not depend on them.
"""

import csv
import gzip
import json

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from jobs import plan as plan_command
from jobs.options import check_folder
from kalm_encoder.errors import InputError, MismatchError
from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.estimate import sampling
from pipeline.estimate.check import compare, read_plan
from pipeline.estimate.sampling import sample_corpus
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.run.records import read_records, totals
from pipeline.upkeep.facts import table_facts
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus

RATIOS, SHARD_SIZE, MAX_LENGTH = "4,32", 100, 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """2,000 passages, most short, in two JSONL files, a .gz and a Parquet file; one bad row."""
    folder = tmp_path_factory.mktemp("planned")
    texts = make_texts(2000, seed=11)
    first = write_corpus(folder / "a.jsonl", texts[:400], prefix="a")
    with first.open("a") as lines:
        lines.write('{"_id": "bad", "text": null}\n')
    write_corpus(folder / "b.jsonl", texts[400:800], prefix="b")
    packed = write_corpus(folder / "c.jsonl", texts[800:1100], prefix="c")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    ids = [f"d{i}" for i in range(900)]
    rows = pa.table({"id": ids, "text": texts[1100:]})
    pq.write_table(rows, folder / "d.parquet", row_group_size=450)
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.parquet")]


@pytest.fixture(scope="module")
def made(corpus, model_dir, tmp_path_factory):
    """The table that was really encoded, and what `kalm status` says of it."""
    uri = str(tmp_path_factory.mktemp("made") / "t.lance")
    job = EncodeJob(
        inputs=tuple(corpus), uri=uri, model=str(model_dir), ratios=(4, 32), max_rejected=0.01,
        max_length=MAX_LENGTH, shard_size=SHARD_SIZE,
    )  # fmt: skip
    run(job, in_process)
    return uri, table_facts(Location(uri))


def planned(corpus, model_dir, file, **options):
    settings = {"ratios": RATIOS, "max_length": MAX_LENGTH}
    plan_command.plan(corpus, str(model_dir), out=file, **{**settings, **options})
    return read_plan(file)


@pytest.fixture
def few_blocks(monkeypatch):
    """With no time to spend, this many blocks are read."""
    monkeypatch.setattr(sampling, "MIN_BLOCKS", 36)


def test_a_small_corpus_is_read_whole_and_planned_exactly(
    corpus, model_dir, made, tmp_path, capsys
):
    uri, facts = made
    plan = planned(corpus, model_dir, tmp_path / "plan.json")
    assert "counts are exact" in capsys.readouterr().out
    lines = {x.name: x for x in compare(plan, facts, totals(read_records(Location(uri))))}
    for name in ("passages", "tokens", "truncated"):
        assert lines[name].planned == lines[name].actual, name
        assert lines[name].inside is None
    assert lines["truncated"].actual > 0, "nothing was cut: this shows nothing"
    assert plan["rejected"]["value"] == 1
    assert abs(lines["bytes"].difference) < 0.02


def test_a_sample_plans_what_is_really_encoded(
    corpus, model_dir, made, tmp_path, few_blocks, capsys
):
    _, facts = made
    plan = planned(corpus, model_dir, tmp_path / "plan.json", time_limit=0.0, seed=1)
    assert plan["sampled_passages"] < 1000, "that was no sample"
    assert not plan["exact"]
    for name in ("passages", "tokens", "bytes"):
        found = plan[name]
        close = abs(found["value"] / facts[name] - 1) < (0.02 if name == "bytes" else 0.01)
        assert close or found["low"] <= facts[name] <= found["high"], name
        assert found["high"] / found["low"] < 1.5, f"an interval of {name} that says nothing"
    assert "95 % intervals" in (shown := capsys.readouterr().out)
    assert "seed 1" in shown


def test_intervals_of_most_seeds_hold_what_is_there(corpus, encoder, made, few_blocks):
    _, facts = made
    inside = {"passages": 0, "tokens": 0}
    for seed in range(30):
        sample = sample_corpus(
            expand_inputs(corpus, None),
            encoder.tokenizer,
            fields=FieldOptions(),
            seconds=0.0,
            seed=seed,
        )
        kept = np.minimum(sample.lengths, MAX_LENGTH)
        for name, values in {"tokens": kept, "passages": np.ones_like(kept)}.items():
            found = sample.total(sample.per_block(values))
            inside[name] += found.low <= facts[name] <= found.high
    assert min(inside.values()) >= 26, inside  # 28.5 expected


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("no_text", [False, True])
def test_bytes_are_right_for_every_dtype(corpus, model_dir, tmp_path, dtype, no_text):
    some, table = corpus[1:2], tmp_path / "t.lance"
    job = EncodeJob(
        inputs=tuple(some), uri=str(table), model=str(model_dir), ratios=(8,), store_dtype=dtype,
        keep_text=not no_text,
    )  # fmt: skip
    run(job, in_process)
    plan = planned(
        some, model_dir, tmp_path / "plan.json", ratios="8", store_dtype=dtype, no_text=no_text,
        max_length=1024,
    )  # fmt: skip
    found = plan["bytes"]["value"]
    assert found == pytest.approx(table_facts(Location(str(table)))["bytes"], rel=0.02)
    alone = [x for x in plan["storage"] if (x["ratio"], x["store_dtype"]) == (8, dtype)]
    assert alone[0]["bytes"]["value"] == pytest.approx(found)


def test_billions_are_extrapolated_with_an_interval(corpus, model_dir, made, tmp_path):
    _, facts = made
    count = 2_000_000_000
    plan = planned(
        corpus, model_dir, tmp_path / "p.json", passages=count, tokens_per_s=50_000.0, gpus=8
    )
    assert plan["passages"]["value"] == count
    tokens = plan["tokens"]
    assert tokens["value"] == pytest.approx(facts["tokens"] / facts["passages"] * count, rel=1e-6)
    assert tokens["low"] < tokens["value"] < tokens["high"]
    hours = plan["work"][0]["hours"]["value"]
    assert hours == pytest.approx(tokens["value"] / (50_000 * 8) / 3600)
    by_model = {w["model"]: w["hours"]["value"] for w in plan["work"]}
    assert by_model["Nano"] < by_model["Small"] < by_model["Large"]


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_compressed_file_is_read_from_its_start_and_the_plan_says_so(
    model_dir, tmp_path, pack, capsys
):
    plain = write_corpus(tmp_path / "c.jsonl", make_texts(10_000, seed=6))
    packed = tmp_path / f"c.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    packed.write_bytes(pack(plain.read_bytes()))
    whole = planned([str(plain)], model_dir, tmp_path / "whole.json")
    assert whole["exact"]
    capsys.readouterr()
    part = planned([str(packed)], model_dir, tmp_path / "part.json", time_limit=0.0)
    assert "can only be read from their start" in capsys.readouterr().out
    assert 1000 < part["sampled_passages"] < 6000
    for name in ("passages", "tokens"):
        found = part[name]
        assert found["low"] <= whole[name]["value"] <= found["high"], name


def test_of_many_compressed_files_some_stand_for_all(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_IN_ORDER", 12)
    files = []
    for i in range(24):
        plain = write_corpus(tmp_path / f"{i}.jsonl", make_texts(100, seed=i), prefix=f"{i}-")
        files.append(f"{plain}.gz")
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    sample = sample_corpus(
        expand_inputs(files, None), encoder.tokenizer, fields=FieldOptions(), seconds=60.0, seed=0
    )
    assert len(sample.lengths) == 1200 and not sample.complete
    assert "24 compressed or quoted files" in sample.notes[0] and "12 were read" in sample.notes[0]
    found = sample.total(sample.per_block(np.ones_like(sample.lengths)))
    assert found.low <= 2400 <= found.high < 1.2 * found.low


def test_a_passage_longer_than_many_blocks_is_counted_once(model_dir, tmp_path):
    texts = [*make_texts(50, seed=7), "long " * 20_000, *make_texts(50, seed=8)]
    plan = planned([str(write_corpus(tmp_path / "c.jsonl", texts))], model_dir, tmp_path / "p.json")
    assert plan["exact"]
    assert plan["passages"]["value"] == 101
    assert plan["lengths"]["max"] > 20_000
    assert plan["truncated"]["value"] >= 1


def test_csv_and_lance_inputs_are_sampled_too(model_dir, tmp_path, few_blocks):
    texts = [f'{t}\n"quoted", over two lines' for t in make_texts(300, seed=4)]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((f"c{i}", t) for i, t in enumerate(texts))])
    rows = pa.table({"id": [f"l{i}" for i in range(500)], "text": make_texts(500, seed=5)})
    lance.write_dataset(rows, str(tmp_path / "l.lance"))
    inputs = [str(tmp_path / "c.csv"), str(tmp_path / "l.lance")]
    whole = planned(inputs, model_dir, tmp_path / "whole.json")
    assert whole["exact"]
    assert whole["passages"]["value"] == 800
    part = planned(inputs, model_dir, tmp_path / "part.json", time_limit=0.0)
    assert part["sampled_passages"] < 800
    tokens = part["tokens"]
    assert tokens["low"] <= whole["tokens"]["value"] <= tokens["high"]


@pytest.mark.parametrize(("ids", "repeated"), [(range(30), 0), ([i // 3 for i in range(30)], 20)])
def test_repeated_ids_of_a_sample_are_noted_with_their_field(encoder, tmp_path, ids, repeated):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"docid": i, "text": "x"}) + "\n" for i in ids))
    sample = sample_corpus(
        expand_inputs([str(file)], None),
        encoder.tokenizer,
        fields=FieldOptions(),
        seconds=1,
        seed=0,
    )
    assert len(sample.notes) == bool(repeated)
    assert all(
        f"{repeated} of the sampled passages repeat an id" in note and "field 'docid'" in note
        for note in sample.notes
    )


def test_measure_times_the_real_encoder(corpus, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_command, "MEASURE_S", 0.0)
    plan = planned(corpus[:1], model_dir, tmp_path / "p.json", measure=True, as_json=True)
    rate = plan["rate"]
    assert (rate["runs"], rate["device"]) == (3, "cpu")
    assert 0 < rate["low"] <= rate["tokens_per_s"] <= rate["high"]
    assert plan == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": 0}, "--passages 0 must be above 0"),
        ({"gpus": -1}, "--gpus -1 must be above 0"),
        ({"time_limit": -1.0}, "--time-limit -1.0 must not be negative"),
        ({"measure": True, "tokens_per_s": 1.0}, "not both"),
        ({"store_dtype": "int2"}, "'int2'"),
        ({"max_length": 2}, "max_length 2"),
        ({"text_field": "none"}, "no text field none"),
    ],
)
def test_bad_options_are_refused_by_name(corpus, model_dir, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        planned(corpus, model_dir, tmp_path / "p.json", **options)


def test_a_plan_with_other_settings_is_not_compared(corpus, model_dir, made, tmp_path):
    uri, facts = made
    other = planned(corpus[:1], model_dir, tmp_path / "p.json", ratios="8")
    with pytest.raises(MismatchError, match="ratios 8, the table with 4,32"):
        compare(other, facts, totals(read_records(Location(uri))))
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(InputError, match="is not a saved estimate"):
        read_plan(tmp_path / "no.json")


def test_a_file_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    check_folder(None)
    check_folder(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"there is no folder .*missing for plan\.json"):
        check_folder(tmp_path / "missing" / "plan.json")
