"""kalm evaluate: what it reads, that its metrics are trec_eval's, that it scores what is stored."""

import json
import math
from dataclasses import replace

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from jobs.demo_training.documentation import held_out
from jobs.demo_training.questions import KINDS
from jobs.evaluation.collection import read_files, read_folder
from jobs.evaluation.experiment import Experiment, evaluate
from jobs.evaluation.rankings import metrics_per_query, read_ranking, write_ranking
from jobs.evaluation.results import Evaluation
from kalm_encoder import Reranker
from kalm_encoder.errors import InputError
from kalm_encoder.rerank.fusion import fuse
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from tests.conftest import SCRIPTS, make_texts, write_corpus
from tests.jobs.test_end_to_end import kalm

QUERIES = {"q1": "index query passage", "q2": "library catalogue", "q3": "memory latency"}
JUDGED = {"q1": {"p1": 1, "p2": 2}, "q2": {"p3": 1}, "q3": {"p4": 1, "p5": 0}}


def make_folder(folder, texts, queries=QUERIES, judged=JUDGED):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl", texts)
    lines = [json.dumps({"_id": q, "text": t}, ensure_ascii=False) for q, t in queries.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"{q}\t{p}\t{r}\n" for q, ps in judged.items() for p, r in ps.items()]
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("beir") / "tiny", make_texts(40, seed=2))


@pytest.fixture(scope="module")
def evaluated(folder, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    experiment = Experiment(
        collection=read_folder(folder), model=str(model_dir), folder=out, ratios=(2, 8),
        store_dtypes=("float16", "int8"), cascades=(((8, 5), (2, None)),), depth=20,
    )  # fmt: skip
    return experiment, evaluate(experiment, in_process)


def test_every_setting_asked_for_is_there(evaluated):
    _, evaluation = evaluated
    assert [s.name for s in evaluation.settings] == [
        "bm25", "r2", "r2+bm25", "r8", "r8+bm25", "r8:5,2", "r2-int8", "r8-int8", "r8:5,2-int8",
    ]  # fmt: skip
    assert [s.setting for s in evaluation.scores] == ["r2", "r8", "r2-int8", "r8-int8"]
    assert evaluation.summary()["r2"].keys() == {"ndcg@10", "rr@10", "r@100", "ap"}


def test_it_ranks_as_the_reranker_does_from_the_same_tables(evaluated):
    experiment, _ = evaluated
    (base,) = experiment.folder.glob("states/*-float16.lance")
    reranker = Reranker.open(str(base))
    bm25, _ = read_ranking(experiment.folder / "runs/bm25.trec")
    for name, stages in (("r8", [(8, None)]), ("r8-5,2", [(8, 5), (2, None)])):
        run, tag = read_ranking(experiment.folder / f"runs/{name}.trec")
        assert tag == name.replace("-", ":")
        for query, text in QUERIES.items():
            results = reranker.rerank(text, list(bm25[query]), cascade=stages)
            assert list(run[query]) == [r.id for r in results]
    fused, _ = read_ranking(experiment.folder / "runs/r8+bm25.trec")
    margins = {r.id: r.margin for r in reranker.rerank(QUERIES["q1"], list(bm25["q1"]), ratio=8)}
    want = fuse(dict(reranker.table.search(QUERIES["q1"], 20)), margins)
    assert list(fused["q1"]) == sorted(want, key=lambda i: (-want[i], i))


def test_bytes_are_those_of_the_columns_read(evaluated):
    experiment, evaluation = evaluated
    settings = {s.name: s for s in evaluation.settings}
    (base,) = experiment.folder.glob("states/*-float16.lance")
    table = Reranker.open(str(base)).table
    bm25, _ = read_ranking(experiment.folder / "runs/bm25.trec")
    tokens = {i: n for scores in bm25.values() for i, (n, _) in table.lengths(list(scores)).items()}
    candidates = [i for scores in bm25.values() for i in scores]
    read = sum(math.ceil(tokens[i] / 8) * 128 * 2 for i in candidates)  # d = 128, two bytes
    assert settings["r8"].bytes_per_passage == pytest.approx(read / len(candidates))
    assert settings["r8-int8"].bytes_per_passage < 0.52 * settings["r8"].bytes_per_passage
    cascade, alone = settings["r8:5,2"], settings["r2"]
    assert settings["r8"].bytes_per_token < cascade.bytes_per_token < alone.bytes_per_token


def test_metrics_equal_trec_eval_on_the_files_that_were_written(evaluated):
    experiment, evaluation = evaluated
    tool = pytrec_eval.RelevanceEvaluator(JUDGED, {"ndcg_cut.10", "recip_rank", "map"})
    for setting in evaluation.settings:
        file = experiment.folder / "runs" / f"{setting.name.replace(':', '-')}.trec"
        run: dict[str, dict[str, float]] = {}
        for line in file.read_text().splitlines():
            query, _, passage, _, score, _ = line.split()
            run.setdefault(query, {})[passage] = float(score)
        for query, values in tool.evaluate(run).items():
            got = setting.per_query[query]
            assert got["nDCG@10"] == pytest.approx(values["ndcg_cut_10"], abs=1e-9)
            assert got["AP"] == pytest.approx(values["map"], abs=1e-9)


def test_ties_are_judged_in_the_order_that_was_written(tmp_path):
    """All candidates tie in float32: the file still says who is first, for every tool."""
    ranked = {"q": {"b": 1.0, "a": 1.0 - 1e-12, "z": 1.0 - 1e-12, "c": 1.0 - 1e-9}}
    write_ranking(tmp_path / "run", ranked, "tag")
    assert list(read_ranking(tmp_path / "run")[0]["q"]) == ["b", "a", "z", "c"]
    for relevant, place in (("b", 1), ("a", 2), ("z", 3), ("c", 4)):
        values = metrics_per_query({"q": {relevant: 1}}, tmp_path / "run", ["nDCG@10", "RR@10"])[
            "q"
        ]
        assert values["nDCG@10"] == pytest.approx(1 / math.log2(place + 1))
        assert values["RR@10"] == pytest.approx(1 / place)


@given(st.lists(st.floats(-1e3, 1e3, width=64), min_size=1, max_size=30))
def test_a_run_reads_back_in_its_order_whatever_the_scores(tmp_path_factory, scores):
    file = tmp_path_factory.mktemp("run") / "run.trec"
    ranked = {f"d{i % 7}-{i}": score for i, score in enumerate(sorted(scores, reverse=True))}
    write_ranking(file, {"q": ranked}, "t")
    assert list(read_ranking(file)[0]["q"]) == list(ranked)


def test_a_query_without_candidates_counts_as_zero(tmp_path):
    write_ranking(tmp_path / "run", {"q1": {"p1": 1.0}}, "t")
    values = metrics_per_query(JUDGED, tmp_path / "run")
    assert values["q2"] == dict.fromkeys(values["q2"], 0.0) and values["q1"]["RR@10"] == 1


def test_evaluating_again_encodes_nothing_and_a_changed_corpus_only_what_changed(
    folder, model_dir, tmp_path
):
    texts = make_texts(40, seed=2)
    corpus = make_folder(tmp_path / "tiny", texts)
    encoded = []

    def counting(work, units):
        if isinstance(work, EncodeWork):
            encoded.append(sum(shard.rows.num_rows for shard in units))
        return in_process(work, units)

    experiment = Experiment(
        collection=read_folder(corpus), model=str(model_dir), folder=tmp_path / "out",
        ratios=(4,), store_dtypes=("float16", "int4"),
    )  # fmt: skip
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/runs/mine.trec").write_text("a file of the user's")
    first = evaluate(experiment, counting)
    assert (tmp_path / "out/runs/mine.trec").exists()
    again = evaluate(experiment, counting)
    assert encoded == [40] and again.summary() == first.summary()
    write_corpus(corpus / "corpus.jsonl", [*texts[:38], "library catalogue library", texts[39]])
    changed = evaluate(experiment, counting)
    assert encoded == [40, 1] and changed.num_passages == 40
    assert len(list((tmp_path / "out/states").glob("*-int4-*.lance"))) == 1  # the old one is gone
    assert "p38" in read_ranking(tmp_path / "out/runs/r4-int4.trec")[0]["q2"]


def test_a_run_and_trec_judgements_work_too_and_gaps_are_told(folder, model_dir, tmp_path):
    (tmp_path / "queries.tsv").write_text("".join(f"{q}\t{t}\n" for q, t in QUERIES.items()))
    (tmp_path / "all.qrels").write_text("q1 0 p1 1\nq1 0 p2 1\nq2 0 p3 1\nq9 0 p3 1\n")
    write_ranking(tmp_path / "first.trec", {"q1": {"p1": 3.0, "gone": 2.0, "p2": 1.0}}, "mine")
    collection = read_files(
        (str(folder / "corpus.jsonl"),), tmp_path / "queries.tsv", tmp_path / "all.qrels", "x", "t"
    )
    experiment = Experiment(
        collection=collection, model=str(model_dir), folder=tmp_path / "out", ratios=(4,),
        first_ranking=tmp_path / "first.trec",
    )  # fmt: skip
    evaluation = evaluate(experiment, in_process)
    assert [s.name for s in evaluation.settings] == ["mine", "r4", "r4+mine"]
    told = " ".join(evaluation.warnings)
    for gap in ("1 queries without", "q9", "1 candidates are not in the corpus", "gone",
                "1 queries have no candidates"):  # fmt: skip
        assert gap in told
    evaluation.write(tmp_path / "evaluation.json")
    written = (tmp_path / "evaluation.json").read_bytes()
    assert TypeAdapter(Evaluation).validate_json(written) == evaluation


def test_a_ranking_of_ours_may_be_the_first_stage_of_another(evaluated, tmp_path):
    experiment, _ = evaluated
    again = replace(
        experiment, folder=tmp_path, first_ranking=experiment.folder / "runs/r8.trec", ratios=(2,),
        store_dtypes=("float16",), cascades=(),
    )  # fmt: skip
    names = [s.name for s in evaluate(again, in_process).settings]
    assert names == ["first-r8", "r2", "r2+first-r8"]
    assert (tmp_path / "runs/r2+first-r8.trec").exists()


def test_what_would_spoil_figures_silently_is_told_or_refused(folder, model_dir, tmp_path):
    experiment = Experiment(
        collection=read_folder(folder), model=str(model_dir), folder=tmp_path / "out", ratios=(4,)
    )
    evaluate(experiment, in_process)
    judged = {**JUDGED, "q1": {"nowhere": 1, "p1": 1}}
    other = make_folder(tmp_path / "other", make_texts(9, seed=4), judged=judged)
    told = evaluate(replace(experiment, collection=read_folder(other)), in_process).warnings
    assert "1 of 4 relevant passages are not in the corpus: nowhere" in told

    def encodes_nothing(work, units):
        assert not isinstance(work, EncodeWork), "the first collection is encoded again"
        return in_process(work, units)

    again = evaluate(experiment, encodes_nothing)
    assert again.num_passages == 40
    write_corpus(other / "corpus.jsonl", ["one", "two"])
    with (other / "corpus.jsonl").open("a") as lines:
        lines.write('{"_id": "p0", "text": "another one"}\n')
    with pytest.raises(InputError, match="p0"):
        evaluate(replace(experiment, collection=read_folder(other)), in_process)
    with pytest.raises(InputError, match="depth 0"):
        replace(experiment, depth=0)
    for content, message in (("q Q0 d 1 nan t\n", "line 1.*finite"), ("\n", "ranks nothing")):
        (tmp_path / "run").write_text(content)
        with pytest.raises(InputError, match=message):
            read_ranking(tmp_path / "run")


def test_languages_without_spaces_work(model_dir, tmp_path):
    queries = {"zh": "检索增强生成把段落编码一次", "ar": "الفقرات على القرص", "th": "ระบบจัดเก็บ"}
    judged = {"zh": {"p1": 1}, "ar": {"p4": 1}, "th": {"p5": 1}}
    folder = make_folder(tmp_path / "miracl", list(SCRIPTS), queries, judged)
    run = {q: {f"p{i}": 8.0 - i for i in range(8)} for q in queries}
    write_ranking(tmp_path / "dense.trec", run, "dense")
    experiment = Experiment(
        collection=read_folder(folder), model=str(model_dir), folder=tmp_path / "out",
        ratios=(2,), first_ranking=tmp_path / "dense.trec",
    )  # fmt: skip
    evaluation = evaluate(experiment, in_process)
    assert evaluation.queries == queries
    shown = [c.text for e in [*evaluation.helped, *evaluation.hurt] for c in e.reranked]
    assert set(shown) <= {text.strip() for text in SCRIPTS}
    assert all(len(s.per_query) == 3 for s in evaluation.settings)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", '{"_id": "q1"}\n', "queries.jsonl line 1: expected"),
        ("queries.jsonl", "\n\n{broken\n", "queries.jsonl line 3"),
        ("queries.jsonl", '{"_id": "other", "text": "t"}\n', "do their ids belong together"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\tp1\n", "test.tsv line 2"),
        ("qrels/test.tsv", "q1\tp1\tmuch\n", "test.tsv line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, file, content, message):
    folder = make_folder(tmp_path / "c", ["one"])
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        read_folder(folder)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no corpus\.jsonl"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="splits there: test"):
        read_folder(make_folder(tmp_path / "c", ["one"]), "dev")
    with pytest.raises(InputError, match="white space"):
        write_ranking(tmp_path / "run", {"q": {"a b": 1.0}}, "t")
    (tmp_path / "bad").write_text("q Q0 d 1 2.0 t\nq Q0 d 2 1.0 t\n")
    with pytest.raises(InputError, match="line 2: d is there twice"):
        read_ranking(tmp_path / "bad")
    with pytest.raises(InputError, match="nDGC@10"):
        metrics_per_query({"q": {"d": 1}}, tmp_path / "bad", ["nDGC@10"])


def test_the_command_writes_report_runs_and_tables(folder, model_dir, tmp_path):
    (tmp_path / "tasks.json").write_text('{"tiny": "Given a word, find it."}')
    out = tmp_path / "out"
    done = kalm(
        "evaluate", folder, "--model", model_dir, "--ratios", "4,8", "--cascade", "8:5,4",
        "--depth", 10, "--instructions", tmp_path / "tasks.json", "--out", out,
        "--system-instruction", "Answer yes or no.", check=0,
    )  # fmt: skip
    assert "bm25" in done.stdout and "r8:5,4" in done.stdout and "against bm25" in done.stdout
    written = json.loads((out / "evaluation.json").read_text())
    assert written["instruction"] == "Given a word, find it." and written["note"] == ""
    assert written["system_instruction"] == "Answer yes or no."
    assert (out / "report.html").read_text().count("<svg") >= 3
    lines = (out / "per_query.tsv").read_text().splitlines()
    assert len(lines) == 1 + 3 * len(written["settings"])
    error = kalm("evaluate", folder, "--out", out, check=2)
    assert "give the model with --model" in error.stderr


def test_the_demo_beats_full_text_search_on_what_it_never_saw(tmp_path):
    """The shipped, really trained checkpoint on held-out modules, as a user runs it."""
    done = kalm(
        "evaluate", "--demo", "--json", "--ratios", "4,32", "--depth", 10, "--out", tmp_path,
        check=0,
    )  # fmt: skip
    judged = (tmp_path / "held-out-documentation/qrels/test.tsv").read_text().splitlines()[1:]
    assert {line.split("-")[0] for line in judged} == set(KINDS) and len(judged) > 200
    assert all(held_out(line.split("\t")[1].partition(".")[0]) for line in judged)
    means = json.loads(done.stdout)
    assert means.keys() == {"bm25", "r4", "r4+bm25", "r32", "r32+bm25"}
    assert means["r4+bm25"]["ndcg@10"] > means["bm25"]["ndcg@10"] + 0.01
    assert means["r4"]["ndcg@10"] > means["r32"]["ndcg@10"]
    assert "demo checkpoint" in (tmp_path / "report.html").read_text()
