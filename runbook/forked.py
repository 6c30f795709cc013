"""Kernels forked from a process that has loaded what every notebook needs: as fresh as one that is started, two seconds sooner."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from runbook import imports

NAME = "runbook-forked"  # as pyproject.toml registers it with Jupyter
# The operator's own MPLBACKEND would change what the record shows.
ENVIRONMENT = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
LOADED = (
    "ipykernel.kernelapp", "matplotlib.pyplot", "pandas", "sqlalchemy.dialects.postgresql.psycopg", "runbook.additions", "runbook.application",
    "runbook.backup", "runbook.charts", "runbook.cutover", "runbook.finish", "runbook.foreign_keys", "runbook.monitor", "runbook.overview",
    "runbook.points", "runbook.restore", "runbook.rollback", "runbook.verify",
)  # fmt: skip
THREADLESS = {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start some, and a fork leaves them behind
UNKNOWN = 256  # how a kernel ended: no process can end with that

_source: Connection | None = None


def begin() -> None:
    """Start to load, beside what this process does meanwhile; where a process must not be forked, kernels are started as usual."""
    global _source
    if sys.platform != "linux" or _source:
        return
    _source, theirs = Pipe()
    # Whatever modules lie in the working folder are not loaded.
    program = "import sys; sys.path = [each for each in sys.path if each]; from runbook.forked import serve; serve()"
    command = [sys.executable, "-c", program, str(theirs.fileno())]
    with theirs:
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, **ENVIRONMENT, **THREADLESS}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def begun() -> bool:
    """Whether a kernel can be forked now."""
    return _source is not None


class Forked(LocalProvisioner):
    """Jupyter's way to a kernel that is forked; where that does not succeed, it is started."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        global _source
        source, _source = _source, None  # one kernel at a time
        folder = kwargs.get("cwd") or os.getcwd()
        try:
            if source is None:
                raise EOFError
            source.send((cmd[cmd.index("ipykernel_launcher") + 1 :], kwargs["env"], str(folder), kwargs["stdout"].name))
            process = _Process(source)
        except (EOFError, OSError):
            return await super().launch_kernel(cmd, **kwargs)
        self.process = process  # type: ignore[assignment]
        self.pid = self.pgid = process.pid
        self.cwd = folder
        return self.connection_info


class _Process:
    """As much of a Popen as a provisioner asks for."""

    stdin = stdout = stderr = returncode = None

    def __init__(self, source: Connection) -> None:
        self.source = source
        self.pid: int = source.recv()

    def poll(self) -> int | None:
        return self.wait() if self.returncode is None and self.source.poll() else self.returncode

    def wait(self) -> int:
        global _source
        if self.returncode is None:
            try:
                self.returncode = self.source.recv()
                _source = self.source
            except (EOFError, OSError):  # what it was forked from was killed before it: nobody knows how it ended
                self.returncode = UNKNOWN
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve() -> None:
    """The process that kernels are forked from: forks one for each that is asked for, says its pid, and with what code it ended. Ends
    with whoever asks; returns in a kernel that is over."""
    for name in LOADED:
        importlib.import_module(name)
    imports.keep()
    asked = Connection(int(sys.argv[1]))
    try:
        while True:
            given = asked.recv()
            if not (pid := os.fork()):
                break
            asked.send(pid)
            asked.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    except (EOFError, OSError):  # whoever asked is gone
        return
    _be_kernel(asked, *given)


def _be_kernel(asked: Connection, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    from runbook.notebook import settle_in

    os.setsid()  # an interrupt is told to it and to its own children
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    threading.Thread(target=_end_with, args=[asked], daemon=True).start()
    app = IPKernelApp.instance()
    app.initialize(arguments)  # type: ignore[no-untyped-call]
    settle_in()
    app.start()  # type: ignore[no-untyped-call]


def _end_with(asked: Connection) -> None:
    asked.poll(None)  # while a kernel lives nothing is asked: whoever asked is gone
    os._exit(1)
