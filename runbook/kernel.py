"""The kernel that runs a notebook: this very interpreter; and what it prints, as a terminal would show it in the end."""

from __future__ import annotations

import html
import re

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from nbformat.v4 import new_output

OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\r\n])")  # what a terminal would have shown only for a moment
COLOURS = re.compile(r"\x1b\[[\d;]*m")


class Kernel(AsyncKernelManager):
    @property
    def kernel_spec(self) -> KernelSpec | None:
        """python3 is this interpreter, whichever kernels the user has installed under that name."""
        return interpreter(self.kernel_name) or super().kernel_spec


def interpreter(kernel_name: str) -> KernelSpec | None:
    """The kernel python3 in this interpreter; None for any other."""
    return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict()) if kernel_name == NATIVE_KERNEL_NAME else None


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
