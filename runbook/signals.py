"""A process that is told to end finishes what it records first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """The process was told to end; its code is the shell's, 128 and the signal's number."""


@contextmanager
def held() -> Iterator[None]:
    """What is told to the process meanwhile (SIGINT, SIGTERM, SIGHUP) reaches it afterwards."""
    came: list[int] = []
    known = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in known.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in known.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(signal.Signals(came[0]))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become an exception, so that the record is finished; a handler of the caller stays."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
