"""Chromium as the tests drive it: the system's own, headless, without a word to anybody but the page under test."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

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


def keep(page: Any, file: Path) -> None:
    """What the window shows, as a picture for the README: few colours, so that it is small."""
    file.parent.mkdir(exist_ok=True)
    shown = Image.open(io.BytesIO(page.screenshot()))
    shown.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
