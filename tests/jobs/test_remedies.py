"""Every remedy that a message names is tried here, and works."""

import json
import re
import shlex
import shutil

import pytest

from kalm_encoder import PassageTable
from kalm_encoder.table.location import Location
from pipeline.run import first_look
from pipeline.table.rejects import RejectStore
from tests.conftest import encode_table, make_texts, write_corpus
from tests.jobs.test_bad_input import kalm

ENCODE = "encode --model model --workers 0 --shard-size 4"
REMEDIES = [
    # A wrong command, what its message must say, and the commands that the message asks for.
    (f"{ENCODE} c.jsonl --to new", "must end in .lance", [f"{ENCODE} c.jsonl --to new.lance"]),
    (f"{ENCODE} none.jsonl --to new.lance", "no file matches none.jsonl", []),
    (f"{ENCODE} sub --to new.lance", "no file in sub", [f"{ENCODE} c.jsonl --to new.lance"]),
    (
        f"{ENCODE} other.jsonl --to t.lance --ratios 2",
        "was begun with other input.*give the same one, another table, or --new-generation to "
        "begin this one anew.*`kalm sync` brings a complete table up to date",
        [
            f"{ENCODE} c.jsonl --to t.lance --ratios 2",
            f"{ENCODE} other.jsonl --to another.lance",
            "sync other.jsonl --to t.lance --workers 0",
            f"{ENCODE} other.jsonl --to t.lance --ratios 2 --new-generation",
        ],
    ),
    (
        f"{ENCODE} c.jsonl --to t.lance --ratios 8",
        r"begun with ratios \(2,\), this job has \(8,\): give the same one, another table, or",
        [
            f"{ENCODE} c.jsonl --to t.lance --ratios 2",
            f"{ENCODE} c.jsonl --to another.lance --ratios 8",
            f"{ENCODE} c.jsonl --to t.lance --ratios 8 --new-generation",
            "publish t.lance",
        ],
    ),
    (f"{ENCODE} words.jsonl --to new.lance", "no text field .*it has id, words. Name it with "
     "--text-field", [f"{ENCODE} words.jsonl --to new.lance --text-field words"]),
    (f"{ENCODE} keys.jsonl --to new.lance", "no id field .*Name it with --id-field",
     [f"{ENCODE} keys.jsonl --to new.lance --id-field key"]),
    (f"{ENCODE} c.jsonl --to new.lance --revision main", "leave --revision out",
     [f"{ENCODE} c.jsonl --to new.lance"]),
    (f"{ENCODE} c.jsonl --to new.lance --max-length 2", "must be above .* and at most",
     [f"{ENCODE} c.jsonl --to new.lance --max-length 64"]),
    (f"{ENCODE} c.jsonl --to new.lance --ratios 4,a", "must be numbers with commas, such as 4,32",
     [f"{ENCODE} c.jsonl --to new.lance --ratios 4,32"]),
    (f"{ENCODE} c.jsonl --to new.lance --ratios 4,6", "ratio 6 is not a multiple of the finest",
     [f"{ENCODE} c.jsonl --to new.lance --ratios 2,6"]),
    (f"{ENCODE} c.jsonl --to new.lance --storage-option x", "must have the form key=value",
     [f"{ENCODE} c.jsonl --to new.lance --storage-option aws_region=x"]),
    (f"{ENCODE} c.jsonl --to new.lance --store-dtype int2", "not one of float16, float32, int8",
     [f"{ENCODE} c.jsonl --to new.lance --store-dtype int4"]),
    ("status none.lance", "no passage table at .*none.lance", []),
    ("rollback t.lance", "no earlier published version to go back to",
     ["delete t.lance --ids-file ids.txt", "rollback t.lance", "rollback t.lance"]),
    ("publish t.lance --version 99", "has no version 99", ["publish t.lance"]),
    ("truncate t.lance --to s.lance", "give another --ratios or --store-dtype",
     ["truncate t.lance --to s.lance --ratios 4",
      "truncate t.lance --to i.lance --store-dtype int8"]),
    ("truncate t.lance --to ./t.lance --ratios 4", "give --to another place",
     ["truncate t.lance --to s.lance --ratios 4"]),
    ("truncate t.lance --to s.lance --ratios 3", "ratio 3 is not a multiple of a stored ratio",
     ["truncate t.lance --to s.lance --ratios 4"]),
    ("sync twice.jsonl --to t.lance --workers 0", "field 'id': if another holds them, name it with "
     "--id-field; or mend the corpus, or choose one with --on-duplicate first or last",
     ["sync twice.jsonl --to t.lance --workers 0 --id-field key --dry-run",
      "sync twice.jsonl --to t.lance --workers 0 --on-duplicate first --dry-run"]),
    ("rerank t.lance --model model --query q", "one of --ids, --ids-file or --search",
     ["rerank t.lance --model model --query q --ids p1",
      "rerank t.lance --model model --query q --ids-file ids.txt",
      "rerank t.lance --model model --query index --search 3"]),
    ("rerank t.lance --model model --query q --ids p1 --cascade 4,8", "must go from coarse to fine",
     ["rerank t.lance --model model --query q --ids p1 --cascade 8,4"]),
    ("rerank t.lance --model model --query q --ids p1 --cascade x", "has the form 32:20,4",
     ["rerank t.lance --model model --query q --ids p1 --cascade 32:20,4"]),
    ("rerank t.lance --model model --query q --ids p1 --ratio 3", "not a multiple of a stored",
     ["rerank t.lance --model model --query q --ids p1 --ratio 4"]),
    ("rerank no.lance --model model --query q --search 3", "encode without --no-text, or give the "
     "ids of another first stage",
     ["rerank no.lance --model model --query q --ids p1",
      f"{ENCODE} c.jsonl --to with.lance",
      "rerank with.lance --model model --query index --search 3"]),
    ("verify no.lance --sample 2", "leave out --sample", ["verify no.lance"]),
    ("plan c.jsonl --model model --out sub2/p.json", "is no folder .*sub2 for p.json: make it",
     ["plan c.jsonl --model model --out sub/p.json --time-limit 0"]),
    ("plan c.jsonl --model model --ratios 8 --time-limit 0 --out p.json", "", [
        "plan c.jsonl --model model --ratios 2 --max-length 1024 --out p.json --time-limit 0",
        "status t.lance --plan p.json"]),
    ("plan c.jsonl --model model --measure --tokens-per-s 9", "--tokens-per-s or --measure, not",
     ["plan c.jsonl --model model --tokens-per-s 9 --time-limit 0"]),
    ("delete t.lance --ids-file none.txt", "cannot read", ["delete t.lance --ids-file ids.txt"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(model_dir, tmp_path_factory):
    """A folder with a model, corpora, and two tables."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "model").symlink_to(model_dir)
    (folder / "sub").mkdir()
    corpus = write_corpus(folder / "c.jsonl", make_texts(12))
    write_corpus(folder / "other.jsonl", make_texts(9, seed=1))
    (folder / "ids.txt").write_text("p1\np2\n")
    rows = [{"id": i, "key": f"k{n}", "words": "w", "text": "x"} for n, i in enumerate((1, 2, 2))]
    for name, keys in (
        ("twice", ("id", "key", "text")), ("keys", ("key", "text")), ("words", ("id", "words")),
    ):  # fmt: skip
        some = rows if name == "twice" else rows[:2]
        lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in some]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, options in (("t", {}), ("no", {"keep_text": False})):
        encode_table(
            model_dir, corpus, folder / f"{name}.lance", ratios=(2,), shard_size=4, **options
        )
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(file, change):
    file.write_text("".join(change(line) for line in file.read_text().splitlines(keepends=True)))


@pytest.mark.parametrize(("wrong", "says", "remedies"), REMEDIES)
def test_what_a_message_asks_for_works(place, monkeypatch, wrong, says, remedies):
    code, out = kalm(monkeypatch, *shlex.split(wrong))
    assert code == (2 if says else 0), out
    assert re.search(says, out), out
    assert out.count("\n") <= 2 or not says, out
    for remedy in remedies:
        code, out = kalm(monkeypatch, *shlex.split(remedy))
        assert code == 0, (remedy, out)


@pytest.fixture
def late(place, monkeypatch):
    """A corpus of which only the first shard is looked at, as if it were large."""
    monkeypatch.setattr(first_look, "MOST_ROWS", 1)
    return place / "c.jsonl"


BAD = ("p9", '{"_id": "p9", "text": null}\n')


def test_rejected_rows_are_mended_after_a_higher_max_rejected(late, monkeypatch):
    """To mend the file first makes another input of it, which is refused."""
    good = late.read_text()
    rewrite(late, lambda line: BAD[1] if BAD[0] in line else line)
    command = shlex.split(f"{ENCODE} c.jsonl --to new.lance")
    code, out = kalm(monkeypatch, *command)
    assert code == 1
    assert "1 rows were rejected, 0 of 12 may be" in out
    assert "run again with a higher --max-rejected, then mend the rejected rows" in out
    assert re.search(r"`kalm rejects \S+new.lance` lists them", out)
    assert "line 10" in kalm(monkeypatch, "rejects", "new.lance")[1]
    late.write_text(good)
    refused = kalm(monkeypatch, *command)
    assert (refused[0], "was begun with other input" in refused[1]) == (2, True)
    rewrite(late, lambda line: BAD[1] if BAD[0] in line else line)
    assert kalm(monkeypatch, *command, "--max-rejected", 0.1)[0] == 0
    late.write_text(good)
    code, out = kalm(monkeypatch, *command, "--max-rejected", 0.1, "--retry-rejects")
    assert code == 0, out
    assert len(PassageTable.open("new.lance")) == 12
    assert RejectStore(Location("new.lance")).read() == []


def test_a_mended_file_begins_anew_with_new_generation(late, monkeypatch):
    good = late.read_text()
    rewrite(late, lambda line: BAD[1] if BAD[0] in line else line)
    command = shlex.split(f"{ENCODE} c.jsonl --to new.lance")
    code, out = kalm(monkeypatch, *command)
    assert (code, "To begin anew with mended files, add --new-generation" in out) == (1, True), out
    late.write_text(good)
    assert kalm(monkeypatch, *command, "--new-generation")[0] == 0
    assert len(PassageTable.open("new.lance")) == 12
    assert RejectStore(Location("new.lance")).read() == []


@pytest.mark.parametrize("remedy", ["--on-duplicate first", "--id-field key --new-generation"])
def test_late_repeated_ids_are_dropped_or_another_field_is_named(late, monkeypatch, remedy):
    rows = [{"_id": f"p{i}", "key": f"k{i}", "text": "x"} for i in range(12)]
    rows[9]["_id"] = "p2"
    late.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = shlex.split(f"{ENCODE} c.jsonl --to new.lance")
    code, out = kalm(monkeypatch, *command)
    assert code == 2
    assert "rows repeat an id: 'p2'" in out
    assert "field '_id': if another holds them, name it with --id-field, and add --new-gen" in out
    assert kalm(monkeypatch, *command, *shlex.split(remedy))[0] == 0


def test_an_incomplete_table_is_completed_by_its_command(late, monkeypatch):
    rewrite(late, lambda line: BAD[1] if BAD[0] in line else line)
    command = shlex.split(f"{ENCODE} c.jsonl --to new.lance")
    assert kalm(monkeypatch, *command)[0] == 1
    for other in ("publish new.lance", "compact new.lance", "delete new.lance --ids-file ids.txt",
                  "verify new.lance", "rerank new.lance --query q --ids p1",
                  f"{ENCODE} c.jsonl --to new.lance --retry-rejects"):  # fmt: skip
        code, out = kalm(monkeypatch, *shlex.split(other))
        assert code == 2, (other, out)
        assert re.search("run .*again", out), (other, out)
    assert kalm(monkeypatch, *command, "--max-rejected", 0.5)[0] == 0
    assert kalm(monkeypatch, "verify", "new.lance")[0] == 0


def test_rows_that_are_not_mended_yet_are_named_as_such(late, monkeypatch):
    good = late.read_text()
    rewrite(late, lambda line: BAD[1] if BAD[0] in line else line)
    command = [*shlex.split(f"{ENCODE} c.jsonl --to new.lance"), "--max-rejected", 0.5]
    assert kalm(monkeypatch, *command)[0] == 0
    code, out = kalm(monkeypatch, *command, "--retry-rejects")
    assert (code, "mend the rows in their files first" in out) == (0, True), out
    late.write_text(good)
    assert kalm(monkeypatch, *command, "--retry-rejects")[0] == 0
    assert len(PassageTable.open("new.lance")) == 12


def test_a_tilde_names_the_home_folder_of_a_model_too(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    command = "encode c.jsonl --to new.lance --model ~/model --workers 0"
    assert kalm(monkeypatch, *shlex.split(command))[0] == 0
