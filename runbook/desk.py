"""The desk: JupyterLab on a run's own copy of the notebooks; every save is redacted first, and kept as a record after."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyterlab.labapp import LabApp
from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook
from tornado.web import HTTPError
from traitlets.config import Config

from runbook.archive import Run
from runbook.engine import Executed
from runbook.kernel import interpreter, shown
from runbook.pages import render_html
from runbook.redaction import redacted
from runbook.statements import folder

SETTINGS = {
    # What happened in a cell is in the record once it is saved, with the cell's times.
    "@jupyterlab/docmanager-extension:plugin": {"autosaveInterval": 10},
    "@jupyterlab/notebook-extension:tracker": {"recordTiming": True},
    # Nothing is fetched from elsewhere.
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


class Interpreter(KernelSpecManager):
    """python3 is this interpreter, whichever kernels the user has installed under that name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return interpreter(kernel_name) or super().get_kernel_spec(kernel_name)


class Files(AsyncLargeFileManager):
    """During a save, others are told the file's hash and time from before it.

    JupyterLab asks for both before it saves, and what it did not expect is a change by somebody else to it: also its own save
    that has not ended yet, as the autosave beside Ctrl-S. Between the end of a save and its own next question JupyterLab may
    still see its own change as another's: nothing tells here who asks, and two windows must not overwrite one another unasked.
    """

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.record: Run | None = None
        self.alone = threading.Lock()  # with the record's manifest
        self._one_by_one = asyncio.Lock()
        self._under_way: tuple[str, asyncio.Task[Any] | None, Any] = "", None, None  # path, who saves it, what it was

    def _apart(self, path: str) -> str:
        """The name of a file on which the record does not rest; HTTPError for one that it does rest on."""
        name = path.strip("/")
        steps = self.record.manifest["steps"] if self.record else []
        if name == "manifest.json" or any(Path(step["notebook"]).stem == name.split(".")[0] for step in steps):
            raise HTTPError(
                409, f"{name} is a part of the record, as what was run is: it stays as it is called. A duplicate can go."
            )
        return name

    async def rename_file(self, old_path: str, new_path: str) -> None:
        old = self._apart(old_path)
        await super().rename_file(old_path, new_path)  # type: ignore[no-untyped-call]
        self._kept(old, new_path.strip("/"))

    async def delete_file(self, path: str) -> None:
        name = self._apart(path)
        await super().delete_file(path)  # type: ignore[no-untyped-call]
        self._kept(name)

    def _kept(self, gone: str, *there: str) -> None:
        with self.alone:
            if self.record and self.record.manifest["files"].pop(gone, None):
                self.record.keep(*(self.record.folder / name for name in there))

    async def save(self, model: dict[str, Any], path: str = "") -> Any:
        if model.get("type") == "directory":
            raise HTTPError(
                409, "The folder of a record has no folders of its own: what is kept in it lies beside its notebooks."
            )
        async with self._one_by_one:
            before = await self.get(path, content=False, require_hash=True) if await self.file_exists(path) else None
            self._under_way = path.strip("/"), asyncio.current_task(), before
            try:
                return await super().save(model, path)  # type: ignore[no-untyped-call]
            finally:
                self._under_way = "", None, None

    async def get(self, path: str, content: bool = True, **options: Any) -> Any:  # type: ignore[override]
        now = await super().get(path, content=content, **options)  # type: ignore[no-untyped-call]
        name, saver, before = self._under_way
        by_another = name == path.strip("/") and saver is not asyncio.current_task()
        return before if before and by_another and not content else now


def lay(record: Run, own: Callable[[str], Mapping[str, Any]]) -> None:
    """Copies the notebooks into the run's folder, each with its own parameters filled in."""
    for path in sorted(folder("notebooks").glob("*.ipynb")):
        notebook, given = load_notebook_node(str(path)), redacted(own(path.stem), record.secrets)
        write_ipynb(parameterize_notebook(notebook, given) if given else notebook, str(record.folder / path.name))
    record.keep(*record.folder.glob("*.ipynb"))


def serve(record: Run, *, browser: bool = True) -> None:
    """JupyterLab on the run's folder until it is told to end (Ctrl-C twice, SIGTERM, SIGHUP, or its own menu)."""
    with tempfile.TemporaryDirectory(prefix="runbook-lab-") as beside:
        settings = Path(beside, "labconfig", "default_setting_overrides.json")
        settings.parent.mkdir()
        settings.write_text(json.dumps(SETTINGS))
        path = [beside, *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
        os.environ |= {"JUPYTER_CONFIG_PATH": os.pathsep.join(path), "RUNBOOK_RECORD": str(record.folder.resolve())}
        os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        options = {
            "ServerApp.root_dir": record.folder.resolve(),
            "MappingKernelManager.root_dir": Path.cwd(),  # a kernel works where `runbook run` would
            "FileCheckpoints.checkpoint_dir": f"{beside}/checkpoints",
            "LabApp.workspaces_dir": f"{beside}/workspaces",
            "LabApp.default_url": "/lab/tree/00_plan.ipynb",
            "ServerApp.open_browser": browser,
            "ServerApp.allow_root": os.name == "posix" and os.geteuid() == 0,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        own = {"kernel_spec_manager_class": Interpreter, "contents_manager_class": Files}
        app = LabApp.initialize_server(argv=words, config=Config(ServerApp=own))
        with ThreadPoolExecutor(1) as beside_it:  # what it has begun is done before the record is sealed
            _watch(app, record, beside_it)
            if hasattr(signal, "SIGHUP"):  # a terminal that is closed ends the run; it does not break it off
                signal.signal(signal.SIGHUP, lambda *_: app.stop(from_signal=True))
            app.start()
            _end(asyncio.get_event_loop())


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Requests that were under way are cancelled: a thread that still worked for one would keep the process for ever."""
    under_way = asyncio.all_tasks(loop)
    for task in under_way:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*under_way, return_exceptions=True))


def _watch(app: Any, record: Run, pool: ThreadPoolExecutor) -> None:
    """Nothing reaches the folder but through these two hooks: whatever is saved is without secrets, and in the manifest.

    The HTML is made in `pool`: a save does not wait for it.
    """
    alone, saves = app.contents_manager.alone, Counter[str]()

    def before(model: dict[str, Any], path: str, **_: Any) -> None:
        try:
            if model["type"] == "notebook":
                name = path.strip("/")
                model["content"] = redacted(_settled(model["content"]), record.secrets)
                said = outcome(model["content"])[1]
                model["content"]["metadata"]["runbook"] = redacted(said, record.secrets)
                with alone:
                    saves[name] += 1
                    if said and "/" not in name:
                        record.start(name, begun(model["content"]))
            elif model.get("format") == "text":
                model["content"] = redacted(model["content"], record.secrets)
        except Exception as error:  # Jupyter would log any other, and save what was not redacted
            raise HTTPError(500, f"{path} is not saved, because its secrets could not be taken out: {error!r}.") from error

    def after(os_path: str, model: dict[str, Any], **_: Any) -> None:
        path = Path(os_path)
        if path.is_dir():
            return
        kept = model["type"] == "notebook" and path.parent == record.folder.resolve()
        seconds, said = outcome(json.loads(path.read_text(encoding="utf-8"))) if kept else (0.0, {})
        if said:
            done = Executed(path, seconds, said.get("cell"), said.get("error", ""), said.get("error_name", ""))
            pool.submit(show, done, said["state"], saves[path.name])
            return
        with alone:  # opened, and nothing was run in it; or no notebook of ours
            record.keep(path)

    def show(done: Executed, state: str, save: int) -> None:
        try:
            if saves[done.notebook.name] == save:
                render_html(done.notebook)
            with alone:
                if saves[done.notebook.name] == save:  # else the next one's turn has come
                    record.add(done, state=state, rendered=True)
        except Exception:
            app.log.exception(f"{done.notebook} was saved, but its HTML could not be written.")

    app.contents_manager.record = record
    app.contents_manager.register_pre_save_hook(before)
    app.contents_manager.register_post_save_hook(after)


def outcome(content: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """How long a notebook's cells took, and what became of it in the engine's words; nothing when no cell was run.

    Failed is one that shows an error, completed one whose every code cell ran after the cell above it.
    """
    cells = [(at, cell) for at, cell in enumerate(content["cells"]) if cell["cell_type"] == "code"]
    code = [(at, cell) for at, cell in cells if "".join(cell["source"]).strip()]
    seconds, counts = sum(_seconds(cell) for _, cell in code), [cell["execution_count"] or 0 for _, cell in code]
    for at, cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                said = {"cell": at, "error_name": output["ename"], "error": output["evalue"] or output["ename"]}
                return seconds, {"state": "failed", **said, "cell_id": cell.get("id", "")}
    if not any(counts):
        return seconds, {}
    return seconds, {"state": "completed" if all(counts) and counts == sorted(counts) else "unfinished"}


def begun(content: dict[str, Any]) -> str:
    """When the first of the cells began whose outputs it shows: of those that were run again, the last time."""
    times = [cell["metadata"].get("execution", {}).get("iopub.execute_input") for cell in content["cells"]]
    return min(
        (datetime.fromisoformat(time).astimezone(UTC).isoformat(timespec="milliseconds") for time in times if time), default=""
    )


def _seconds(cell: dict[str, Any]) -> float:
    times = cell["metadata"].get("execution", {})
    with suppress(KeyError, ValueError):
        begun, ended = times["iopub.execute_input"], times["shell.execute_reply"]
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()
    return 0.0


def _settled(content: dict[str, Any]) -> dict[str, Any]:
    """Of lines that overwrite themselves (progress bars) only what stands in the end."""
    for cell in content["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                output["text"] = shown("".join(output["text"]))
    return content
