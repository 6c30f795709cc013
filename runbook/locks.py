"""Locks that nobody queues behind for long: a timeout, a retry, and the name of whoever is in the way."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import psycopg
from psycopg import sql
from tqdm import tqdm

from runbook.database import Database
from runbook.errors import LockNotGranted, ServerUnavailable
from runbook.redaction import valueless
from runbook.session import Connection, Session
from runbook.statements import spelled, statement, trusted

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
    query: str  # as it came; said without the values in it
    gid: str | None
    lock: str | None = None  # what is waited for

    def __str__(self) -> str:
        if self.pid == 0:
            return f"the prepared transaction {self.gid} (COMMIT PREPARED or ROLLBACK PREPARED ends it)"
        hidden = self.query in ("", "<insufficient privilege>")
        what = "a query that cannot be seen without pg_read_all_stats" if hidden else f'"{valueless(self.query)[:80]}"'
        who = f"{self.user or 'user not visible'}, {self.application or 'no application name'}, {self.state}, {self.age_s} s"
        return f"pid {self.pid} ({who}): {what}"


class NotYet(psycopg.errors.LockNotAvailable):
    """The locks were had, and something else was in the way: let go and try again. Its text says what."""


@dataclass
class Patience:
    """How long to try for, in seconds; each attempt waits `lock_timeout_ms` at most. Remembers who was in the way."""

    budget_s: float
    lock_timeout_ms: int = 300
    attempts: int = 0
    blockers: dict[int, Blocker] = field(default_factory=dict)
    seen_last: dict[int, int] = field(default_factory=dict)  # pid: the last attempt that it was in the way of
    started: float = field(default_factory=time.monotonic)

    def spent(self, share: float = 1.0) -> bool:
        """Whether the budget, or a share of it, is over."""
        return time.monotonic() - self.started > self.budget_s * share

    def note(self, blockers: Sequence[Blocker]) -> None:
        """Say once of each that it is in the way, in the notebook as in the terminal."""
        for blocker in blockers:
            if blocker.pid not in self.blockers:
                tell(f"waiting for {blocker}")
            self.blockers[blocker.pid] = blocker
            self.seen_last[blocker.pid] = self.attempts

    def refusal(self, what: str, error: Exception) -> LockNotGranted:
        last = max(self.seen_last.values(), default=0)
        named = "; ".join(str(self.blockers[pid]) for pid, attempt in self.seen_last.items() if attempt == last)
        cause = str(error) if isinstance(error, NotYet) else named or "sessions that came and went"
        return LockNotGranted(
            f"{what} could not be locked within {self.budget_s:g} s and {self.attempts} attempts because of {cause}."
            " Nothing was changed: end what is in the way or wait for it, then run this again."
        )


def persist(database: Database, session: Session, patience: Patience, what: str, attempt: Callable[[], Result]) -> Result:
    """Run `attempt` (one transaction) until it gets its locks, with growing pauses; else LockNotGranted names the blockers."""
    with watching(database, session, patience):
        while True:
            patience.attempts += 1
            try:
                return attempt()
            except BUSY as error:
                # A refusal names somebody: on a busy machine the connection that looks who it is may come late.
                if patience.spent() and (patience.seen_last or patience.spent(2)):
                    raise patience.refusal(what, error) from error
                time.sleep(min(1.0, 0.1 * 1.5**patience.attempts) * random.uniform(0.5, 1))


def apply(
    database: Database, session: Session, patience: Patience, what: str, statements: Sequence[sql.Composed],
    tables: Sequence[sql.Composable] = (), mode: str = "ACCESS EXCLUSIVE",
) -> None:  # fmt: skip
    """Run statements in one short transaction, as `persist` does, under a lock on `tables`; without tables each waits for its own."""

    def attempt() -> None:
        limit = f"{patience.lock_timeout_ms}ms"
        with exclusive(session, patience, tables, mode=mode) if tables else session.transaction(lock_timeout=limit):
            session.run_all(statements)

    persist(database, session, patience, what, attempt)


@contextmanager
def watching(database: Database, session: Session, patience: Patience) -> Iterator[None]:
    """While statements wait, ask from a second connection who they wait for; it is opened when they have waited a little."""
    waits = database.waits.pop(session.pid, session.waits)  # the slower look leaves this session alone

    def look(other: Connection) -> None:
        found = blockers(other, session.pid)
        patience.note(found)
        waits.update({each.pid: f"{each.lock}: {each}" for each in found})

    try:
        with _looking(database, max(0.02, patience.lock_timeout_ms / 4000), look):
            yield
    finally:
        database.waits[session.pid] = waits


@contextmanager
def attended(database: Database) -> Iterator[None]:
    """While an action works, say once of each who its sessions wait for, and how far is what has no progress of its own; from
    a connection that is opened after some seconds."""
    said: set[int] = set()

    def look(other: Connection) -> None:
        ours = dict(database.waits)
        for row in other.execute(statement("locks.waiting", pids=list(ours))).fetchall():
            found = [each for each in blockers(other, row["pid"]) if each.pid not in ours]
            ours[row["pid"]].update({each.pid: f"{each.lock}: {each}" for each in found})
            for each in found:
                if each.pid not in said:
                    tell(f"waiting for {each}")
                said.add(each.pid)
        if at_work := "; ".join(row["text"] for row in other.execute(statement("locks.at_work", pids=list(ours)))):
            print(f"\r{at_work[:120]:<80}", end="", flush=True)
            worked.set()

    worked = threading.Event()
    try:
        with _looking(database, 1.0, look):
            yield
    finally:
        if worked.is_set():
            print(flush=True)


def tell(text: str) -> None:
    """A line of its own, also where a progress bar stands."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def blockers(other: Connection, pid: int) -> list[Blocker]:
    """Who stands before this session in the queue of a lock."""
    return [Blocker(**row) for row in other.execute(statement("locks.blockers", pid=pid))]


@contextmanager
def _looking(database: Database, every: float, look: Callable[[Connection], None]) -> Iterator[None]:
    done = threading.Event()

    def loop() -> None:
        if done.wait(every):
            return
        try:
            with database.connect("watch") as other:
                while not done.wait(every):
                    look(other)
        except (psycopg.Error, ServerUnavailable) as error:  # no connection to spare: go on unseeing, and say so
            tell(f"who is in the way cannot be seen: {' '.join(str(error).split())}")

    watcher = threading.Thread(target=loop, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=5)


@dataclass
class Clock:
    """Seconds for which names were locked, and seconds from the request until they were free again: nobody waited longer."""

    locked: float = 0.0
    queued: float = 0.0


def together(
    tables: Sequence[sql.Composable], views: Sequence[sql.Composable], mode: str, *, sequences: Sequence[sql.Composable] = (),
    views_first: bool = False, sequences_first: bool = False,
) -> sql.Composed:  # fmt: skip
    """One statement that locks all of them, in this order; a sequence by a statement that changes nothing."""
    each = [statement("locks.lock_view", view=spelled(view)) for view in views]
    own = [statement("locks.lock_table", table=table, mode=trusted(mode)) for table in tables]
    both = [*each, *own] if views_first else [*own, *each]
    lines = sql.SQL(";\n").join([*sequences, *both] if sequences_first else [*both, *sequences]).as_string(None)
    return statement("locks.lock", block=f"BEGIN\n{lines};\nEND")


@contextmanager
def exclusive(
    session: Session,
    patience: Patience,
    tables: Sequence[sql.Composable],
    views: Sequence[sql.Composable] = (),
    mode: str = "ACCESS EXCLUSIVE",
    clock: Clock | None = None,
    sequences: Sequence[sql.Composable] = (),
    ours: Sequence[sql.Composable] = (),
    logs: Sequence[sql.Composable] = (),
    dropped: Sequence[sql.Composable] = (),
) -> Iterator[Clock]:
    """A READ COMMITTED transaction that holds `mode` on all of `tables` and `views`, what changes the `sequences`, each
    table's strongest lock at once; nobody queues behind it longer than the timeout, even for many tables.

    First SHARE UPDATE EXCLUSIVE, for which no reader or writer waits, on the `logs`, too, which the application's triggers
    write, and on the TOAST of what is `dropped`: autovacuum yields to it after deadlock_timeout, and never would within a
    shorter wait. Then ACCESS EXCLUSIVE on `ours`, which only the runbook uses: what is in the way there is waited for while
    the application goes on. synchronous_commit local: with remote_apply and a busy standby locks were held for 30 s. A client that
    stops without dying (a machine that sleeps, a network that swallows) loses them after some seconds.
    """
    deadlock_ms = int(session.value("locks.deadlock_timeout"))
    eviction_ms = deadlock_ms + 2000
    # One fixed order can starve against an application that has the other; a view's lock takes its tables' along.
    backwards = patience.attempts % 2 == 0
    # A default takes its value after the table; whoever asks for the value first has the sequence when it comes to the table.
    first = patience.attempts % 4 in (2, 3)
    ordered = tables[::-1] if backwards else tables
    block = together(ordered, views, mode, sequences=sequences, views_first=backwards, sequences_first=first)
    clock, asked, had = clock or Clock(), 0.0, 0.0
    try:
        with session.transaction(lock_timeout=f"{eviction_ms}ms", synchronous_commit="local"):
            session.connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            session.run("locks.evict", tables=sql.SQL(", ").join([*tables, *logs]))
            for row in session.rows("locks.toasted", tables=[each.as_string(None) for each in dropped]) if dropped else ():
                session.run("locks.evict_toast", table=(row["schema"], row["name"]))
            if ours:
                session.run("locks.lock_ours", tables=sql.SQL(", ").join(ours))
            # lock_timeout counts for each table; statement_timeout for all of them. Below half of deadlock_timeout: who waits for us
            # in the other order must not be told of a deadlock, for we let go before.
            timeout = sql.Literal(f"{max(1, min(patience.lock_timeout_ms, deadlock_ms // 2 - 1))}ms")
            bounded = "SET LOCAL lock_timeout = {0}; SET LOCAL statement_timeout = {0}; SET LOCAL idle_in_transaction_session_timeout = '3s'"
            session.connection.execute(sql.SQL(bounded).format(timeout))
            asked = time.monotonic()
            session.run(block)
            had = time.monotonic()
            session.connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL jit = off")
            yield clock
    finally:
        clock.queued = time.monotonic() - asked if asked else 0.0
        clock.locked = time.monotonic() - had if had else 0.0
        session.locked_s += clock.locked


def wait_for_snapshots(session: Session, horizon: str, patience: Patience, what: str = "the last replay") -> None:
    """Return once no session of this database has a snapshot older than transaction `horizon`, which has just committed.

    A REPEATABLE READ transaction from before the copy would see the new table empty after the swap, and one from before 20 no row
    that it moved. Of sessions whose snapshot this role may not see, every transaction that is open now is waited for. Raises
    LockNotGranted, naming them, when the budget is over; also when earlier attempts used it up, a passing snapshot gets a second:
    it is not what was in the way.
    """
    now, begun = session.row("locks.now"), time.monotonic()
    hidden = [row["transaction"] for row in session.rows("locks.hidden_transactions")]
    while old := session.rows("locks.old_snapshots", horizon=horizon, **now, hidden=hidden):
        blockers = [Blocker(**row) for row in old]
        patience.note(blockers)
        if patience.spent() and time.monotonic() - begun > 1:
            raise LockNotGranted(
                f"A snapshot older than {what} is still in use after {patience.budget_s:g} s, and to it the table would lack rows:"
                f" {'; '.join(map(str, blockers))}. Nothing was changed: end that session or wait for it, then run this again."
            )
        time.sleep(0.2)


def refuse_late_snapshots(session: Session, patience: Patience) -> None:
    """Under the locks, when rows had to be replayed or moved: raises NotYet while a transaction lives that took its snapshot before, and
    would miss these rows after the swap. For half of the budget: against an application that always has one, it would starve.
    """
    session.run("locks.look_anew")
    late = [] if patience.spent(0.5) else session.rows("locks.late_snapshots")
    if late:
        blockers = [Blocker(**row) for row in late]
        patience.note(blockers)
        raise NotYet(f"a snapshot that would not see the last rows: {'; '.join(map(str, blockers))}")
