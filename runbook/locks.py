"""Locks that nobody queues behind for long: a timeout, a retry, and the name of whoever is in the way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from runbook.database import Database, Session
from runbook.errors import LockNotGranted

Result = TypeVar("Result")
# What PostgreSQL says when a lock was not had: lock_timeout, statement_timeout over several locks, deadlock.
BUSY = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, psycopg.errors.DeadlockDetected)


@dataclass(frozen=True)
class Blocker:
    """A session that stands in the way."""

    pid: int
    user: str
    application: str
    age_s: int
    state: str
    query: str
    gid: str | None

    def __str__(self) -> str:
        if self.pid == 0:
            return f"the prepared transaction {self.gid}"
        what = f'"{self.query}"' if self.query else "a query that cannot be seen without pg_read_all_stats"
        return f"pid {self.pid} ({self.user or 'user not visible'}, {self.application or 'no application name'}, {self.state}, {self.age_s} s): {what}"


@dataclass
class Patience:
    """How long to try for, in seconds; each attempt waits `lock_timeout_ms` at most. Remembers who was in the way."""

    budget_s: float
    lock_timeout_ms: int = 300
    attempts: int = 0
    blockers: dict[int, Blocker] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.started > self.budget_s

    def note(self, blockers: Sequence[Blocker]) -> None:
        """Say once of each that it is in the way, in the notebook as in the terminal."""
        for blocker in blockers:
            if blocker.pid not in self.blockers:
                print(f"waiting for {blocker}", flush=True)
            self.blockers[blocker.pid] = blocker

    def refusal(self, what: str) -> LockNotGranted:
        named = "; ".join(str(blocker) for blocker in self.blockers.values()) or "sessions that came and went"
        return LockNotGranted(
            f"{what} could not be locked within {self.budget_s:g} s and {self.attempts} attempts because of {named}."
            " Nothing was changed: end that session or wait for it, then run this again."
        )


def persist(database: Database, session: Session, patience: Patience, what: str, attempt: Callable[[], Result]) -> Result:
    """Run `attempt` (one transaction) until it gets its locks, with growing pauses; raises LockNotGranted, naming the blockers."""
    while True:
        patience.attempts += 1
        try:
            with watching(database, session, patience):
                return attempt()
        except BUSY as error:
            if patience.over:
                raise patience.refusal(what) from error
            time.sleep(min(2.0, 0.1 * 1.5**patience.attempts) * random.uniform(0.5, 1))


@contextmanager
def watching(database: Database, session: Session, patience: Patience) -> Iterator[None]:
    """While a statement waits, ask from a second connection who it waits for."""
    done = threading.Event()
    pid = sql.Literal(session.connection.info.backend_pid)
    every = max(0.05, patience.lock_timeout_ms / 3000)

    def look() -> None:
        try:
            while not done.wait(every):
                with database.session("watch") as other:
                    while not done.wait(every):
                        patience.note(_blockers(other.rows("locks.blockers", pid=pid)))
        except Exception:
            return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=1)


def _blockers(rows: list[dict[str, Any]]) -> list[Blocker]:
    return [Blocker(**row) for row in rows]


def brief(database: Database, what: str, tables: Sequence[sql.Composable], budget_s: float, work: Callable[[Session], Result],
          purpose: str, lock_timeout_ms: int = 300) -> Result:  # fmt: skip
    """Run `work` in one short READ COMMITTED transaction whose every lock wait is bounded, retried while the budget lasts."""
    patience = Patience(budget_s, lock_timeout_ms)
    with database.session(purpose) as session:

        def attempt() -> Result:
            with session.transaction(lock_timeout=f"{lock_timeout_ms}ms"):
                return work(session)

        return persist(database, session, patience, what, attempt)


def wait_for_snapshots(session: Session, horizon: str, patience: Patience) -> None:
    """Return once no session of this database has a snapshot older than transaction `horizon`.

    A REPEATABLE READ transaction from before the copy would see the new table empty after the swap. Raises
    LockNotGranted, naming them, when the budget is over.
    """
    while old := _blockers(session.rows("locks.old_snapshots", horizon=horizon)):
        patience.blockers = {}
        patience.note(old)
        if patience.over:
            raise LockNotGranted(
                f"A snapshot older than the copy is still in use after {patience.budget_s:g} s, and to it the new table would be empty:"
                f" {'; '.join(map(str, old))}. Nothing was changed: end that session or wait for it, then run this again."
            )
        time.sleep(0.2)
