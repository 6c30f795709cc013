"""Executes a notebook and writes down what really happened, failures too: the Papermill engine `runbook`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from runbook import forked
from runbook.archive import write_whole
from runbook.kernel import Kernel, folded, reason, shown
from runbook.redaction import known_secrets, passwords, redact, redacted_notebook
from runbook.signals import Terminated, ended_by_signals

# Papermill looks RecordEngine up while it is itself being imported by the lines below, before the class can
# exist. For that moment it gets None; the last line of this module registers the class.
__getattr__ = {"RecordEngine": None}.get

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import LocalHandler, papermill_io
from papermill.log import logger

del __getattr__

IPC_PATH_BYTES = 100  # a socket's path has 107; the kernel adds "-5"
SHORT_S = 0.05  # a record that is written within that is written each time
LAST_WORDS_S = 3.0  # how long an interrupted kernel may still say where it stopped


@dataclass(frozen=True)
class Executed:
    """What became of one notebook; `error` is the exception's own sentence, empty when all went well."""

    notebook: Path
    seconds: float
    failed_cell: int | None
    error: str
    error_name: str


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, object],
    *,
    on_output: Callable[[str], None] | None = None,
    secrets: Iterable[str] = (),
    cwd: Path | None = None,
    timeout_s: int | None = None,
) -> Executed:
    """Runs `source` in a fresh kernel of this interpreter and leaves its record in `target`, whatever happens.

    What stops a cell is returned, be it an interrupt or a SIGTERM; before the first cell and after the last these
    are raised (KeyboardInterrupt, Terminated). `on_output` gets standard output as it comes, without secrets.
    """
    from papermill.execute import execute_notebook  # not above: Papermill may be importing this module

    hidden = frozenset([*secrets, *passwords(parameters)])
    begun = time.monotonic()
    was_silent, logger.disabled = logger.disabled, True  # what it would say is in the record
    try:
        execute_notebook(
            str(source.absolute()).replace("{", "{{").replace("}", "}}"),  # Papermill formats paths
            str(target.absolute()).replace("{", "{{").replace("}", "}}"),
            parameters,
            engine_name="runbook",
            progress_bar=False,
            cwd=cwd,
            on_output=on_output,
            secrets=hidden,
            execution_timeout=timeout_s,
        )
    except (PapermillExecutionError, KeyboardInterrupt, Terminated):
        if _said(target).get("state") != "failed":  # interrupted before the first cell, or after the last
            raise
    finally:
        logger.disabled = was_silent
    said = _said(target)
    return Executed(target, time.monotonic() - begun, said.get("cell"), said.get("error", ""), said.get("error_name", ""))


def _said(record: Path) -> dict[str, Any]:
    if not record.is_file():
        return {}
    return dict(json.loads(record.read_text(encoding="utf-8"))["metadata"].get("runbook", {}))


class RecordEngine(NBClientEngine):  # type: ignore[misc]
    """Papermill's engine, with a record that names the cell that failed and leaves later ones pending."""

    @classmethod
    def execute_notebook(cls, nb: NotebookNode, kernel_name: str, output_path: str | None = None, **options: Any) -> Any:
        options["secrets"] = frozenset([*options.get("secrets", ()), *known_secrets(), *passwords(nb.metadata)])
        if output_path:  # Papermill writes once more after the engine: that too goes through the handler
            papermill_io.register(output_path, _Record(papermill_io.get_handler(output_path), options["secrets"]))
        nb.metadata["runbook"] = {"state": "running"}
        nb.metadata.setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
        with ended_by_signals():
            return super().execute_notebook(nb, kernel_name, output_path=output_path, **options)

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        on_output: Callable[[str], None] | None = None,
        secrets: frozenset[str] = frozenset(),
        **options: Any,
    ) -> None:
        known = {name: options[name] for name in ("log_output", "stdout_file", "stderr_file") if name in options}
        client = _Client(
            nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=execution_timeout, log=logger,
            iopub_timeout=60, **known,
        )  # fmt: skip
        client.on_output, client.secrets = on_output, secrets
        if nb_man.output_path and Path(nb_man.output_path).with_name("manifest.json").is_file():
            written = Path(nb_man.output_path).absolute()
            client.told = {"RUNBOOK_RECORD": str(written.parent), "JPY_SESSION_NAME": written.name}
        try:
            client.execute()
        except Exception:
            said, cell = nb_man.nb.metadata["runbook"], nb_man.nb.cells[client.at]
            if said["state"] == "completed":  # the work was done; only the kernel would not go
                return
            trace = [redact(line, secrets) for out in cell.get("outputs", ()) for line in out.get("traceback", ())]
            raise PapermillExecutionError(
                client.at, cell.get("execution_count"), cell.source, said["error_name"], said["error"], trace
            ) from None


class _Client(PapermillNotebookClient):  # type: ignore[misc]
    on_output: Callable[[str], None] | None = None
    secrets: frozenset[str] = frozenset()
    saves = True  # whether what comes now is worth writing
    told: Mapping[str, str] = MappingProxyType({})  # where the kernel's statements are written down
    at = 0  # the cell that runs, or would run first

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = Kernel(kernel_name=self.kernel_name, connection_file=str(self.room / "k.json"))
        if len(os.fsencode(self.room)) < IPC_PATH_BYTES:
            self.km.transport, self.km.ip = "ipc", str(self.room / "k")
        return self.km

    def execute(self) -> None:
        """Runs all cells; raises what stopped them, after the record says so."""
        self.reset_execution_trackers()
        code = [index for index, cell in enumerate(self.nb.cells) if cell.cell_type == "code"]
        self.at = code[0] if code else 0
        self.room = Path(tempfile.mkdtemp(prefix="rb-"))
        own = {**forked.ENVIRONMENT, "IPYTHONDIR": str(self.room)}  # the operator's start-up files have no say
        try:
            log = self.room.joinpath("log").open("wb")
            with log, self.setup_kernel(env={**os.environ, **own, **self.told}, stdout=log, stderr=log):
                with self._seldom_saved():
                    self.papermill_execute_cells()
                self.set_widgets_metadata()
                self.nb.metadata["runbook"] = {"state": "completed"}
        except BaseException as error:
            self.blame(error)
            raise
        finally:
            shutil.rmtree(self.room, ignore_errors=True)

    @contextmanager
    def _seldom_saved(self) -> Iterator[None]:
        """Papermill writes the record before and after each cell, also those of words. Before a cell of code is enough, with what
        came of all before it. Of a large one, with hundreds of partitions, that still took most of the time: it takes a tenth at
        most. Whatever ends the notebook writes it once more."""
        save, ended, took = self.nb_man.save, 0.0, 0.0

        def seldom(**given: Any) -> None:
            nonlocal ended, took
            if self.saves and (begun := time.monotonic()) - ended > (9 * took if took > SHORT_S else 0):
                save(**given)
                ended = time.monotonic()
                took = ended - begun

        self.nb_man.save = seldom
        try:
            yield
        finally:
            self.nb_man.save = save

    def papermill_execute_cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            self.at = index
            try:
                self.saves = cell.cell_type == "code"
                self.nb_man.cell_start(cell, self.at)
                self.execute_cell(cell, self.at)
            except BaseException as error:
                self.blame(error)
                if not isinstance(error, CellExecutionError | DeadKernelError):
                    self._hear_last_words(cell)
                raise
            self.saves = False
            self.nb_man.cell_complete(cell, cell_index=self.at)

    def blame(self, error: BaseException) -> None:
        """Writes down that the present cell failed, and why; the first to say so is believed."""
        if self.nb.metadata["runbook"]["state"] != "running" or not self.nb.cells:
            return
        cell, (name, sentence) = self.nb.cells[self.at], self._reason(error)
        if cell.cell_type == "code" and not isinstance(error, CellExecutionError):  # the kernel could not say it
            shown = {"ename": name, "evalue": sentence, "traceback": [f"{name}: {sentence}"]}
            cell.outputs.append(NotebookNode(output_type="error", **shown))  # type: ignore[no-untyped-call]
        sentence = redact(sentence, self.secrets)
        said = {"state": "failed", "cell": self.at, "error_name": name, "error": sentence}
        self.nb.metadata["runbook"] = {**said, "cell_id": cell.get("id", "")}
        self.nb_man.cell_exception(cell, cell_index=self.at)
        self.nb_man.cell_complete(cell, cell_index=self.at)

    def _reason(self, error: BaseException) -> tuple[str, str]:
        process = getattr(getattr(self.km, "provisioner", None), "process", None)
        return reason(error, self.nb.cells[self.at].get("outputs", ()), process, self.timeout, self.room / "log")

    def _hear_last_words(self, cell: NotebookNode) -> None:
        """Interrupts the kernel and lets it finish its output, so that the record says where it stopped."""

        async def listen() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            await self.km.interrupt_kernel()
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*rest, return_exceptions=True), LAST_WORDS_S)

        ours = cell.outputs[-1] if cell.get("outputs") else None
        with suppress(Exception, KeyboardInterrupt, Terminated):  # a second signal ends the listening, not the record
            ensure_event_loop().run_until_complete(listen())
        if ours in cell.get("outputs", []):  # the reason stands last
            cell.outputs.remove(ours)
            cell.outputs.append(ours)
        cell.outputs = [each for out in cell.get("outputs", ()) for each in ([out] if out is ours else folded(out))]

    def output(self, outs: list[NotebookNode], *message: Any) -> Any:
        """Keeps of a line that overwrites itself (a progress bar) only what stands in the end."""
        out = super().output(outs, *message)
        if out is None or out.output_type != "stream":
            return out
        if out.name == "stdout" and self.on_output:
            with suppress(BrokenPipeError):  # a terminal that was closed does not stop the work
                self.on_output(redact(out.text, self.secrets))
        recent = takewhile(lambda earlier: earlier.output_type == "stream", reversed(outs[:-1]))
        before = next((earlier for earlier in recent if earlier.name == out.name), None)
        if before:
            outs.pop()
            head, newline, line = before.text.rpartition("\n")
            before.text = head + newline + shown(line + out.text)
        else:
            out.text = shown(out.text)
        return out


class _Record(LocalHandler):  # type: ignore[misc]
    """Papermill's way to one notebook: what is written is redacted, and replaces the file in one move."""

    def __init__(self, usual: Any, secrets: frozenset[str]) -> None:
        super().__init__()
        self.usual, self.secrets, self.folder = usual, secrets, papermill_io.get_handler("local")._cwd or os.getcwd()

    def write(self, buf: str, path: str) -> None:
        text = redacted_notebook(buf, self.secrets)
        if isinstance(self.usual, LocalHandler):
            write_whole(Path(self.folder, path), text)
        else:
            self.usual.write(text, path)


papermill_engines.register("runbook", RecordEngine)
