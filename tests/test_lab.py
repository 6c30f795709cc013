"""At the desk, in a real browser: what is run by hand, cell by cell, leaves the same record as a headless run."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest
from tornado.web import HTTPError

from runbook.archive import Run
from runbook.audit import audit
from runbook.desk import Files, outcome
from tests.browser import chromium, keep
from tests.test_archive import executed
from tests.walk import CLINIC_FILE, EVERY, FORWARD, notebook

PATIENCE_MS = 120_000
SCREENSHOTS = "screenshots"
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"  # the notebook that is on top


@contextmanager
def lab(runs: Path, *options: str) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """`runbook lab` as a user starts it: its address, the run's folder, the process; ended as Ctrl-C twice does."""
    program = shutil.which("runbook", path=Path(sys.executable).parent) or "runbook"
    words = [program, "lab", "--no-browser", "--out", str(runs), *options]
    said = runs.with_name("said.txt")
    with said.open("w") as output:  # no pipe: nobody would read on, and a full one stops the server
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        address = until(
            lambda: re.search(r"http://127\.0\.0\.1:\d+/lab\S*\?token=\S+", said.read_text()) or process.poll() is not None
        )
        assert isinstance(address, re.Match), f"no address was printed:\n{said.read_text()}"
        (folder,) = (entry for entry in runs.iterdir() if entry.is_dir())
        yield address[0], folder, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def until(what: Callable[[], Any], seconds: float = PATIENCE_MS / 1000) -> Any:
    """Waits for something that comes by itself."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.2)
    return found


def menu(page: Any, *words: str) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{words[0]}$")).click()
    page.locator(".lm-Menu-item", has=page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{words[1]}"))).first.click()


def step(folder: Path, name: str) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return next((each for each in manifest["steps"] if each["notebook"] == f"{name}.ipynb"), {"state": ""})


def run_all(page: Any) -> None:
    """By the menu; again where JupyterLab was not ready for it yet."""
    kernel = page.locator("#jp-main-statusbar", has_text=re.compile(r"\| Idle"))
    kernel.wait_for(timeout=PATIENCE_MS)
    begun = page.locator(f"{PANEL} .jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]"))
    before = begun.all_inner_texts()
    for _ in range(10):
        menu(page, "Run", "Run All Cells")
        for _ in range(20):
            if begun.all_inner_texts() != before:
                return
            page.wait_for_timeout(100)
    raise AssertionError("the cells did not begin to run")


def overwrite(dialog: Any) -> None:
    dialog.get_by_role("button", name="Overwrite").click()


def finished(page: Any) -> None:
    """Waits until no cell waits or runs any more."""
    page.locator("#jp-main-statusbar", has_text=re.compile(r"\| Idle")).wait_for(timeout=PATIENCE_MS)
    until(lambda: not page.locator(f"{PANEL} .jp-InputPrompt", has_text="[*]").count())


def follow(page: Any, name: str) -> None:
    """Opens a notebook by the link in the one that is open."""
    first = page.locator(f"{PANEL} .jp-Notebook .jp-Cell").first
    first.scroll_into_view_if_needed()
    page.locator(f'{PANEL} a[href*="{name}.ipynb"]').first.click()
    page.locator(f'.lm-TabBar-tab.lm-mod-current[title*="{name}.ipynb"]').wait_for(timeout=PATIENCE_MS)


@pytest.mark.long
@pytest.mark.browser
def test_an_engineer_works_through_the_notebooks_in_jupyterlab(clinic: str, tmp_path: Path, pictures: Path | None) -> None:
    """Opens each by the link in the one before, runs it, sees what a person sees; interrupts one and goes on."""
    runs, shots = tmp_path / "runs", tmp_path / SCREENSHOTS
    seen: dict[str, set[str]] = {}
    names = (*FORWARD, "08_monitor", "20_add_partitions")
    options = ["-f", CLINIC_FILE, "--database", clinic, "-p", "approved_by", "ann", "-p", "add", '{"users_nurses": ["nurse"]}']
    with lab(runs, *options) as (address, folder, _), chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=PATIENCE_MS)
        # JupyterLab's own question, where Ctrl-S falls into the moment after the autosave in which it has not asked for the new hash
        page.add_locator_handler(page.get_by_role("dialog", name="File Changed"), overwrite)
        in_front = page.locator(f"{PANEL} .jp-WindowedPanel-outer")
        for name in names:
            if name != names[0]:
                follow(page, name)
            if name == "03_restore":
                interrupt_and_look(page, clinic, folder)
                if pictures:
                    page.set_viewport_size({"width": 1100, "height": 760})
                    bring(page, "Interrupted.")
                    keep(page, pictures / "jupyterlab.png")
                    page.set_viewport_size({"width": 1400, "height": 1000})
            run_all(page)
            finished(page)
            menu(page, "File", "Save Notebook")  # it saves by itself, but rarely where saving takes long
            until(lambda name=name: in_front.hover() or step(folder, name)["state"] == "completed")  # type: ignore[misc]
            shots.mkdir(exist_ok=True)
            page.screenshot(path=shots / f"{name}.png")
            seen[name] = shown(page)
        assert audit(runs) == [], "the record is true while the work goes on"
    assert all("table" in seen[name] for name in names)
    charts = ("00_plan", "03_restore", "05_cutover", "06_verify", "08_monitor")
    assert [name for name in names if "chart" in seen[name]] == list(charts)
    assert "bar" in seen["03_restore"] & seen["04_foreign_keys"]
    assert all("next" in seen[name] for name in names)
    assert [url for url in elsewhere if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))] == []

    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["state"], manifest["sealed"], manifest["by_hand"]) == ("completed", True, True)
    assert [each["notebook"] for each in manifest["steps"]] == [f"{name}.ipynb" for name in names]
    assert all(each["seconds"] > 0 for each in manifest["steps"])
    begun = [each["begun"] for each in manifest["steps"]]
    assert begun == sorted(begun) and manifest["begun"] < begun[0] and begun[-1] < manifest["ended"]
    restored = manifest["steps"][names.index("03_restore")]
    assert [each["error_name"] for each in restored["earlier"]] == ["KeyboardInterrupt"], "what was interrupted stays on record"
    assert manifest["plan_hash"] and manifest["server"] and manifest["approved_by"] == "ann"
    for name in names:
        assert {f"{name}.ipynb", f"{name}.html", f"{name}.statements.jsonl"} <= manifest["files"].keys()
    assert audit(runs) == []
    with psycopg.connect(clinic) as connection:
        (head,) = connection.execute("SELECT head FROM runbook.record").fetchone() or ("",)
        assert audit(runs, [head]) == []
    for name in EVERY:  # what is stored stays as it was
        stored = nbformat.read(notebook(name), as_version=4)
        assert not any(cell.outputs for cell in stored.cells if cell.cell_type == "code")


def test_what_is_renamed_or_deleted_at_the_desk_is_no_alarm_and_what_was_run_stays(tmp_path: Path) -> None:
    record = Run.begin(tmp_path / "runs", "users", {}, by_hand=True)
    for name in ("03_restore.ipynb", "copy.ipynb", "other.ipynb"):
        shutil.copy(notebook("03_restore"), record.folder / name)
    record.keep(*record.folder.glob("*.ipynb"))
    record.add(executed(record.start("03_restore.ipynb")))
    files = Files(root_dir=str(record.folder))
    files.record = record

    async def at_the_desk() -> None:
        await files.rename_file("copy.ipynb", "mine.ipynb")
        await files.delete_file("other.ipynb")
        for refused in (
            files.rename_file("03_restore.ipynb", "x.ipynb"), files.delete_file("/03_restore.html"), files.delete_file("manifest.json")
        ):  # fmt: skip
            with pytest.raises(HTTPError, match="is a part of the record"):
                await refused
        with pytest.raises(HTTPError, match="has no folders of its own"):
            await files.save({"type": "directory"}, "Untitled Folder")

    asyncio.run(at_the_desk())
    assert {"mine.ipynb", "03_restore.ipynb"} <= record.manifest["files"].keys()
    record.seal(result="worked through by hand")
    assert audit(tmp_path / "runs") == []


def test_a_save_under_way_does_not_look_like_a_change_by_somebody_else(tmp_path: Path) -> None:
    """JupyterLab asks for the file's hash before it saves: during another save, as with Ctrl-S beside the autosave, it is told
    the one from before, which it expects."""
    written, at_once = asyncio.Event(), [0]

    class Slow(Files):
        async def _save_file(self, *words: Any) -> None:
            at_once.append(at_once[-1] + 1)
            await super()._save_file(*words)  # type: ignore[no-untyped-call]
            written.set()
            await asyncio.sleep(0.5)
            at_once.append(at_once[-1] - 1)

    async def asked(files: Files) -> list[str]:
        async def digest() -> str:
            return str((await files.get("/a.txt", content=False, require_hash=True))["hash"])

        def save(text: str) -> asyncio.Task[Any]:
            return asyncio.create_task(files.save({"type": "file", "format": "text", "content": text}, "a.txt"))

        before, saving, another = await digest(), save("b"), save("c")
        await written.wait()
        during = await digest()
        assert not saving.done()
        await asyncio.gather(saving, another)
        return [before, during, await digest()]

    (tmp_path / "a.txt").touch()
    before, during, after = asyncio.run(asked(Slow(root_dir=str(tmp_path))))
    assert before == during != after
    assert (tmp_path / "a.txt").read_text() == "c"
    assert max(at_once) == 1


def interrupt_and_look(page: Any, clinic: str, folder: Path) -> None:
    """Somebody is in the way in the middle of the copy: 03 says who; the engineer interrupts it; the record says so."""
    with psycopg.connect(clinic, application_name="somebody else") as holder:
        holder.execute("LOCK runbook.copied_range IN SHARE MODE")
        run_all(page)
        until(lambda: waits(clinic))
        pid = holder.info.backend_pid
        until(lambda: f"waiting for pid {pid}" in (folder / "03_restore.ipynb").read_text())
        page.locator(f'{PANEL} [data-command="notebook:interrupt-kernel"]').first.click()
        until(lambda: step(folder, "03_restore")["state"] == "failed")
    said = step(folder, "03_restore")
    assert said["error_name"] == "KeyboardInterrupt"
    text = (folder / "03_restore.ipynb").read_text()
    assert f"waiting for pid {pid} (postgres, somebody else, idle in transaction" in text
    assert "Interrupted. The statement that ran was cancelled." in text
    assert "<details><summary>Traceback</summary>" in text
    until(lambda: not waits(clinic))  # the statement was cancelled too


def waits(clinic: str) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'runbook%' AND wait_event_type = 'Lock'"
    with psycopg.connect(clinic) as connection:
        return bool(connection.execute(query).fetchone() != (0,))


def bring(page: Any, text: str) -> None:
    """Scrolls to the output that says so: JupyterLab keeps only what is near the window."""
    output = page.locator(f"{PANEL} .jp-OutputArea-output", has_text=text).first
    page.locator(f"{PANEL} .jp-WindowedPanel-outer").hover()
    page.mouse.wheel(0, -50_000)
    for _ in range(100):
        page.wait_for_timeout(100)
        if output.count():
            output.scroll_into_view_if_needed()
            page.mouse.wheel(0, 60)
            page.wait_for_timeout(500)
            return
        page.mouse.wheel(0, 200)
    raise AssertionError(f"nothing says {text}")


def shown(page: Any) -> set[str]:
    """What kinds of output the notebook shows, as one scrolls through it."""
    panel = page.locator(PANEL)
    found, kinds = set(), {"table": "table", "chart": 'img[src^="data:image/png"]', "next": 'strong:has-text("Undo now")'}
    kinds["bar"] = r'pre:text-matches("100%\|.*(rows|blocks)/s")'
    panel.locator(".jp-WindowedPanel-outer").hover()
    for _ in range(40):
        found |= {kind for kind, selector in kinds.items() if panel.locator(f".jp-OutputArea-output {selector}").count()}
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(40)
    return found


@pytest.mark.parametrize(
    ("counts", "errors", "state"),
    [
        ([None, None, None], [], None),
        ([1, 2, 3], [], "completed"),
        ([1, 2, None], [], "unfinished"),
        ([3, 1, 2], [], "unfinished"),
        ([1, 2, 3], [1], "failed"),
        ([1, 2, None], [1], "failed"),
        ([1, 5, 9], [], "completed"),
    ],
)
def test_what_was_done_by_hand_is_not_called_completed_before_it_is(
    counts: list[Any], errors: list[int], state: str | None
) -> None:
    bad = {"output_type": "error", "ename": "NotEqual", "evalue": "3 rows differ.", "traceback": []}
    cells = [
        {
            "cell_type": "code",
            "id": str(at),
            "metadata": {},
            "source": "x",
            "execution_count": count,
            "outputs": [bad] if at in errors else [],
        }
        for at, count in enumerate(counts)
    ]
    assert outcome({"cells": cells})[1].get("state") == state
