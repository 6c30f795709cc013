"""How fast the copy may go, and how far it is: brakes on replica lag and load, progress that a log can hold."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm import tqdm

from runbook.errors import RunbookError
from runbook.locks import tell
from runbook.session import Session


@dataclass
class Brakes:
    """Pauses while a replica lags more than `max_replica_lag_s` seconds behind, or more than `max_active_sessions`
    other sessions are active; 0 means no limit. Says once why it pauses, and when it goes on."""

    max_replica_lag_s: int
    max_active_sessions: int
    stop: threading.Event = field(default_factory=threading.Event)
    paused: bool = field(default=False)

    def wait(self, session: Session) -> None:
        """Return when there is room, or raise RunbookError when the step is stopped."""
        while reason := self._reason(session):
            if not self.paused:
                tell(f"paused: {reason}")
            self.paused = True
            if self.stop.wait(0.5):
                raise RunbookError("The copy was stopped while it paused.")
        if self.paused:
            tell("goes on")
            self.paused = False

    def _reason(self, session: Session) -> str:
        if self.max_replica_lag_s:
            lag = session.value("pace.replica_lag")
            if lag is not None and lag > self.max_replica_lag_s:
                return f"a replica is {lag:.1f} s behind (limit {self.max_replica_lag_s} s)"
        if self.max_active_sessions:
            active = session.value("pace.active_sessions", me="runbook%")
            if active > self.max_active_sessions:
                return f"{active} sessions are active (limit {self.max_active_sessions})"
        return ""


class Progress:
    """Rows done, rows a second, time left, the log's tail; thread-safe. Where nobody watches a terminal or a notebook, a line
    every ten seconds."""

    def __init__(self, verb: str, total: int, done: int = 0, unit: str = "rows") -> None:
        interval = 0.2 if sys.stdout.isatty() or "ipykernel" in sys.modules else 10.0
        self._bar = tqdm(total=max(total, done) or None, initial=done, desc=verb, unit=f" {unit}", unit_scale=True, file=sys.stdout,
                         mininterval=interval, ascii=" ▏▎▍▌▋▊▉█", ncols=96)  # fmt: skip
        self._lock, self._look_again = threading.Lock(), 0.0

    def add(self, number: int, tail: Callable[[], int] | None = None) -> None:
        """So much more is done; `tail` counts the changes that wait in the log, and is asked every two seconds at most."""
        with self._lock:
            if tail and (begun := time.monotonic()) > self._look_again:
                self._bar.set_postfix_str(f"log {tail():,}", refresh=False)
                self._look_again = time.monotonic() + max(2.0, 20 * (time.monotonic() - begun))
            self._bar.update(number)

    def close(self) -> None:
        self._bar.close()
