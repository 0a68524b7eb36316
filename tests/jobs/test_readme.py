"""What the README says, done."""

import json
import re
from pathlib import Path

from tests.conftest import encode_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs(model_dir, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"_id": f"d{i}", "title": "t", "text": f"stored state {i}"} for i in range(1, 4)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_table(model_dir, corpus, tmp_path / "passages.lance")
    monkeypatch.chdir(tmp_path)
    snippet, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(snippet, {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_make_target_it_names_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"^make ([a-z ]+?)(?: +#.*)?$", README, re.M):
        assert set(line.split()) <= targets
