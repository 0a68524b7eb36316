"""What a query process loads, looked at in a fresh interpreter."""

import inspect
import re
import subprocess
import sys

import pytest

import kalm_encoder
import pipeline.workers
from jobs.cli import main

FRAMEWORKS = {"langchain_core", "llama_index", "mteb", "sentence_transformers"}
FORBIDDEN = {"ray", "typer", "pipeline", "jobs", "fastapi", *FRAMEWORKS}
STEPS = {
    "package": "import kalm_encoder",
    "table": "kalm_encoder.PassageTable.open(uri).take(['p1'])",
    "reranker": (
        "sys.meta_path.pop(0)\n"  # torch looks for all modules there
        "sys.modules['pandas'] = None\n"
        "r = kalm_encoder.Reranker.open(uri)\n"
        "r.rerank('query', [i for i, _ in r.table.search('token', 5)])"
    ),
    "rest": (
        "del sys.modules['pandas']\n"
        "import kalm_encoder.adapters.cross_encoder, kalm_encoder.service.app, jobs.cli\n"
        "import jobs.evaluation.mteb_search, pipeline.run.driver, pipeline.workers.shard_encoder"
    ),
}
"""What one interpreter does, a step after the other: each start of torch takes seconds."""

# pyarrow imports pandas where it finds it; up to reranking, nothing may need it.
WITHOUT_PANDAS = """
import sys


class Finder:
    def find_spec(self, name, *_):
        if name == "pandas":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def loaded(small_table):
    """The modules that are loaded after each step."""
    lines = [WITHOUT_PANDAS, f"uri = {str(small_table)!r}"]
    for step in STEPS.values():
        lines += [step, "print(*sys.modules)"]
    printed = subprocess.check_output([sys.executable, "-c", "\n".join(lines)], text=True)
    return {name: set(line.split()) for name, line in zip(STEPS, printed.splitlines(), strict=True)}


def test_importing_the_package_loads_nothing_heavy(loaded):
    assert not {"torch", "lance", "transformers", *FORBIDDEN} & loaded["package"]


def test_reading_a_table_needs_no_torch(loaded):
    assert not {"torch", "transformers", *FORBIDDEN} & loaded["table"]


def test_reranking_loads_no_ray_no_command_line_and_no_encoder(loaded):
    assert not FORBIDDEN & loaded["reranker"]
    assert "kalm_encoder.model.encoder" not in loaded["reranker"]


def test_the_cross_encoder_and_the_mteb_model_load_no_framework(loaded):
    assert not FRAMEWORKS & loaded["rest"]


def test_only_the_ray_adapter_imports_ray(loaded):
    assert {"jobs.cli", "pipeline.workers.shard_encoder"} <= loaded["rest"]
    assert "ray" not in loaded["rest"]


def test_every_public_name_is_found_and_known_to_type_checkers():
    for name in kalm_encoder.MODULES:
        assert getattr(kalm_encoder, name).__name__ == name
    listed = re.findall(r"import \w+ as (\w+)", inspect.getsource(kalm_encoder))
    assert {*listed} == {*kalm_encoder.MODULES, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        kalm_encoder.Nothing  # noqa: B018 - the access is what is tested


def test_encoding_without_the_batch_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "kalm encode c.jsonl --to t.lance --model m".split())
    monkeypatch.setitem(sys.modules, "ray", None)
    for module in [name for name in sys.modules if name.startswith("pipeline.workers.on_ray")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(pipeline.workers, "on_ray", raising=False)  # the failed import makes one
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install 'kalm-preencode[batch]'" in capsys.readouterr().err
