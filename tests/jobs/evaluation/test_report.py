import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from jobs.evaluation import findings
from jobs.evaluation.findings import headline, main_setting, meanings, verdict
from jobs.evaluation.judging import MAX_EXAMPLES
from jobs.evaluation.report import MAX_QUERIES, MAX_TEXT, render_report, write_report
from jobs.evaluation.results import Candidate, Difference, Evaluation, Example
from tests.support.evaluations import synthetic_evaluation

VOID = {"meta", "link", "img", "br", "hr", "input"}
EVIL = "</script></style></title><img src=x onerror=pwned()><script>pwned()</script>\"'{{ 7*7 }}"


class Page(HTMLParser):
    """Elements with their attributes, ids, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return synthetic_evaluation()


@pytest.fixture(scope="module")
def html(evaluation) -> str:
    return render_report(evaluation)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def two(effect: float, **fields: object) -> Evaluation:
    return synthetic_evaluation(names=("bm25", "r4"), effects={"r4": effect}, **fields)


# What it says


@pytest.mark.parametrize(
    ("effect", "start", "said"),
    [
        (0.12, "r4 raises nDCG@10 from .", "better"),
        (-0.12, "r4 is worse than bm25 on nDCG@10", "worse"),
        (0.005, "No gain over bm25 can be shown on nDCG@10", "not distinguishable"),
    ],
)
def test_the_headline_says_what_the_interval_allows(effect, start, said):
    evaluation = two(effect)
    difference = evaluation.settings[1].differences["nDCG@10"]
    lead = headline(evaluation)[0]
    assert verdict(difference) == said
    assert lead.startswith(start)
    assert findings.interval(difference.low, difference.high) in lead
    assert f"p {findings.p_value(difference.p)}" in lead
    page = Page(render_report(evaluation))
    assert lead in page.text.replace("\N{NO-BREAK SPACE}", " ")


@given(
    mean=st.floats(-0.5, 0.5), below=st.floats(0, 0.3), above=st.floats(0, 0.3), p=st.floats(0, 1)
)
def test_no_gain_and_no_loss_is_claimed_across_zero(mean, below, above, p):
    difference = Difference(mean, mean - below, mean + above, p, 1, 1)
    evaluation = two(0.0, num_queries=5)
    first, setting = evaluation.settings
    setting = replace(setting, differences={"nDCG@10": difference})
    told = " ".join(headline(replace(evaluation, settings=[first, setting])))
    if difference.low <= 0 <= difference.high or p >= 0.05:
        assert "raises" not in told
        assert "worse" not in told.lower()
        assert "better" not in told


def test_of_many_settings_the_best_leads_and_the_others_are_told_apart(evaluation):
    lead, also, unclear, worse, cheapest = headline(evaluation)
    assert lead.startswith("r4+bm25 raises nDCG@10 from .465 to .5")
    assert also.startswith("Also better: r32+bm25 (+.0")
    assert unclear.startswith("Not distinguishable from bm25: ")
    assert worse.startswith("Worse than bm25: ")
    assert cheapest == (
        "Among the better ones, r32+bm25 reads the least: 40 B per passage token, "
        "against 320 B for r4+bm25."
    )


def test_every_setting_worse_is_said_so():
    effects = {"r4": -0.15, "r32": -0.25}
    lead = headline(synthetic_evaluation(names=("bm25", "r4", "r32"), effects=effects))[0]
    assert lead.startswith("Every setting is worse than bm25 on nDCG@10 (.465); r4 loses least: −")


def test_one_setting_alone_is_reported_and_compared_with_nothing():
    evaluation = synthetic_evaluation(names=("bm25",), num_examples=0, num_queries=20)
    assert main_setting(evaluation) is None
    page = Page(render_report(evaluation))
    assert "bm25 reaches nDCG@10 ." in page.text
    assert "Nothing was compared with it." in page.text
    assert not page.all("figure")


def test_without_ndcg_the_first_metric_leads():
    evaluation = two(0.12)
    only = [
        replace(s, metrics={"RR@10": s.metrics["RR@10"], "R@50": s.metrics["R@50"]})
        for s in evaluation.settings
    ]
    evaluation = replace(evaluation, settings=only)
    assert headline(evaluation)[0].startswith("r4 raises RR@10 from ")
    assert "Change of RR@10 for each query" in render_report(evaluation)


def test_what_was_not_measured_is_left_out():
    evaluation = two(0.1, num_examples=0, scores=[], warnings=[], note="")
    bare = [replace(s, bytes_per_token=0.0, ms_per_query=[]) for s in evaluation.settings]
    text = Page(render_report(replace(evaluation, settings=bare))).text
    assert "No query was helped." in text
    assert "No query was hurt." in text
    for absent in ("Quality against cost", "calibration", "What may mislead", "About this model"):
        assert absent not in text


def test_the_note_on_the_model_comes_before_any_figure(page, evaluation):
    assert page.text.index(evaluation.note) < page.text.index("r4+bm25 raises")


def test_all_that_was_found_is_in_the_page(page, evaluation):
    for wanted in (
        evaluation.collection,
        evaluation.model,
        evaluation.first_stage,
        evaluation.instruction,
        evaluation.system_instruction,
        *evaluation.warnings,
        *evaluation.queries.values(),
        *(c.text for e in evaluation.helped + evaluation.hurt for c in e.first_stage + e.reranked),
        *(words for _, words in meanings(evaluation)),
    ):
        assert " ".join(wanted.split()) in page.text
    for setting in evaluation.settings:
        difference = setting.differences.get("nDCG@10")
        assert findings.interval(*setting.intervals["nDCG@10"]) in page.text
        assert difference is None or findings.interval(difference.low, difference.high) in page.text


def test_relevant_passages_are_marked_in_words_and_moves_are_told(page, evaluation):
    shown = [c for e in evaluation.helped + evaluation.hurt for c in e.first_stage + e.reranked]
    assert sum(c.relevant for c in shown) == 12
    assert len(re.findall(r"\d relevant [\w.]+ (?:score|P\(yes\))", page.text)) == 12
    assert "1 relevant queue.Queue.shutdown P(yes) .930 ↑ from 4" in page.text
    assert "↑ from below 5" in page.text


# What it is


def test_the_file_needs_no_other_and_the_same_evaluation_gives_the_same_file(
    evaluation, html, page, tmp_path
):
    evaluation.write(tmp_path / "e.json")
    again = TypeAdapter(Evaluation).validate_json((tmp_path / "e.json").read_bytes())
    write_report(again, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\((?!#)", html)


def test_ids_are_unique_and_every_reference_arrives(html, page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {
        *re.findall(r"href=\"#([^\"]+)", html),
        *re.findall(r"url\(#([^)]+)", html),
        *" ".join(re.findall(r"aria-labelledby=\"([^\"]+)", html)).split(),
    }
    assert wanted
    assert wanted <= set(ids)


def test_headings_tables_and_figures_speak_to_those_who_do_not_see(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(th["scope"] in ("col", "row") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == 3
    drawn = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(drawn) == 2 * 2 + 9 + 2
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in drawn)
    assert len(page.all("desc")) == len(drawn)
    assert not page.all("button")  # only the script makes buttons: none is dead without it


def test_every_figure_of_cost_names_every_setting(html, evaluation):
    for name in ("bytes-wide", "bytes-narrow", "ms-wide", "ms-narrow"):
        figure = re.search(rf"<svg[^>]*{name}-title.*?</svg>", html, re.DOTALL)[0]
        written = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
        assert {s.name for s in evaluation.settings[1:]} <= set(written)
        assert "bm25 .465" in written


def test_bars_are_counted(html, evaluation):
    difference = evaluation.settings[2].differences["nDCG@10"]
    assert f">{difference.wins} better</text>" in html
    assert f">{difference.losses} worse</text>" in html


def hostile() -> Evaluation:
    """Every text that comes from outside tries to break out."""
    evaluation = two(0.1, num_queries=12)
    passage = Candidate(EVIL, 1, 0.9, EVIL, True)
    example = Example("q0001", EVIL, EVIL, "nDCG@10", 0.1, 0.9, [passage], [passage])
    first, setting = evaluation.settings
    return replace(
        evaluation,
        **dict.fromkeys(
            (
                *("collection", "split", "model", "fingerprint", "note", "first_stage"),
                *("instruction", "system_instruction"),
            ),
            EVIL,
        ),
        queries=dict.fromkeys(evaluation.queries, EVIL),
        settings=[replace(first, name=EVIL + "1"), replace(setting, name=EVIL)],
        scores=[replace(evaluation.scores[0], setting=EVIL)],
        helped=[example],
        hurt=[example],
        warnings=[EVIL],
    )


def test_texts_that_look_like_markup_are_shown_and_do_nothing():
    page = Page(render_report(hostile()))
    assert not page.all("img")
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert page.text.count(EVIL) > 20


def test_thousands_of_queries_and_long_texts_make_no_large_file(evaluation):
    long_text = "a passage without an end " * 4_000
    copies = range(42)
    settings = [
        replace(s, per_query={f"{q}-{i}": v for q, v in s.per_query.items() for i in copies})
        for s in evaluation.settings
    ]
    example = evaluation.helped[0]
    example = replace(example, reranked=[replace(c, text=long_text) for c in example.reranked])
    large = replace(
        evaluation,
        queries=dict.fromkeys(settings[0].per_query, long_text),
        settings=settings,
        helped=[example] * MAX_EXAMPLES,
    )
    html = render_report(large)
    assert len(html.encode()) < 1_500_000
    text = Page(html).text
    assert f"the {MAX_QUERIES} queries with the largest change, of 5,040" in text
    assert "400 of the 5,040 queries are drawn" in text
    assert long_text[: MAX_TEXT - 2].strip() + " …" in text


# How it looks


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_aa_in_both_schemes(scheme):
    css = files("jobs.evaluation").joinpath("report.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "muted", "blue", "green", "orange", "violet", "rose"):
        for ground in ("paper", "raised", "band"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["caution-ink"], colours["caution"]) >= 4.5
    assert contrast(colours["caution-ink"], colours["paper"]) >= 4.5


def test_numbers_are_printed_as_people_write_them():
    assert [findings.value(v) for v in (0.475, 1, 0, -0.0114)] == [".475", "1.000", ".000", "−.011"]
    assert [findings.signed(v) for v in (0.047, -0.05, 0.0001)] == ["+.047", "−.050", ".000"]
    assert findings.interval(-0.02, 0.0741) == "[−.020, .074]"
    assert [findings.p_value(p) for p in (0.0002, 0.002, 1)] == ["< .001", "= .002", "= 1.000"]
    sizes = (0, 40, 320, 999.6, 48_600, 192_000, 3_456_000, 2e9)
    assert [findings.size(b) for b in sizes] == [
        "0 B", "40 B", "320 B", "1.0 KB", "48.6 KB", "192 KB", "3.5 MB", "2.0 GB",
    ]  # fmt: skip
    assert [findings.milliseconds(ms) for ms in (8.44, 97.2, 1990)] == ["8.4", "97", "1,990"]
