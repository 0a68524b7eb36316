"""A made-up evaluation: random numbers and invented texts, the same every time. It serves to test
that reports hold what they are given; it says nothing about any model."""

import numpy as np

from jobs.evaluation.results import Candidate, Evaluation, Example, ScoreSample, SettingResult
from jobs.evaluation.statistics import bootstrap_interval, compare, score_sample

SPREAD = 0.16
"""Standard deviation of the difference of one query between two settings."""

SETTINGS = {  # name: (kind, ratio, dtype, true effect on nDCG@10, bytes a token, median ms)
    "bm25": ("first stage", None, None, 0.0, 0.0, 0.0),
    "r1": ("reranked", 1, "float16", 0.022, 1280.0, 205.0),
    "r4": ("reranked", 4, "float16", 0.018, 320.0, 97.0),
    "r8": ("reranked", 8, "float16", 0.006, 160.0, 82.0),
    "r16": ("reranked", 16, "float16", -0.03, 80.0, 74.0),
    "r32": ("reranked", 32, "float16", -0.07, 40.0, 70.0),
    "r64": ("reranked", 64, "float16", -0.12, 20.0, 68.0),
    "r4-int8": ("reranked", 4, "int8", 0.016, 161.0, 99.0),
    "r16-int8": ("reranked", 16, "int8", -0.033, 40.3, 75.0),
    "r64-int8": ("reranked", 64, "int8", -0.12, 10.1, 68.0),
    "r32:20,4": ("cascade", 4, "float16", 0.008, 168.0, 110.0),
    "r4+bm25": ("fused", 4, "float16", 0.07, 320.0, 98.0),
    "r32+bm25": ("fused", 32, "float16", 0.05, 40.0, 71.0),
}


def synthetic_evaluation(
    *,
    names: tuple[str, ...] = tuple(SETTINGS),
    num_queries: int = 120,
    effects: dict[str, float] | None = None,
    num_examples: int = 3,
    **fields: object,
) -> Evaluation:
    """Return an evaluation whose differences scatter around the effects asked for."""
    rng = np.random.default_rng(7)
    ids = [f"q{i:04}" for i in range(1, num_queries + 1)]
    base = rng.beta(0.9, 1.0, num_queries)
    found: dict[str, SettingResult] = {}
    for name in names:
        *_, effect, _, _ = SETTINGS[name]
        shift = (effects or {}).get(name, effect)
        changes = rng.normal(shift / 0.7, SPREAD, num_queries) * (rng.random(num_queries) < 0.7)
        values = base if name == names[0] else np.clip(base + changes, 0, 1)
        found[name] = _setting(name, ids, values, found.get(names[0]), rng)
    defaults: dict[str, object] = {
        "collection": "docs-synthetic",
        "split": "test",
        "model": "made-up-model",
        "fingerprint": "5a1f0c3e9b7d4426",
        "note": "Made-up figures for tests: they say nothing about any model.",
        "first_stage": "BM25 (Lance full-text search), top 50",
        "instruction": "Given a query, retrieve documents that answer the query.",
        "num_passages": 54_321,
        "num_tokens": 8_148_150,
        "queries": {i: QUERIES[n % len(QUERIES)] for n, i in enumerate(ids)},
        "settings": list(found.values()),
        "scores": [_sample(s, rng) for s in found.values() if s.kind == "reranked"],
        "helped": _examples(helped=True)[:num_examples],
        "hurt": _examples(helped=False)[:num_examples],
        "warnings": [
            "38 % of the candidates in the first 10 places have no judgement and count as not "
            "relevant.",
            "3 candidates had no stored states and were left at the end.",
        ],
    }
    return Evaluation(**{**defaults, **fields})  # type: ignore[arg-type]


def _setting(
    name: str,
    ids: list[str],
    values: np.ndarray,
    first: SettingResult | None,
    rng: np.random.Generator,
) -> SettingResult:
    kind, ratio, dtype, _, bytes_per_token, ms = SETTINGS[name]
    per_query = {
        query: {"nDCG@10": float(v), "RR@10": float(v**0.8), "R@50": float(min(1, b + 0.3))}
        for query, v, b in zip(ids, values, np.sort(values)[::-1], strict=True)
    }
    columns = {m: {q: per_query[q][m] for q in ids} for m in ("nDCG@10", "RR@10", "R@50")}
    differences = {}
    if first is not None:
        differences = {
            m: compare({q: first.per_query[q][m] for q in ids}, column)
            for m, column in columns.items()
        }
    return SettingResult(
        name=name,
        kind=kind,
        ratio=ratio,
        store_dtype=dtype,
        metrics={m: float(np.mean(list(c.values()))) for m, c in columns.items()},
        intervals={m: bootstrap_interval(list(c.values())) for m, c in columns.items()},
        differences=differences,
        per_query=per_query,
        bytes_per_passage=bytes_per_token * 150,
        bytes_per_token=bytes_per_token,
        ms_per_query=(ms * rng.gamma(40, 1 / 40, len(ids))).tolist() if ms else [],
    )


def _sample(setting: SettingResult, rng: np.random.Generator) -> ScoreSample:
    spread = 1 + 0.02 * (setting.ratio or 0)
    scores = np.concatenate([rng.beta(3 / spread, 1.5, 310), rng.beta(0.4 * spread, 2.5, 5_690)])
    return score_sample(setting.name, scores.tolist(), [i < 310 for i in range(6_000)])


QUERIES = [
    "how is a thread pool shut down without waiting for pending work",
    "parse command line arguments with subcommands",
    "如何在不阻塞事件循环的情况下读取大文件",
    "كيف تعمل المهلة في اتصالات الشبكة",
    "difference between shallow and deep copy",
    "pathlib.Path.resolve versus os.path.realpath on symlinks",
]

PASSAGES = {
    "concurrent.futures.Executor.shutdown": "Signal the executor that it should free any resources "
    "that it is using when the currently pending futures are done executing. If cancel_futures is "
    "True, this method will cancel all pending futures that the executor has not started running.",
    "threading.Thread.join": "Wait until the thread terminates. This blocks the calling thread "
    "until the thread whose join() method is called terminates, either normally or through an "
    "unhandled exception, or until the optional timeout occurs.",
    "multiprocessing.pool.Pool.close": "Prevents any more tasks from being submitted to the pool. "
    "Once all the tasks have been completed the worker processes will exit.",
    "queue.Queue.shutdown": "Put a Queue instance into a shutdown mode. The queue can no longer "
    "grow. https://docs.example.org/3/library/queue/a-very-long-address-that-has-no-space/at-all",
    "asyncio.to_thread": "在单独的线程中异步运行函数。向此函数提供的任何参数都会直接传给该函数。"
    "返回一个可以被等待以获取该函数的最终结果的协程。此协程函数主要用于执行会阻塞事件循环的读写操作。",
    "socket.settimeout": "تعيين مهلة لعمليات المقبس المعطلة. يمكن أن تكون القيمة عددا غير سالب.",
}


def _examples(*, helped: bool) -> list[Example]:
    ids, found = list(PASSAGES), []
    for n, query in enumerate(QUERIES[:3]):
        orders = [ids[n:] + ids[:n], ids[n + 3 :] + ids[: n + 3]]
        change = (0.387 - 0.05 * n, 1.0 - 0.08 * n)
        before, after = orders if helped else orders[::-1]
        found.append(
            Example(
                query_id=f"q{n + 1:04}",
                query=query,
                setting="r4",
                metric="nDCG@10",
                before=change[0 if helped else 1],
                after=change[1 if helped else 0],
                first_stage=_ranking(before, relevant=ids[(n + 3) % 6], top=17.3),
                reranked=_ranking(after, relevant=ids[(n + 3) % 6], top=0.93),
            )
        )
    return found


def _ranking(ids: list[str], *, relevant: str, top: float) -> list[Candidate]:
    return [
        Candidate(i, rank, top * 0.82 ** (rank - 1), PASSAGES[i], i == relevant)
        for rank, i in enumerate(ids[:5], start=1)
    ]
