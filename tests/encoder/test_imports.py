"""What a query process loads, looked at in a fresh interpreter."""

import inspect
import re
import subprocess
import sys

import pytest

import kalm_encoder

FRAMEWORKS = {"langchain_core", "llama_index", "mteb", "sentence_transformers"}
FORBIDDEN = {"ray", "typer", "pipeline", "jobs", "fastapi", *FRAMEWORKS}


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True).split())


def test_reranking_loads_no_ray_no_command_line_and_no_encoder(small_table):
    loaded = modules_after(
        # pyarrow imports pandas where it finds it; nothing here may need it.
        "sys.modules['pandas'] = None\n"
        "from kalm_encoder import Reranker\n"
        f"r = Reranker.open({str(small_table)!r})\n"
        "r.rerank('query', [i for i, _ in r.table.search('token', 5)])"
    )
    assert not FORBIDDEN & loaded
    assert "kalm_encoder.model.encoder" not in loaded


def test_every_public_name_is_found_and_known_to_type_checkers():
    for name in kalm_encoder.MODULES:
        assert getattr(kalm_encoder, name).__name__ == name
    listed = re.findall(r"import \w+ as (\w+)", inspect.getsource(kalm_encoder))
    assert {*listed} == {*kalm_encoder.MODULES, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        kalm_encoder.Nothing  # noqa: B018 - the access is what is tested


def test_importing_the_package_loads_nothing_heavy():
    assert not {"torch", "lance", "transformers"} & modules_after("import kalm_encoder")


def test_reading_a_table_needs_no_torch(small_table):
    loaded = modules_after(
        "from kalm_encoder import PassageTable\n"
        f"PassageTable.open({str(small_table)!r}).take(['p1'])"
    )
    assert not {"torch", "transformers", *FORBIDDEN} & loaded


def test_the_cross_encoder_and_the_mteb_model_load_no_framework():
    loaded = modules_after(
        "import kalm_encoder.adapters.cross_encoder, jobs.evaluation.mteb_search"
    )
    assert not FRAMEWORKS & loaded


def test_encoding_without_the_batch_extra_says_what_to_install():
    script = (
        "import sys; sys.modules['ray'] = None; sys.argv = 'kalm encode c.jsonl --to t.lance"
        " --model m'.split(); from jobs.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'kalm-preencode[batch]'" in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.run.driver",
        "pipeline.workers.shard_encoder",
        "jobs.cli",
        "kalm_encoder.service.app",
    ],
)
def test_only_the_ray_adapter_imports_ray(module):
    assert "ray" not in modules_after(f"import {module}")
