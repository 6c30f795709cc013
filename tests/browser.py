"""Chromium as the tests drive it: the system's own, headless, without a word to anybody but the page under test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server",
]  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's; needs the program `chromium`."""
    from playwright.sync_api import sync_playwright  # tests without the mark do without it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
