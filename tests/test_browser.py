"""The record as a person sees it in ten years: in a browser, without network, on a screen and on a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from click.testing import CliRunner

from runbook import cli
from tests.browser import chromium, keep
from tests.conftest import fresh
from tests.servers import Server
from tests.walk import CLINIC_FILE, FORWARD

pytestmark = [pytest.mark.long, pytest.mark.browser]

# Text that an ancestor cuts off, and texts that lie on each other. What can be scrolled into sight is neither.
FAULTS = """() => {
  const faults = [], boxes = [], view = document.documentElement
  if (view.scrollWidth > window.innerWidth) faults.push(`the page is ${view.scrollWidth} wide in a window of ${window.innerWidth}`)
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node; node = walker.nextNode();) {
    const parent = node.parentElement, style = getComputedStyle(parent)
    if (!node.data.trim() || !parent.checkVisibility({visibilityProperty: true}) || ['STYLE', 'TITLE'].includes(parent.tagName)) continue
    const range = document.createRange()
    range.selectNodeContents(node)
    for (const found of range.getClientRects()) {
      let box = {left: found.left, right: found.right, top: found.top, bottom: found.bottom}
      for (let outer = parent; outer; outer = outer.parentElement) {
        const how = getComputedStyle(outer), edge = outer.getBoundingClientRect()
        if (how.overflowX == 'visible' && how.overflowY == 'visible') continue
        const scrolls = /auto|scroll/.test(how.overflowX + how.overflowY) || outer == document.body || outer == view
        if (!scrolls && (box.left < edge.left - 2 || box.right > edge.right + 2 || box.top < edge.top - 4 || box.bottom > edge.bottom + 4))
          faults.push(`cut off: ${node.data.trim().slice(0, 60)}`)
        box = {left: Math.max(box.left, edge.left), right: Math.min(box.right, edge.right),
               top: Math.max(box.top, edge.top), bottom: Math.min(box.bottom, edge.bottom)}
      }
      if (box.right - box.left > 2 && box.bottom - box.top > 2) boxes.push({...box, text: node.data.trim().slice(0, 40), node})
    }
  }
  boxes.sort((a, b) => a.top - b.top)
  boxes.forEach((a, at) => {
    for (let next = at + 1; next < boxes.length && boxes[next].top < a.bottom - 4; next++) {
      const b = boxes[next]
      if (a.node != b.node && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3 && Math.min(a.bottom, b.bottom) - b.top > 6)
        faults.push(`on each other: "${a.text}" and "${b.text}"`)
    }
  })
  for (const image of document.images)
    if (!image.naturalWidth) faults.push(`a picture is missing: ${image.alt}`)
    else if (!image.alt || image.alt.startsWith('No description')) faults.push('a picture without words')
    else if (image.clientWidth / image.naturalWidth * 8 / 72 * 200 < 7) faults.push(`letters of less than 7 pixels: ${image.alt}`)
  return [...new Set(faults)].slice(0, 20)
}"""


# For the README: of each notebook the window that begins at this heading.
WINDOWS = {"00_plan": "The-values-of-the-key", "05_cutover": "The-swap", "06_verify": "The-partitions", "07_application": "Inserts",
           "08_monitor": "What-is-seen-today", "certificate": "promised"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(server: Server, clinic_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The records of a plan that was refused, and of a whole migration."""
    made = tmp_path_factory.mktemp("browser") / "runs"
    for database in fresh(server, clinic_template):
        given = ["run", "-f", CLINIC_FILE, "--database", database, "--out", str(made)]
        refused = CliRunner().invoke(cli.main, [*given, "-p", "partitions", '{"users_patients": ["user"]}', "--to", "plan"])
        assert refused.exit_code == 1, refused.output
        done = CliRunner().invoke(cli.main, [*given, "-p", "approved_by", "ann"])
        assert done.exit_code == 0, done.output
        watched = CliRunner().invoke(cli.main, ["monitor", *given[1:]])
        assert watched.exit_code == 0, watched.output
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_of_the_record_is_whole_without_network_and_scripts(runs: Path, browser: Any, width: int) -> None:
    pages = [runs / "index.html", *sorted(runs.glob("*/*.html"))]
    assert {page.stem for page in pages} >= {"index", *FORWARD, "certificate"}
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, device_scale_factor=1)
    faults = {}
    for file in pages:
        page, asked = context.new_page(), []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(file.as_uri())
        found = page.evaluate(FAULTS) + [
            f"asks for {url}" for url in asked if url != file.as_uri() and not url.startswith("data:")
        ]
        found += ["has scripts"] if page.evaluate("document.scripts.length") else []
        faults |= {f"{file.parent.name}/{file.name}": found} if found else {}
        page.close()
    context.close()
    assert faults == {}


# Of outputs, tables and code what is wider than the paper or hidden by a box that would scroll; words of a head that are broken.
PRINTED = """() => {
  const faults = [], width = document.documentElement.clientWidth
  for (const each of document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output *, pre, table')) {
    if (!each.checkVisibility()) continue
    const edge = each.getBoundingClientRect(), text = each.textContent.trim().slice(0, 40)
    if (edge.right > width + 1) faults.push(`${Math.round(edge.right)} wide: ${each.tagName} ${text}`)
    if (getComputedStyle(each).overflowX != 'visible' && each.scrollWidth > each.clientWidth) faults.push(`cut off: ${text}`)
  }
  for (const head of document.querySelectorAll('.jp-OutputArea-output th')) {
    const text = head.firstChild, range = document.createRange()
    for (const word of text?.nodeType == Node.TEXT_NODE && head.checkVisibility() ? text.data.matchAll(/[\\p{L}\\d]+/gu) : []) {
      range.setStart(text, word.index)
      range.setEnd(text, word.index + word[0].length)
      if (range.getClientRects().length > 1) faults.push(`broken: ${word[0]}`)
    }
  }
  if ([...document.querySelectorAll('.jp-InputPrompt, .jp-OutputPrompt')].some(each => each.checkVisibility())) faults.push('prompts')
  return [...new Set(faults)].slice(0, 20)
}"""


def test_on_paper_nothing_is_cut_off(runs: Path, browser: Any) -> None:
    page, faults = browser.new_page(viewport={"width": 718, "height": 1000}), {}  # A4 within the browser's margins
    page.emulate_media(media="print")
    for file in [runs / "index.html", *sorted(runs.glob("*/*.html"))]:
        page.goto(file.as_uri())
        found = page.evaluate(PRINTED)
        faults |= {f"{file.parent.name}/{file.name}": found} if found else {}
        if file.name == "certificate.html":
            commands = page.locator("details pre")
            assert commands.count() > 20 and all(each.is_visible() for each in commands.all()), "paper cannot be unfolded"
    page.close()
    assert faults == {}


def test_the_pictures_of_the_readme(runs: Path, browser: Any, pictures: Path | None) -> None:
    """Made anew where `--pictures` says so; the headings that they begin at exist in any case."""
    page = browser.new_page(viewport={"width": 1000, "height": 620})
    for name, heading in WINDOWS.items():
        file = sorted(runs.glob(f"*/{name}.html"))[-1]
        page.goto(file.as_uri())
        assert page.evaluate(
            "id => !id || (e => e && (e.scrollIntoView(), scrollBy(0, -14), true))(document.querySelector(`[id^='${id}']`))",
            heading,
        ), name
        if pictures:
            keep(page, pictures / f"{name}.png")
    page.close()


def test_every_link_of_the_record_leads_somewhere(runs: Path, browser: Any) -> None:
    page = browser.new_page()
    for file in [runs / "index.html", *runs.glob("*/*.html")]:
        page.goto(file.as_uri())
        for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            address = urlparse(link)
            if address.scheme == "file":
                target = Path(unquote(address.path))
                assert target.is_file(), f"{file.name} links to {target.name}"
                if target == file and address.fragment:
                    ids = {address.fragment, unquote(address.fragment)}
                    assert any(page.evaluate("id => !!document.getElementById(id)", each) for each in ids), link
