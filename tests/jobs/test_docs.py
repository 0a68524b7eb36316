"""What the README and the pages of docs/ show is run: Python, commands, links and options."""

import contextlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import lancedb
import pytest
import typer

from jobs.cli import app
from pipeline.corpus.passages import FieldOptions
from tests.conftest import encode_table
from tests.support.commands import kalm
from tests.support.serving import serving

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_ID = re.compile(r"KaLM-Embedding/\S+?(?=[\s\"'),]|$)")
NAMES = [page.name for page in PAGES]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(block):
    """Return the lines of a shell block, without comments, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [bare for line in lines if (bare := re.sub(r"\s{2,}#.*$", "", line).strip())]


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory):
    """A folder as the pages assume it: a corpus, a feed, tables, and ids to delete."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [
        {"_id": f"d{i}", "title": "t", "text": f"stored state {i}", "lang": "en", "year": 2000 + i}
        for i in range(1, 41)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gone.txt").write_text("d40\n")
    feed = [{"op": "delete", "_id": "d41"}, {"op": "upsert", **rows[0]}]
    (folder / "feed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in feed))
    encode_table(model_dir, folder / "corpus.jsonl", folder / "passages.lance")
    kept = FieldOptions(keep=(("lang", "string"), ("year", "int64")))
    encode_table(
        model_dir, folder / "corpus.jsonl", folder / "articles.lance", fields=kept,
        index_columns=("lang",),
    )  # fmt: skip
    encode_table(model_dir, folder / "corpus.jsonl", folder / "documents.lance", split=(512, 64))
    database = lancedb.connect(folder / "lancedb")
    documents = database.create_table(
        "documents", [{"id": row["_id"], "text": row["text"]} for row in rows]
    )
    documents.create_fts_index("text")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_a_page_runs(name, folder, model_dir, monkeypatch):
    page = PAGES[NAMES.index(name)]
    monkeypatch.chdir(folder)
    names = {"database": lancedb.connect(folder / "lancedb")}
    for block in blocks(page, "python"):
        exec(HUB_ID.sub(str(model_dir), block), names)


def test_the_python_of_the_readme_prints_the_best_two(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(blocks(PAGES[0], "python")[0], {})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_page_run(name, folder, model_dir):
    """Each in turn, in one folder; encoding without Ray, as no page is about Ray's own start."""
    page = PAGES[NAMES.index(name)]
    lines = [line for block in blocks(page, "sh") for line in commands(block)]
    with contextlib.ExitStack() as servers:
        for line in lines:
            line = HUB_ID.sub(str(model_dir), line).replace("kalm-demo", str(model_dir))
            program, *words = shlex.split(line)
            if program == "kalm" and words[0] in ("serve", "explore"):
                tables = [folder / word for word in words if word.endswith(".lance")]
                options = [word for word in words if word == "--match-text"]
                client = servers.enter_context(serving(*tables, *options, command=words[0]))
            elif program == "kalm":
                more = ["--workers", "0"] if words[0] in ("encode", "sync") else []
                kalm(*words, *more, cwd=folder, check=0)
            elif program == "curl":
                words = [word.replace(":8080", f":{client.base_url.port}") for word in words]
                done = subprocess.run(["curl", "-s", *words], capture_output=True, check=True)
                assert json.loads(done.stdout)["results"]
            else:
                assert program == "make", line


@pytest.mark.parametrize("name", NAMES)
def test_every_option_in_a_table_is_one_of_the_command(name):
    """An option that a page names in code is one that some command takes."""
    group = typer.main.get_command(app)
    known = {
        option
        for command in [group, *group.commands.values()]
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    foreign = {"--json", "--pid", "--duration", "--threads", "--native", "--no-deps"}
    text = PAGES[NAMES.index(name)].read_text(encoding="utf-8")
    if name in ("benchmarks.md", "decisions.md"):
        return  # they speak of other programs and of days gone by
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    named = set(re.findall(r"--[a-z][a-z-]+", code))
    assert named <= known | foreign


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    page = PAGES[NAMES.index(name)]
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_make_target_that_is_named_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in commands(block):
                if line.startswith("make "):
                    assert set(line.split()[1:]) <= targets, line


def test_the_readme_is_short_and_names_every_page():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.encode()) <= 9 * 1024
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text, page.name
