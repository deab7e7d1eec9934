"""A headless Chromium, and pages in it of which everything that goes wrong is noted."""

import contextlib
import functools
import shutil

import pytest


@functools.cache
def browser():
    """A headless Chromium, or a skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to test with")
    started = sync_api.sync_playwright().start()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        return started.chromium.launch(executable_path=found, args=["--no-sandbox"])
    except sync_api.Error as error:
        started.stop()
        pytest.skip(f"there is no browser to test with: {str(error).splitlines()[0]}")


@contextlib.contextmanager
def visited(path, width=1000, height=800, scheme="light"):
    """A page of its own file, open; at the end nothing in it may have gone wrong or been asked for from elsewhere."""
    page, wrong = browser().new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
    url = path.as_uri()
    own = "Multiple readback operations"  # a test looks at canvases more often than the page does

    def heard(message):
        if message.type in ("error", "warning") and own not in message.text:
            wrong.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith((url, "data:")) else None)
    page.set_default_timeout(120_000)
    try:
        page.goto(url)
        yield page
        assert wrong == []
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{overflow} pixels stick out to the right"
    finally:
        page.close()
