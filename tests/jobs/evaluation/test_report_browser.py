"""The report in a real Chromium: both widths, both colour schemes, keyboard only, hostile texts."""

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from jobs.evaluation.report import write_report
from tests.jobs.evaluation.test_report import EVIL, hostile
from tests.support.browser import chromium, set_viewport
from tests.support.evaluations import synthetic_evaluation

WIDTHS = {"desktop": 1280, "phone": 390}
__all__ = ["chromium"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(synthetic_evaluation(), file)
    return file.as_uri()


def show(browser, address, width, *, dark=False):
    set_viewport(browser, width, 900, dark=dark)
    browser.get(address)


def press(browser, key):
    webdriver.ActionChains(browser).send_keys(key).perform()


def tab_to(browser, wanted):
    """Press Tab until the element has the focus."""
    for _ in range(60):
        press(browser, Keys.TAB)
        if browser.switch_to.active_element == wanted:
            return
    raise AssertionError(f"Tab never reaches {wanted.text!r}")


def first_column(browser):
    table = browser.find_element(By.CSS_SELECTOR, "table")
    return [name.text for name in table.find_elements(By.CSS_SELECTOR, "tbody th bdi")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_overflows_and_the_console_is_silent(chromium, report, width, dark):
    show(chromium, report, width, dark=dark)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.execute_script("return innerWidth") == width
    assert chromium.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    outside = chromium.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    assert outside == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    paper = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(21, 23, 27)") is dark
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_each_width_shows_its_own_figures_large_enough_to_read(chromium, report, width):
    show(chromium, report, width)
    sizes = chromium.execute_script(
        "return [...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
        ".map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert len(sizes) == 2 + 9 + 1
    assert all(0.95 <= scale <= 1.001 for scale in sizes)


def test_names_in_a_figure_do_not_cover_each_other(chromium, report):
    for width in WIDTHS.values():
        show(chromium, report, width)
        covered = chromium.execute_script(
            """
            const pairs = [];
            for (const svg of document.querySelectorAll('figure svg')) {
              if (!svg.checkVisibility()) continue;
              const boxes = [...svg.querySelectorAll('text')].map(t => {
                const b = t.getBoundingClientRect();
                return [b.left, b.top + b.height / 5, b.right, b.bottom - b.height / 5, t];
              });
              boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
                if (a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3])
                  pairs.push(a[4].textContent + ' / ' + b[4].textContent);
              }));
            }
            return pairs;
            """
        )
        assert covered == []


def test_a_table_is_sorted_with_the_keyboard(chromium, report):
    show(chromium, report, 1280)
    given = first_column(chromium)
    assert given[:3] == ["bm25", "r1", "r4"]
    header = chromium.find_element(By.XPATH, "//table[1]//th[normalize-space()='p']")
    button = header.find_element(By.TAG_NAME, "button")
    tab_to(chromium, button)
    assert button.value_of_css_property("outline-style") == "solid"
    press(chromium, Keys.ENTER)
    assert header.get_attribute("aria-sort") == "descending"
    falling = first_column(chromium)
    press(chromium, Keys.SPACE)
    assert header.get_attribute("aria-sort") == "ascending"
    rising = first_column(chromium)
    assert sorted(falling) == sorted(rising) == sorted(given)
    cells = chromium.find_elements(By.CSS_SELECTOR, "td:nth-child(5)[data-value]")
    values = [float(cell.get_attribute("data-value")) for cell in cells[: len(given) - 1]]
    assert values == sorted(values)
    assert rising[-1] == falling[-1] == "bm25"  # it has no p: last in either order
    assert chromium.get_log("browser") == []


def test_names_are_sorted_as_people_count(chromium, report):
    show(chromium, report, 1280)
    chromium.find_element(By.CSS_SELECTOR, "table th button").click()
    names = first_column(chromium)
    assert names.index("r4") < names.index("r16") < names.index("r64")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_examples_and_queries_open_with_the_keyboard(chromium, report, width):
    show(chromium, report, width)
    closed = chromium.find_elements(By.CSS_SELECTOR, "details:not([open])")
    assert len(closed) == 6  # all metrics, two more examples each side, all queries
    for details in (closed[1], closed[-1]):
        tab_to(chromium, details.find_element(By.TAG_NAME, "summary"))
        press(chromium, Keys.ENTER)
        assert details.get_attribute("open")
        inside = details.find_element(By.CSS_SELECTOR, "ol, table")
        assert inside.is_displayed()
    assert chromium.get_log("browser") == []


def test_wide_tables_scroll_with_the_keyboard_inside_their_own_box(chromium, report):
    show(chromium, report, 390)
    box = chromium.find_element(By.CSS_SELECTOR, ".scroll")
    tab_to(chromium, box)
    for _ in range(3):
        press(chromium, Keys.ARROW_RIGHT)
    chromium.execute_async_script("setTimeout(arguments[0], 400)")
    assert box.get_property("scrollLeft") > 0
    assert chromium.execute_script("return scrollX") == 0


def test_hostile_texts_run_nothing_and_are_read_as_text(chromium, tmp_path):
    write_report(hostile(), tmp_path / "report.html")
    show(chromium, (tmp_path / "report.html").as_uri(), 390)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.execute_script("return document.images.length") == 0
    assert chromium.execute_script("return document.scripts.length") == 1
    assert EVIL in chromium.find_element(By.CSS_SELECTOR, ".ranking .text").text
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
    assert chromium.get_log("browser") == []
