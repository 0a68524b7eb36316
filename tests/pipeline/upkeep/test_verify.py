"""Stored bytes that change are found: by take where it reads them, by verify everywhere."""

import random
import shutil

import lance
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import CorruptRowError, InputError, KalmError
from pipeline.upkeep.verify import verify
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.random_model import make_checkpoint

FLIPS = 200


@pytest.fixture(scope="module")
def table(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    corpus = write_corpus(folder / "c.jsonl", make_texts(60, seed=5))
    encode_table(model_dir, corpus, folder / "t.lance", ratios=(4, 16), shard_size=60)
    return folder / "t.lance"


def test_a_sound_table_passes(table, model_dir):
    report = verify(str(table), sample=20, model=str(model_dir))
    assert (report.rows, report.num_problems, report.problems) == (60, 0, [])
    assert 0 <= report.largest_state_error < 1e-3
    assert report.largest_score_error < 1e-4


def test_no_single_flipped_bit_goes_unnoticed(table, tmp_path):
    """Every flip in a data file changes nothing, or is found by verify."""
    copy = tmp_path / "t.lance"
    shutil.copytree(table, copy)
    (file,) = (copy / "data").glob("*.lance")
    good = file.read_bytes()
    sound = lance.dataset(str(copy)).to_table().to_pydict()
    ids = sound["id"]
    rng = random.Random(1)
    counts = {"harmless": 0, "found": 0, "silent": 0, "take": 0}
    for _ in range(FLIPS):
        bad = bytearray(good)
        at = rng.randrange(len(bad))
        bad[at] ^= 1 << rng.randrange(8)
        # A new name for each: Lance caches the metadata of a file it knows.
        file.write_bytes(bad)
        counts[_outcome(copy, sound, ids)] += 1
    file.write_bytes(good)
    assert counts["silent"] == 0, counts
    assert counts["found"] > FLIPS // 2, counts


def _outcome(uri, sound, ids):
    changed = False
    try:
        dataset = lance.dataset(str(uri))
        changed = dataset.to_table().to_pydict() != sound
        PassageTable(str(uri), dataset).take(ids)
    except (OSError, ValueError, RuntimeError, KalmError):
        return "found"
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return "found"
    report = verify(str(uri))
    if report.num_problems:
        return "found"
    return "silent" if changed else "harmless"


def test_take_names_row_and_table(table, tmp_path):
    copy = tmp_path / "t.lance"
    shutil.copytree(table, copy)
    passages = PassageTable.open(str(copy))
    states = passages.take(["p0"])[0].states
    (file,) = (copy / "data").glob("*.lance")
    raw = file.read_bytes()
    at = raw.index(states[0].tobytes())
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(CorruptRowError, match=r"row 'p0' of .*t\.lance does not match"):
        PassageTable.open(str(copy)).take(["p1", "p0"])
    report = verify(str(copy))
    assert [(p.check, p.id) for p in report.problems if p.check == "rows"] == [("rows", "p0")]


def test_ids_are_compared_with_the_corpus(table, tmp_path):
    texts = make_texts(60, seed=5)
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    assert verify(str(table), inputs=[str(corpus)]).num_problems == 0
    write_corpus(corpus, ["another", *texts[1:50]])
    report = verify(str(table), inputs=[str(corpus)])
    assert [p.detail for p in report.problems] == [
        "1 passages have another text in the corpus",
        "10 rows belong to no passage of the corpus",
    ]
    write_corpus(corpus, [*texts, "one more"])
    (problem,) = verify(str(table), inputs=[str(corpus)]).problems
    assert problem.detail == "1 passages of the corpus are not in the table"


def test_a_lost_file_is_a_finding_not_a_crash(table, tmp_path):
    copy = tmp_path / "t.lance"
    shutil.copytree(table, copy)
    (file,) = (copy / "data").glob("*.lance")
    file.unlink()
    report = verify(str(copy))
    assert {"files", "complete"} <= {p.check for p in report.problems}


def test_another_model_is_a_finding(table, tmp_path_factory):
    other = make_checkpoint(tmp_path_factory.mktemp("other") / "m", make_texts(300, seed=9))
    report = verify(str(table), sample=3, model=str(other))
    assert "fingerprint" in {p.check for p in report.problems}


def test_a_table_without_text_cannot_be_sampled(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(3))
    encode_table(model_dir, corpus, tmp_path / "t.lance", keep_text=False)
    assert verify(str(tmp_path / "t.lance")).num_problems == 0
    with pytest.raises(InputError, match="stores no text"):
        verify(str(tmp_path / "t.lance"), sample=1)
