"""The kernel that runs a notebook: this very interpreter; and what it prints, as a terminal would show it in the end."""

from __future__ import annotations

import html
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_output

from runbook import forked
from runbook.signals import Terminated

OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\r\n])")  # what a terminal would have shown only for a moment
COLOURS = re.compile(r"\x1b\[[\d;]*m")


class Kernel(AsyncKernelManager):
    @property
    def kernel_spec(self) -> KernelSpec | None:
        """python3 is this interpreter, whichever kernels the user has installed under that name."""
        return interpreter(self.kernel_name) or super().kernel_spec


def interpreter(kernel_name: str) -> KernelSpec | None:
    """The kernel python3 in this interpreter; None for any other."""
    if kernel_name != NATIVE_KERNEL_NAME:
        return None
    found = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())
    if forked.begun():
        found.metadata["kernel_provisioner"] = {"provisioner_name": forked.NAME}
    return found


def shown(text: str) -> str:
    """Of lines that overwrite themselves (progress bars) only what a terminal shows in the end."""
    return OVERWRITTEN.sub("", text)


def folded(out: NotebookNode) -> list[NotebookNode]:
    """An error whose traceback is IPython's own, as before `import runbook` is done: one line, and the rest folded away."""
    if out.output_type != "error" or len(out.traceback) < 2:
        return [out]
    trace = COLOURS.sub("", "\n".join(out.traceback))
    page = f"<details><summary>Traceback</summary><pre>{html.escape(trace)}</pre></details>"
    line = NotebookNode(out, traceback=[f"{out.ename}: {out.evalue}".rstrip(": ")])  # type: ignore[no-untyped-call]
    return [line, new_output("display_data", {"text/html": page, "text/plain": trace})]  # type: ignore[no-untyped-call]


def reason(
    error: BaseException, outputs: Iterable[NotebookNode], process: Any, limit_s: int | None, log: Path
) -> tuple[str, str]:
    """The name of what stopped a cell, and a sentence; what the kernel's `process` printed is in its `log`."""
    name = type(error).__name__
    match error:
        case CellExecutionError(ename="SystemExit"):
            return "SystemExit", "The cell called sys.exit: a notebook ends with its last cell, or with an error."
        case CellExecutionError():
            last = next((out for out in reversed(list(outputs)) if out.output_type == "error"), error)
            return last.ename, last.evalue or last.ename  # what the reader sees; the kernel's reply can be another
        case CellTimeoutError():
            return name, f"The cell ran into its limit of {limit_s} seconds and was stopped."
        case DeadKernelError():
            code = process.poll() if process else None
            how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            how = "nobody knows how" if code == forked.UNKNOWN else how
            return name, f"The kernel died while the cell ran ({how})."
        case KeyboardInterrupt():
            return name, "Interrupted (SIGINT) while the cell ran."
        case Terminated():
            return name, f"Told to end ({signal.Signals(int(error.code or 128) - 128).name}) while the cell ran."
        case NoSuchKernel():
            return name, f"There is no kernel named {error.name!r} here: the notebook's kernel is to be python3."
    told = log.read_text(errors="replace").strip().splitlines()[-1:]
    return name, ": ".join([str(error) or name, *told])
