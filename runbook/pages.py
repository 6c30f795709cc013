"""The record as pages that open in ten years: no network, no script, pictures inside."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat

from runbook.archive import in_progress, manifests, write_whole

TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}{% block jupyter_widgets %}{% endblock %}
{% block html_head_css %}<style>
 :root { --jp-mirror-editor-comment-color: #2f6b6b; --jp-mirror-editor-number-color: #006600;
  --jp-mirror-editor-operator-color: #8a10d8 }
 .jp-OutputArea-output { overflow-x: auto }
 @media screen { /* a shadow where a table goes on beyond the edge */
  .jp-OutputArea-output { background: linear-gradient(90deg, #fff 30%, #fff0), linear-gradient(270deg, #fff 30%, #fff0) 100% 0,
    linear-gradient(90deg, #0004, #0000), linear-gradient(270deg, #0004, #0000) 100% 0; background-repeat: no-repeat;
   background-size: 40px 100%, 40px 100%, 12px 100%, 12px 100%; background-attachment: local, local, scroll, scroll } }
 .jp-OutputArea-output pre, .jp-InputArea-editor .highlight pre {
  white-space: pre-wrap; overflow-wrap: anywhere; word-break: normal }
 .jp-OutputArea-output pre.ruled { white-space: pre } .jp-RenderedHTMLCommon .words { text-align: left !important }
 .jp-RenderedHTMLCommon pre { font-family: monospace } summary { cursor: pointer }
 .jp-RenderedHTMLCommon img, .jp-RenderedImage img { max-width: 100%; height: auto }
 .failed { margin: 1em; padding: 1em; border-left: 6px solid #b00020; background: #fdecee; font: 16px/1.5 sans-serif }
 nav { margin: 1em; font: 16px/1.5 sans-serif } nav a { margin-right: 1em; color: #00459e; text-decoration: underline }
 nav a:not([href]) { display: none }
 .failed a { color: #00459e; text-decoration: underline }
 @media (max-width: 600px) { .jp-InputPrompt, .jp-OutputPrompt { display: none } .jp-Notebook { padding: 4px } }
 @media print { /* paper does not scroll */
  .jp-InputPrompt, .jp-OutputPrompt { display: none } .jp-Notebook { padding: 0 }
  .jp-OutputArea-output, .jp-InputArea-editor { overflow: visible !important; min-width: 0; max-width: 100% }
  .jp-Notebook pre, .jp-OutputArea-output pre.ruled { white-space: pre-wrap !important; overflow-wrap: anywhere }
  .jp-RenderedHTMLCommon td { white-space: normal; min-width: 0; max-width: none !important }
  .jp-RenderedHTMLCommon td.words:not(.time) { overflow-wrap: anywhere }
  .jp-RenderedHTMLCommon td.words:first-child { overflow-wrap: break-word }
  .jp-RenderedHTMLCommon th { overflow-wrap: normal; word-break: normal; hyphens: none }
 }
</style>{% endblock %}
{% block data_png scoped %}{% set alt = output | get_metadata("alt", "image/png") %}{{
 super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ' if alt else "<img ", 1) }}{% endblock %}
{% block body_header %}{{ super() }}<nav><a href="../index.html">All runs</a><a href="certificate.html">Certificate</a></nav>{{ nb.metadata.get("failed_banner", "") }}{% endblock %}"""
ELSEWHERE = "script, link, iframe, object, embed, base, form, meta[http-equiv]"
FETCHING = ("src", "srcset", "poster", "background", "href", "xlink:href", "action", "data")
FETCHED = re.compile(r"@import[^;]*;|url\((?!\s*['\"]?(?:data:|#))[^)]*\)", re.IGNORECASE)

COLUMNS = ("Run", "Table", "Database", "Plan", "Who", "Steps took", "Result", "First that failed", "Record")
INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title><style>
 body {{ font: 16px/1.5 sans-serif; margin: 1.5em; color: #1a1a1a }} table {{ border-collapse: collapse }}
 th, td {{ text-align: left; vertical-align: top; padding: .4em .8em; border-bottom: 1px solid #ccc; overflow-wrap: break-word }}
 td[data-is=Database], td[data-is=Plan] {{ overflow-wrap: anywhere; min-width: 8em }}
 @media screen and (min-width: 701px) {{ td:first-child {{ white-space: nowrap }} }}
 @media print {{ th, td {{ padding: .3em }} td {{ overflow-wrap: anywhere }} }}
 .failed, .broken, .unfinished {{ color: #9b0019; font-weight: bold }} .completed {{ color: #00602b; font-weight: bold }}
 @media (max-width: 700px) {{
  thead {{ display: none }} tr {{ display: block; border: 1px solid #999; margin: 0 0 1em; padding: .3em }}
  td {{ display: block; border: 0; padding: .1em .4em }} td:empty {{ display: none }}
  td::before {{ content: attr(data-is) ": "; color: #555 }}
 }}
</style></head><body><main><h1>Runs</h1>
<table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table>
<p>This page only repeats what the manifests say; <code>runbook audit</code> checks them.</p></main>
</body></html>
"""


def render_html(notebook: Path) -> Path:
    """Writes the notebook's page beside it: without scripts, requests or network, its pictures inside."""
    from bs4 import BeautifulSoup  # takes a while, which a status need not wait for

    content = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    content.metadata["title"] = _title(notebook)
    said = content.metadata.get("runbook", {})
    if said.get("state") == "failed":
        content.metadata["failed_banner"] = (
            f'<div class="failed">Failed: {html.escape(said["error"])} '
            f'<a href="#cell-id={html.escape(said["cell_id"])}">Where it failed</a></div>'
        )
    page = BeautifulSoup(_exporter().from_notebook_node(content, {"metadata": {"name": notebook.stem}})[0], "html.parser")
    for tag in page.select(ELSEWHERE):
        tag.decompose()
    for tag in page.find_all(True):
        for name, value in list(tag.attrs.items()):
            target = " ".join(value) if isinstance(value, list) else str(value).strip()
            link = name == "href" and tag.name in ("a", "area")
            if link and "://" not in target and not target.lower().startswith(("javascript:", "data:")):
                tag[name] = re.sub(r"\.ipynb(?=$|[#?])", ".html", target)
            elif name == "style":
                tag[name] = FETCHED.sub("", target)
            elif name.startswith("on") or (name in FETCHING and not link and not target.startswith(("data:", "#"))):
                del tag[name]  # of a picture from elsewhere the description stays
            elif link and "://" not in target:
                del tag[name]
    for cell in page.select(".jp-RenderedHTMLCommon :is(td, th)"):
        text = cell.get_text(strip=True)
        kind = "number" if re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?|NaN|", text) else "words"
        kind += " time" * bool(re.fullmatch(r"([\d-]{10} )?\d\d:\d\d:\d\d[\d.:+]*", text))
        cell["class"] = " ".join([*filter(None, cell.get_attribute_list("class")), kind])
    for lines in page.select(".jp-RenderedText pre"):
        if "-+-" in lines.get_text():  # a table of psql's
            lines["class"] = "ruled"
    for style in page.find_all("style"):
        style.string = FETCHED.sub("", style.string or "")
    target_file = notebook.with_suffix(".html")
    write_whole(target_file, str(page))
    return target_file


@cache
def _exporter() -> Any:
    """One for all pages: its templates are compiled once."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    return HTMLExporter(extra_loaders=[DictLoader({"record.html.j2": TEMPLATE})], template_file="record.html.j2")  # type: ignore[no-untyped-call]


def _title(notebook: Path) -> str:
    """What a browser's tab and a print's head say: the notebook, and of its run the table and the time."""
    try:
        manifest = json.loads((notebook.parent / "manifest.json").read_text(encoding="utf-8"))
        return f"{notebook.stem}: {manifest['table']}, {_begun(manifest)}"
    except (OSError, ValueError, KeyError):
        return notebook.stem


def _begun(manifest: dict[str, Any]) -> str:
    return f"{manifest.get('begun', '')[:19].replace('T', ' ')} UTC"


def unlinked(folder: Path, coming: str = "") -> dict[Path, str]:
    """The pages with links to notebooks that this run did not come to, and what is to stand there: of these links only the words.

    The page that is `coming` is taken for there."""
    found = {}
    for page in folder.glob("*.html"):
        text = before = page.read_text(encoding="utf-8")
        for name in set(re.findall(r'<a href="([\w.-]+\.html)"', text)):
            if name != coming and not (folder / name).is_file():
                text = text.replace(f'<a href="{name}"', "<a")
        if text != before:
            found[page] = text
    return found


def index(runs: Path) -> Path:
    """Writes runs/index.html: what each run did, who ran it, how long it took, how it ended; the newest first."""
    page = runs / "index.html"
    write_whole(page, listing((manifest, row(folder, manifest)) for folder, manifest, _ in manifests(runs)))
    return page


def listing(rows: Iterable[tuple[dict[str, Any], str]]) -> str:
    """The page, of manifests with what it says of each."""
    found = sorted(rows, key=lambda each: str(each[0].get("begun", "")), reverse=True)
    return INDEX.format(head="".join(f'<th scope="col">{name}</th>' for name in COLUMNS), rows="\n".join(row for _, row in found))


def row(folder: Path, manifest: dict[str, Any]) -> str:
    """What the list of the runs says of one."""
    cells = zip(COLUMNS, _cells(folder, manifest), strict=True)
    return "<tr>" + "".join(f'<td data-is="{name}">{cell}</td>' for name, cell in cells) + "</tr>"


def _cells(folder: Path, manifest: dict[str, Any]) -> list[str]:
    steps = manifest["steps"]
    state = manifest.get("state", "") if manifest["sealed"] or in_progress(folder) else "broken off"
    bad = next((step for step in steps if step["state"] != "completed"), None)
    pages = [(Path(step["notebook"]).with_suffix(".html").name, step["notebook"]) for step in steps]
    links = [(Path(name).stem, page if (folder / page).is_file() else name) for page, name in pages]
    by_hand = " by hand" if manifest.get("by_hand") else ""
    operator = [manifest.get(name, "") for name in ("operator", "database_user")]
    failure = f"{Path(bad['notebook']).stem}: {bad.get('error', '')}" if bad and state != "running" else ""
    result = manifest.get("result", "") if state == "completed" else ""  # else the next column says it
    did = {step["notebook"] for step in steps}
    what = "; the addition" if "20_add_partitions.ipynb" in did else "; its end" if "91_finish.ipynb" in did else ","
    given = str(manifest.get("parameters", {}).get("database", "embedded"))
    plain = (
        _begun(manifest),
        manifest.get("table", ""),
        f"{given}: {where}" if given != "embedded" and (where := manifest.get("target")) else given,
        manifest.get("plan_hash", "")[:12] + (f"{what} approved by {who}" if (who := manifest.get("approved_by")) else ""),
        " as ".join(name for name in operator if name) + f" on {manifest.get('host', '')}{by_hand}",
        f"{sum(step.get('seconds', 0) for step in steps):,.1f} s",
    )
    files = [*links, *((Path(n).stem, n) for n in manifest["files"] if n == "certificate.html"), ("manifest", "manifest.json")]
    return [
        *map(html.escape, plain),
        f'<span class="{state.split()[0]}">{html.escape(state)}</span> {html.escape(result.removeprefix(state))}',
        html.escape(failure.rstrip(": ")),
        ", ".join(f'<a href="{quote(f"{folder.name}/{file}")}">{html.escape(text)}</a>' for text, file in files),
    ]
