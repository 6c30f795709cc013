"""The process that kernels are forked from: libraries and rooms that the notebooks use, loaded once."""

import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

import matplotlib.pyplot
import pandas
import sqlalchemy.dialects.postgresql.psycopg
from ipykernel.kernelapp import IPKernelApp

from runbook import (
    additions,
    application,
    backup,
    charts,
    cutover,
    finish,
    forecast,
    foreign_keys,
    imports,
    monitor,
    overview,
    partition,
    points,
    queries,
    restore,
    rollback,
    verify,
)
from runbook.notebook import settle_in

USED = (additions, application, backup, charts, cutover, finish, forecast, foreign_keys, matplotlib, monitor, overview, pandas,
        partition, points, queries, restore, rollback, sqlalchemy, verify)  # fmt: skip


def serve(asked: Connection) -> None:
    """Fork a kernel for each that is asked for, one after the other: says its pid, and with what code it ended. Ends with whoever
    asks; returns in the kernel, when that is over."""
    imports.keep()
    while True:
        arguments, environment, folder, log = asked.recv()
        if not (pid := os.fork()):
            return _be_kernel(asked, arguments, environment, folder, log)
        asked.send(pid)
        asked.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _be_kernel(asked: Connection, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
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


def main() -> None:
    with suppress(EOFError, OSError):  # whoever asked has ended
        serve(Connection(int(sys.argv[1])))
