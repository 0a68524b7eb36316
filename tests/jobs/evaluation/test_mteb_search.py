"""Real mteb tasks, made here, evaluated from stored states and by mteb's own wrapper."""

import json

import pytest
from datasets import Dataset

from jobs.evaluation.mteb_search import KaLMSearch
from kalm_encoder import PassageTable, QueryDecoder, Reranker
from kalm_encoder.errors import InputError, MismatchError, MissingIdsError, TableError
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from tests.conftest import make_texts

TEXTS = make_texts(16, seed=3, longest=30)
TITLES = ("", "pooling library")
CORPUS = [{"id": f"d{i}", "title": TITLES[i % 2], "text": text} for i, text in enumerate(TEXTS)]
QUERIES = [
    {"id": "q0", "text": "token state"},
    {"id": "q1", "text": "shard of a table"},
    {"id": "q2", "text": "xylophone"},  # in no passage
]
RELEVANT = {"q0": {"d1": 1}, "q1": {"d5": 1, "d7": 1}, "q2": {"d2": 1}}
TOP_RANKED = {"q0": ["d1", "d2", "d3", "d4"], "q1": ["d5", "d1", "d7"], "q2": ["d2", "d0"]}
FLOAT32 = {"ratios": (4, 8), "store_dtype": "float32"}


def make_task(name, kind, *, queries=QUERIES, top_ranked=TOP_RANKED):
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name, type=kind, description="Made by a test.", reference=None,
            dataset={"path": "none", "revision": "none"}, category="t2t", modalities=["text"],
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10", date=None,
            domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, num_proc=None, **kwargs):
            split = {
                "corpus": Dataset.from_list(CORPUS),
                "queries": Dataset.from_list(queries),
                "relevant_docs": RELEVANT,
                "top_ranked": top_ranked,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Task()


def evaluate(model, task, folder):
    """Return mteb's metrics and the scores they were made from, by query."""
    import mteb

    options = {"cache": None, "show_progress_bar": False, "prediction_folder": folder}
    result = mteb.evaluate(model, task, **options)
    (predictions,) = folder.glob("*.json")
    return (
        result.task_results[0].scores["test"][0],
        json.loads(predictions.read_text())["default"]["test"],
    )


def reranker_of(search, task, model_dir):
    table = search.table_path(task.metadata.name, "default", "test")
    return Reranker(PassageTable.open(str(table)), QueryDecoder(str(model_dir)))


def ndcg(metrics):
    return {k: v for k, v in metrics.items() if k.startswith("ndcg")}


@pytest.mark.parametrize("own_instruction", [False, True])
def test_a_reranking_task_scores_as_mtebs_wrapper_does(model_dir, tmp_path, own_instruction):
    from mteb.models import ModelMeta, SearchProtocol
    from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

    queries = [{**q, "instruction": f"Find {q['id']}."} if own_instruction else q for q in QUERIES]
    task = make_task("LocalReranking", "Reranking", queries=queries)
    how = {"system_instruction": "Answer yes or no."} if own_instruction else {}
    search = KaLMSearch(str(model_dir), tmp_path / "states", **how, **FLOAT32)
    assert isinstance(search, SearchProtocol)
    ours, our_scores = evaluate(search, task, tmp_path / "ours")
    reference = KaLMRerankerWrapper(str(model_dir), device="cpu", **how)
    reference.mteb_model_meta = ModelMeta.create_empty()
    theirs, their_scores = evaluate(reference, task, tmp_path / "theirs")
    assert {q: sorted(s) for q, s in our_scores.items()} == {
        q: sorted(i) for q, i in TOP_RANKED.items()
    }
    for query, scores in their_scores.items():
        assert our_scores[query] == pytest.approx(scores, abs=1e-5)
    assert ndcg(ours) == pytest.approx(ndcg(theirs))
    assert len({s for scores in our_scores.values() for s in scores.values()}) > 5


def test_a_retrieval_task_ranks_what_full_text_search_finds(model_dir, tmp_path):
    task = make_task("LocalRetrieval", "Retrieval", top_ranked=None)
    search = KaLMSearch(
        str(model_dir), tmp_path / "states", ratio=8,
        instruction="For all.", instructions={"LocalRetrieval": "Judge it."}, **FLOAT32,
    )  # fmt: skip
    metrics, scores = evaluate(search, task, tmp_path / "ours")
    reranker = reranker_of(search, task, model_dir)
    for query in QUERIES:
        ids = [i for i, _ in reranker.table.search(query["text"], 1000)]
        want = reranker.rerank(query["text"], ids, ratio=8, instruction="Judge it.")
        assert scores[query["id"]] == {r.id: r.score for r in want}
    assert scores["q0"] and scores["q1"] and scores["q2"] == {}
    # A query without candidates counts as 0; recall at 1000 has no other reason to be below 1.
    found = [len(RELEVANT[q].keys() & s.keys()) / len(RELEVANT[q]) for q, s in scores.items()]
    assert metrics["recall_at_1000"] == pytest.approx(sum(found) / 3, abs=1e-4)


def test_evaluating_again_encodes_nothing_again(model_dir, tmp_path):
    pending = []

    def counting(work, units):
        if isinstance(work, EncodeWork):
            pending.append(len(units))
        return in_process(work, units)

    task = make_task("LocalReranking", "Reranking")
    results = []
    for run in ("first", "second"):
        search = KaLMSearch(
            str(model_dir), tmp_path / "states", execute=counting, shard_size=5, **FLOAT32
        )
        results.append(evaluate(search, task, tmp_path / run))
    assert pending == [4]  # the second time nothing is given to an executor
    assert results[0][1] == results[1][1]
    other = KaLMSearch(str(model_dir), tmp_path / "states", ratios=(2,))
    with pytest.raises(MismatchError):
        evaluate(other, task, tmp_path / "other")


def test_results_of_other_settings_are_other_results(model_dir, tmp_path):
    import mteb

    def name(**options):
        meta = KaLMSearch(str(model_dir), **options).mteb_model_meta
        return meta.name, meta.revision, meta.experiment_name

    different = [{}, {"ratio": 8}, {"store_dtype": "int8"}]
    different += [{"instruction": "Judge it."}, {"system_instruction": "Judge it."}]
    assert len({name(**options) for options in different}) == len(different)
    assert name() == name(ratio=4)
    cache = mteb.ResultCache(tmp_path)
    task = make_task("LocalReranking", "Reranking")
    search = KaLMSearch(str(model_dir), **FLOAT32)  # its folder is a temporary one
    mteb.evaluate(search, task, cache=cache, show_progress_bar=False)
    assert cache.load_task_result("LocalReranking", search.mteb_model_meta) is not None
    coarse = KaLMSearch(str(model_dir), ratio=8, **FLOAT32)
    assert cache.load_task_result("LocalReranking", coarse.mteb_model_meta) is None


def test_what_cannot_be_searched_is_named(model_dir, tmp_path):
    search = KaLMSearch(str(model_dir), tmp_path, **FLOAT32)
    task = make_task("LocalRetrieval", "Retrieval")
    place = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "a/b"}
    with pytest.raises(TableError, match="no passage table at"):
        search.search(QUERIES, top_k=5, **place)
    search.index(CORPUS, **place)
    assert len(search.search(QUERIES, top_k=2, **place)["q0"]) == 2
    assert search.search(QUERIES, top_k=5, top_ranked={"q0": ["d1"]}, **place)["q1"] == {}
    unknown = {"q0": ["d1", "never encoded"]}
    with pytest.raises(MissingIdsError, match="never encoded"):
        search.search(QUERIES, top_k=5, top_ranked=unknown, **place)
    dropping = KaLMSearch(str(model_dir), tmp_path, on_missing="drop")
    found = dropping.search(QUERIES, top_k=5, top_ranked=unknown, **place)
    assert list(found["q0"]) == ["d1"]
    with pytest.raises(InputError, match="'c' of LocalRetrieval is a conversation"):
        search.search([{"id": "c", "text": ["one", "two"]}], top_k=5, **place)
