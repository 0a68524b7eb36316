"""Shared fixtures: a small checkpoint of the exact architecture, a corpus, a table."""

import json
import random
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from kalm_encoder import PassageEncoder, QueryDecoder
from pipeline.run.driver import Summary, run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import encode_inline
from tests.support.random_model import make_checkpoint

transformers_logging.disable_progress_bar()

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
    return PassageEncoder.load(str(model_dir))


@pytest.fixture(scope="session")
def decoder(model_dir) -> QueryDecoder:
    return QueryDecoder.load(str(model_dir))


def write_corpus(path: Path, texts: list[str], *, prefix: str = "p") -> Path:
    lines = [json.dumps({"_id": f"{prefix}{i}", "text": t}) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encode_table(model_dir: Path, corpus: Path, uri: Path, **options) -> Summary:
    """Encode a corpus in this process."""
    job = EncodeJob(inputs=(str(corpus),), uri=str(uri), model=str(model_dir), **options)
    return run(job, encode_inline)


@pytest.fixture(scope="session")
def small_table(model_dir, tmp_path_factory) -> Path:
    """60 passages at ratios 2 and 8, float32, in 6 shards."""
    folder = tmp_path_factory.mktemp("small")
    corpus = write_corpus(folder / "corpus.jsonl", make_texts(60))
    table = folder / "small.lance"
    encode_table(model_dir, corpus, table, ratios=(2, 8), store_dtype="float32", shard_size=10)
    return table
