"""A real headless Chromium for tests of pages.

`chromium` is a fixture: import it into a test module, `from tests.support.browser import chromium`.
"""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.support import programs

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser with a profile of its own; its console is kept for `console_errors`."""
    programs.require("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def set_viewport(browser, width, height, *, dark=False):
    """Give the page exactly this many CSS pixels (a window would be no narrower than 500)."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def console_errors(browser):
    """Errors and warnings the console got since the last call."""
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
