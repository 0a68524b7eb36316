"""Commands say how files are read, take options that choose another reading, and keep to them."""

import csv
import logging

import lance
import pandas as pd
import pytest

from tests.jobs.test_bad_input import kalm

ROWS = [
    ("a1", 'A "quoted" title', '"Hello, he said'),
    ("007", "", "tabs\u2028and\x85ends\rof lines"),
    ("c3", "T", 'foo" bar'),
]
TSV = "".join("\t".join(row) + "\n" for row in ROWS)
TEXTS = {id: f"{title} {text}".strip() for id, title, text in ROWS}
COLUMNS = ("--columns", "id,title,text")


@pytest.fixture
def run(monkeypatch, model_dir, tmp_path, caplog):
    """Run a command here; return its exit code, and what it printed and logged."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "pipeline")

    def command(name, *arguments):
        if name in ("encode", "plan"):
            arguments = (*arguments, "--model", model_dir)
        if name in ("encode", "sync"):
            arguments = (*arguments, "--to", "t.lance", "--workers", 0)
        caplog.clear()
        code, output = kalm(monkeypatch, name, *arguments)
        return code, output + caplog.text

    return command


def texts_of(uri):
    rows = lance.dataset(uri).to_table(columns=["id", "text"])
    return dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))


def test_columns_are_named_for_plan_encode_resume_verify_and_sync(run, tmp_path):
    (tmp_path / "c.tsv").write_text(TSV, newline="")
    code, output = run("plan", "c.tsv")
    assert code == 2
    assert "--columns id,title,text" in output
    code, output = run("plan", "c.tsv", *COLUMNS)
    assert code == 0
    first = output.splitlines()[0]
    assert first.startswith("reading")
    assert "the first line is a row; the columns are id, title, text" in first
    code, output = run("encode", "c.tsv", *COLUMNS)
    assert code == 0, output
    assert "the columns are id, title, text" in output
    assert "quotes are ordinary characters (--quoting if cells are quoted)" in output
    assert texts_of("t.lance") == TEXTS
    code, output = run("encode", "c.tsv", *COLUMNS)
    assert code == 0
    assert "already complete" in output
    assert "the columns are id, title, text" in output  # a kept plan says it too
    code, output = run("encode", "c.tsv", "--columns", "id,text,title")
    assert code == 2, output  # the same rows, but other texts
    for command in (("verify", "t.lance", "--input", "c.tsv"), ("sync", "c.tsv")):
        assert run(*command)[0] == 2
        code, output = run(*command, *COLUMNS)
        assert code == 0, output
    assert "3 unchanged, 0 changed, 0 new" in output


def test_a_file_whose_quotes_are_doubtful_is_refused_before_the_device_is_used(run, tmp_path):
    (tmp_path / "q.tsv").write_text("id\ttitle\ttext\n" + TSV, newline="")
    code, output = run("encode", "q.tsv")
    assert code == 2
    assert "q.tsv line 2" in output
    assert not (tmp_path / "t.lance").exists()
    code, output = run("encode", "q.tsv", "--no-quoting")
    assert code == 0, output
    assert texts_of("t.lance") == TEXTS


def test_what_pandas_wrote_is_in_the_table_as_it_was_written(run, tmp_path):
    table = pd.DataFrame(ROWS, columns=["id", "title", "text"])
    table.to_csv(tmp_path / "c.csv", index=False, quoting=csv.QUOTE_ALL, encoding="utf-8-sig")
    code, output = run("encode", "c.csv")
    assert code == 0, output
    assert "the first line is the header; id from id" in output
    assert texts_of("t.lance") == TEXTS


@pytest.mark.parametrize("columns", ["id,,text", "id,text,id", ""])
def test_columns_must_be_different_names(run, columns):
    code, output = run("encode", "c.tsv", "--columns", columns)
    assert code == 2
    assert "must be different names with commas" in output
