"""A page in a real headless Chromium: what it renders, what it complains about, what it asks the network for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Debian's names, then those of others.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_S = 60
# Width and height in pixels of everything that is drawn.
FIGURE_SIZES = """
return [...document.querySelectorAll('figure svg, figure img, .bar i, .numbers b')].map(function (element) {
  var box = element.getBoundingClientRect();
  return [element.outerHTML.slice(0, 80), box.width, box.height];
});
"""


class Page:
    """An open page."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call and lie outside the page, its file and the browser."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return [url for url in found if not url.startswith(("file:", "data:", "chrome:"))]

    def invisible(self) -> list[str]:
        """Figures, bars and numbers without a size."""
        return [text for text, width, height in self.run(FIGURE_SIZES) if width < 1 or height < 1]

    def type(self, selector: str, text: str) -> None:
        """Types into a box as a user does."""
        box = self.driver.find_element("css selector", selector)
        box.clear()
        box.send_keys(text)

    def visible_rows(self, section: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
            ".filter(row => row.offsetParent !== null).map(row => row.textContent)",
            section,
        )


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """Starts a browser with an empty profile in `folder`; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver_path = shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("needs a browser and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        driver.set_page_load_timeout(WAIT_S)
        driver.set_script_timeout(WAIT_S)
        yield Page(driver)
    finally:
        driver.quit()
