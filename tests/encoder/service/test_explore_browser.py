"""The explore page in a real Chromium, on a real service; the model has random weights."""

import contextlib
import threading

import pytest
import uvicorn
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from kalm_encoder.service.app import create_app
from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.explore.tables import open_tables
from kalm_encoder.service.settings import Settings
from pipeline.upkeep.truncate import truncate
from tests.conftest import SCRIPTS, encode_table, make_texts, write_corpus
from tests.support.browser import chromium, console_errors, set_viewport
from tests.support.serving import free_port, serving, wait_until

HOSTILE = "token <img src=x onerror=\"document.title='broken'\"> & <b>bold</b> " + "w" * 300
ARABIC = f"{SCRIPTS[4]} token"
TEXTS = [
    *(f"token {text}" for text in make_texts(20)),
    *(f"{text} token" for text in SCRIPTS),
    HOSTILE,
    "token " + "a long passage about states " * 60 + "its very end",
]
WIDE, PHONE = (1280, 900), (390, 844)
__all__ = ["chromium"]


@pytest.fixture(scope="module")
def tables(model_dir, tmp_path_factory):
    """The same passages in float16 and int8, at ratios 2 and 8."""
    folder = tmp_path_factory.mktemp("explored")
    corpus = write_corpus(folder / "c.jsonl", TEXTS)
    encode_table(model_dir, corpus, folder / "a.lance", ratios=(2, 8))
    truncate(str(folder / "a.lance"), str(folder / "b.lance"), store_dtype="int8")
    return folder / "a.lance", str(folder / "b.lance")


@pytest.fixture(scope="module")
def address(tables):
    with serving(*tables, "--note", "Random weights.", command="explore") as client:
        yield str(client.base_url)


@pytest.fixture
def page(chromium, address):
    """The page, freshly loaded; no test may leave an error in the console."""
    opened = Page(chromium, address)
    yield opened
    assert console_errors(chromium) == []


class Page:
    """What a reader sees and does."""

    def __init__(self, browser, address):
        self.browser = browser
        self.address = address
        console_errors(browser)
        set_viewport(browser, *WIDE)
        self.load()

    def load(self, state=""):
        self.browser.get("about:blank")  # an address that differs in its hash alone is no load
        self.browser.get(f"{self.address}/{state}")
        self.until(lambda: self.one("#table option") or self.one("#locked").is_displayed())

    def until(self, condition):
        return WebDriverWait(self.browser, 20, 0.05).until(lambda _: condition())

    def one(self, css):
        return next(iter(self.browser.find_elements(By.CSS_SELECTOR, css)), None)

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def search(self, query="token"):
        box = self.one("#query")
        box.clear()
        box.send_keys(query, Keys.ENTER)
        self.settle()

    def settle(self):
        """Wait until the answer to the last question is shown and nothing moves any more."""
        busy = "return document.querySelector('#lists').getAttribute('aria-busy')"
        self.until(lambda: self.one("#first li") and self.run(busy) == "false")
        self.until(lambda: not self.run("return document.getAnimations().length"))

    def ids(self, which="second"):
        return self.run(
            "return [...document.querySelectorAll(`#${arguments[0]} .result`)]"
            ".map(b => b.dataset.id)",
            which,
        )

    def texts(self, css):
        found = "[...document.querySelectorAll(arguments[0])]"
        return self.run(f"return {found}.map(n => n.innerText.trim())", css)

    def focused(self):
        return self.browser.switch_to.active_element


def test_a_typed_query_shows_both_lists_movement_and_cost(page):
    assert page.one("#note").text == "Random weights."
    page.search()
    assert (len(page.ids("first")), len(page.ids())) == (10, 10)
    assert page.ids("first") != page.ids()
    moved = page.texts("#second .moved")
    assert all(text.startswith(("▲ ", "▼ ", "=")) for text in moved), moved
    assert any(text.startswith("▲") for text in moved)
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#lines path")) == 10
    assert all(text.endswith(" ms") for text in page.texts(".figures dd[id^=ms]"))
    assert page.one("#bytes-share").text.startswith("100 % of ")
    assert "30 passages reranked at ratio 2" in page.one("#status").get_attribute("textContent")
    page.one("#more").click()
    assert (len(page.ids("first")), len(page.ids())) == (30, 30)
    assert set(page.ids("first")) == set(page.ids())
    assert page.one("mark").text.lower() == "token"


def test_the_slider_by_keyboard_changes_the_ranking(page):
    page.search()
    page.one("#more").click()
    fine, scores = page.ids(), page.texts("#second .score")
    page.run("document.querySelector('#ratio').focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.until(lambda: "r=16" in page.browser.current_url)
    page.settle()
    assert page.one("#ratio").get_attribute("aria-valuetext") == "16 · made on read"
    assert all(meta.endswith("ratio 16") for meta in page.texts("#second .meta"))
    assert page.texts("#second .score") != scores
    assert page.ids() != fine
    assert sorted(page.ids()) == sorted(fine)
    share = int(page.one("#bytes-share").text.split(" %")[0])
    assert 25 <= share < 35, "ratio 16 is made from the column stored at 8"
    page.press(Keys.HOME)
    page.until(lambda: "r=2&" in page.browser.current_url)
    page.settle()
    assert page.ids() == fine


LATE = """
const fetched = window.fetch;
window.asked = [], window.said = [];
window.fetch = async (path, options) => {
  window.asked.push(JSON.parse(options.body).ratio);
  const reply = await fetched(path, options);
  await new Promise((done) => setTimeout(done, 700));
  return reply;
};
const status = document.querySelector("#status");
new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
document.querySelector("#ratio").focus();
"""


def test_late_answers_are_dropped_and_only_the_last_move_is_asked(page):
    page.search()
    page.run(LATE)
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: page.run("return window.asked") == [4])
    for _ in range(3):  # all while ratio 4 is asked
        url = page.browser.current_url
        page.press(Keys.ARROW_RIGHT)
        page.until(lambda url=url: page.browser.current_url != url)
    page.settle()
    assert page.run("return window.asked") == [4, 32]
    (said,) = page.run("return window.said")
    assert "reranked at ratio 32" in said


def test_dtype_cascade_depth_and_fusion_are_chosen(page):
    page.search()
    page.one("#more").click()
    float16 = page.texts("#second .score")
    Select(page.one("#table")).select_by_value("int8")
    page.until(lambda: page.texts("#second .score") != float16)
    assert "t=int8" in page.browser.current_url
    Select(page.one("#cascade")).select_by_value("16:10,2")
    page.until(lambda: "set by the cascade" in page.one("#ratio-value").text)
    page.until(lambda: page.texts("#second .meta")[-1].endswith("ratio 16"))
    ratios = [meta.rsplit(" ", 1)[1] for meta in page.texts("#second .meta")]
    assert ratios == ["2"] * 10 + ["16"] * 20
    reranked = page.ids()
    page.one("input[value=fused]").find_element(By.XPATH, "..").click()
    page.until(lambda: page.ids() != reranked)
    assert "z-scores" in page.one("#scale").text
    Select(page.one("#depth")).select_by_value("10")
    page.until(lambda: len(page.ids("first")) == 10)
    assert not page.one("#more").is_displayed()


def test_a_link_shows_the_same_again(page):
    page.load("#q=token&t=int8&r=8&k=20&list=fused&i=Find%20duplicates.")
    page.settle()
    assert page.one("#query").get_attribute("value") == "token"
    assert page.one("#ratio-value").text == "8 · stored"
    assert Select(page.one("#table")).first_selected_option.text == "int8"
    assert page.one("#instruction").get_attribute("value") == "Find duplicates."
    assert page.one("input[value=fused]").is_selected()
    ids, link = page.ids(), page.browser.current_url
    page.load("#q=token&c=32%3A5%2C4")  # not one of the presets
    page.settle()
    assert "best 5 at 4" in Select(page.one("#cascade")).first_selected_option.text
    page.load(link.split("/")[-1])
    page.settle()
    assert page.ids() == ids
    page.load("#q=token&r=x&k=-3&t=nope&c=nonsense&list=none")
    page.until(lambda: page.one("#second .result") or page.one("#problem").is_displayed())


def test_the_keyboard_alone_is_enough(page):
    page.run("document.activeElement.blur()")
    page.press("/", "token", Keys.ENTER)
    page.settle()
    reached = []
    while "result" not in page.focused().get_attribute("class").split():
        assert len(reached) < 20
        page.press(Keys.TAB)
        reached.append(page.focused().get_attribute("id") or page.focused().tag_name)
    assert reached[:6] == ["button", "ratio", "table", "cascade", "depth", "summary"]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid"
    first = page.focused().get_attribute("data-id")
    page.press(Keys.ARROW_DOWN)
    second = page.focused().get_attribute("data-id")
    assert [first, second] == page.ids("first")[:2]
    page.press(Keys.ENTER)
    assert page.one("#passage-id").text == second
    assert second in page.ids("first")
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.one("#passage").is_displayed())
    assert page.focused().get_attribute("data-id") == second


def test_texts_are_shown_as_they_are(page):
    page.search("token bold end")
    page.one("#more").click()
    assert page.browser.title == "kalm explore"
    assert not page.one("#lists img") and not page.one("#lists b")
    for text in (HOSTILE, ARABIC):
        button = page.one(f"#first [data-id=p{TEXTS.index(text)}] .text")
        assert button.get_attribute("textContent") == text
    assert page.run("return getComputedStyle(arguments[0]).direction", button) == "rtl"
    page.run("arguments[0].click()", page.one(f"#first [data-id=p{len(TEXTS) - 1}]"))
    page.until(lambda: page.one("#passage-text").text.endswith("its very end"))
    assert page.texts("#passage-text mark")[-1] == "end"


def test_a_phone_shows_one_list_and_nothing_sticks_out(page):
    set_viewport(page.browser, *PHONE)
    page.search("token bold end")
    page.one("#more").click()
    width = "return document.documentElement.scrollWidth"
    for choice, shown in (("first", "#first"), ("reranked", "#second"), ("fused", "#second")):
        page.one(f"input[value={choice}]").find_element(By.XPATH, "..").click()
        page.settle()
        assert page.run(width) == PHONE[0]
        assert page.one(shown).is_displayed()
        assert page.one("#first").is_displayed() != page.one("#second").is_displayed()
    page.one("#second .result").click()
    box = page.one("#passage").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]
    assert page.run(width) == PHONE[0]


CONTRAST = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const painted = (n) => getComputedStyle(n).backgroundColor;
const behind = (n) => painted(n).endsWith(", 0)") ? behind(n.parentElement) : painted(n);
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
for (let t; t = texts.nextNode();) {
  const n = t.parentElement;
  if (!t.data.trim() || !n.checkVisibility() || n.closest("select, noscript")) continue;
  const [a, b] = [light(getComputedStyle(n).color), light(behind(n))].sort();
  if ((b + 0.05) / (a + 0.05) < 4.5) low.push([t.data, n.className, (b + 0.05) / (a + 0.05)]);
}
return low;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_contrast(page, dark):
    set_viewport(page.browser, *WIDE, dark=dark)
    page.search()
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, colour[4:-1].split(","))) < 64) == dark
    assert page.run(CONTRAST) == []


def test_what_is_refused_is_said(page):
    page.search("zyzzyva")
    assert "No stored passage holds" in page.one("#first").text
    page.load("#q=token&c=2%3A5%2C8&k=9999")
    page.until(lambda: page.one("#problem").is_displayed())
    assert "must go from coarse to fine" in page.one("#problem").text
    assert all("422" in message for message in console_errors(page.browser))
    Select(page.one("#cascade")).select_by_value("")
    page.settle()
    assert not page.one("#problem").is_displayed()
    assert "k=1000" in page.browser.current_url


@contextlib.contextmanager
def in_this_process(table, key):
    """The same application, without the start of another process; yields its address."""
    app = create_app(Settings(str(table), keys={key: None}), Explorer(open_tables([str(table)])))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and app.state.live.current)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_key_is_asked_for_and_kept_for_the_tab(tables, chromium):
    with in_this_process(tables[0], "s3cret") as address:
        page = Page(chromium, address)
        for key, refused in (("wrong", False), ("s3cret", True)):
            page.until(lambda: page.one("#locked").is_displayed())
            assert page.one("#refused").is_displayed() == refused
            page.one("#key").send_keys(key, Keys.ENTER)
            page.until(lambda: not page.run("return document.querySelector('#key').value"))
        page.until(lambda: page.one("#table option"))
        assert not page.one("#locked").is_displayed()
        page.search()
        assert len(page.ids()) == 10
        assert page.run("return localStorage.length") == 0
    console_errors(chromium)  # Chromium logs every 401 as an error
