"""A real browser for tests of pages: headless Chromium, where it and selenium are installed."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,800"
)


class Browser:
    """Chromium with a page open; `log` is what the console said since the page was opened."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())

    def run(self, script: str, *values: object) -> Any:
        """Run JavaScript in the page; `return` gives its result."""
        return self.driver.execute_script(script, *values)

    def wait_for(self, script: str, *values: object, seconds: float = 20) -> Any:
        """Return the result of a script as soon as it is not null; a page draws after it was opened."""
        end = time.monotonic() + seconds
        while (result := self.run(script, *values)) is None and time.monotonic() < end:
            time.sleep(0.05)
        return result

    def text(self, selector: str) -> str:
        return str(
            self.wait_for("return document.querySelector(arguments[0])?.textContent ?? null", selector)
        )

    def find(self, words: str) -> None:
        """Type words into the search and press Enter."""
        from selenium.webdriver.common.keys import Keys

        field = self.driver.find_element("id", "search")
        field.clear()
        field.send_keys(words, Keys.ENTER)

    def require_quiet(self) -> None:
        """Fail where the console said anything, or the page asked for a file."""
        assert self.driver.get_log("browser") == []
        assert self.run("return performance.getEntriesByType('resource').length") == 0

    def colours(self, path: Path) -> int:
        """Return how many colours a screenshot has: a blank one has few."""
        import numpy as np
        from matplotlib.image import imread

        self.driver.save_screenshot(str(path))
        return len(np.unique((imread(path)[..., :3] * 255).astype(np.int32) @ np.array([65536, 256, 1])))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    """Chromium, driven by selenium; a test is skipped where one of them is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[dev]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    helper = shutil.which("chromedriver")
    if program is None or helper is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in (*ARGUMENTS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(helper))
    yield Browser(driver)
    driver.quit()
