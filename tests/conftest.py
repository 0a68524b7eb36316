"""What all tests share: the hypothesis profiles, a small checkpoint, a corpus and a table."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

from kalm_encoder import PassageEncoder, QueryDecoder
from pipeline.run.driver import Summary, run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import in_process
from tests.support import programs
from tests.support.random_model import make_checkpoint

transformers_logging.disable_progress_bar()

# No property may fail because the machine is slow, hence neither a deadline nor `too_slow`.
COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# `make test` tries the same examples every time: a failure comes from the change that is tested.
settings.register_profile("quick", COMMON, max_examples=25, derandomize=True)
# `make test-all` looks for new examples, but not in CI, where a find would block another change.
settings.register_profile("thorough", COMMON, max_examples=100, derandomize="CI" in os.environ)
settings.load_profile("quick")

SCRIPTS = (
    "Die Würde des Menschen ist unantastbar und älter als jede Datenbank.",
    "检索增强生成把段落编码一次，然后在查询时重复使用。",
    "検索システムは文書を一度だけ符号化し、何度も読み出す。",
    "Система хранит состояния абзацев на диске и читает их по запросу.",
    "يخزن النظام حالات الفقرات على القرص ويقرؤها عند الاستعلام.",
    "ระบบจัดเก็บสถานะของข้อความไว้บนดิสก์",
    "नमस्ते दुनिया, यह एक छोटा सा अनुच्छेद है।",
    "emoji 🚀🔍 and tabs\tand\nline breaks, 'quotes' and \"more\"",
)
WORDS = (
    "index query passage encoder decoder token state ratio pooling shard commit table version "
    "retrieval ranking score relevance yes no library catalogue science method result data "
    "storage memory latency batch padding window attention layer vector mean group"
).split()


def make_texts(count: int, *, seed: int = 0, longest: int = 120) -> list[str]:
    """Random passages of very different lengths."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=max(1, int(longest * rng.random() ** 3))))
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_checkpoint(folder, [*make_texts(300), *SCRIPTS * 3])


@pytest.fixture(scope="session")
def encoder(model_dir) -> PassageEncoder:
    return PassageEncoder(str(model_dir))


@pytest.fixture(scope="session")
def decoder(model_dir) -> QueryDecoder:
    return QueryDecoder(str(model_dir))


def write_corpus(path: Path, texts: list[str], *, prefix: str = "p") -> Path:
    lines = [json.dumps({"_id": f"{prefix}{i}", "text": t}) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encode_table(model_dir: Path, corpus: Path, uri: Path, **options) -> Summary:
    """Encode a corpus in this process."""
    job = EncodeJob(inputs=(str(corpus),), uri=str(uri), model=str(model_dir), **options)
    return run(job, in_process)


@pytest.fixture(scope="session")
def small_table(model_dir, tmp_path_factory) -> Path:
    """60 passages at ratios 2 and 8, float32, in 6 shards."""
    folder = tmp_path_factory.mktemp("small")
    corpus = write_corpus(folder / "corpus.jsonl", make_texts(60))
    table = folder / "small.lance"
    encode_table(model_dir, corpus, table, ratios=(2, 8), store_dtype="float32", shard_size=10)
    return table


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Say last which programs were missing, and how to get them."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    for line in programs.advice(str(report.longrepr) for report in skipped):
        terminalreporter.write_line(line, yellow=True)
