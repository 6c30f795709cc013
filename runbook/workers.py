"""Several sessions at work on one step, range by range: the first error, or an interrupt, ends them all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import psycopg
from psycopg.errors import QueryCanceled

from runbook.changes import Rewritten
from runbook.errors import AlreadyRunning
from runbook.ledger import Run
from runbook.rehearsing import lock
from runbook.session import Session

Range = tuple[int, int]


def gaps(done: Iterable[Range], blocks: int, step: int) -> Iterator[Range]:
    """What is left of blocks [0, `blocks`) when the ranges in `done` are copied, in pieces of at most `step` blocks."""
    position = 0
    for first, last in [*sorted(done), (blocks, blocks)]:
        for begin in range(position, first, step):
            yield begin, min(begin + step, first)
        position = max(position, last)


def refuse_orphan(run: Run, session: Session, holder: int) -> None:
    """Raises AlreadyRunning in a worker whose run has lost the table: another one may be doing the same by now."""
    if all(row["pid"] != holder for row in session.rows("ledger.claimant", **lock(run.plan.table.oid))):
        raise AlreadyRunning(f"The connection that holds {run.plan.full_name} for this run was lost: run this step again.")


def most(workers: int) -> int:
    """How many sessions work at the same time, at most: 0 leaves it to us."""
    return workers or 2


def _room(run: Run) -> int:
    """How many sessions more leave the application as many as we take: who asks for more gets these, at least one."""
    with run.database.session("worker") as session:
        return max(1, int(session.value("pace.free_sessions")) // 2)


def parallel(
    run: Run, workers: int, work: Sequence[Any], do: Callable[[Session, Any], None], stop: threading.Event | None = None
) -> None:
    """Do all of `work` with several sessions; the first error, or an interrupt, cancels what the others run and sets `stop`.

    With 0 `workers` there are two, of which one takes up new work only while nobody but us is at work."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for each in work:
        waiting.put(each)
    sessions: list[Session] = []
    stopped, drained = stop or threading.Event(), threading.Event()

    def loop(when_alone: bool) -> None:
        with run.database.session("worker") as session:
            if len(work) > 1:  # so many processes as was said, and no more: the application needs the rest
                session.connection.execute("SET max_parallel_maintenance_workers = 0; SET max_parallel_workers_per_gather = 0")
            sessions.append(session)
            while not stopped.is_set():
                if when_alone and not waiting.empty() and not session.alone:
                    drained.wait(0.5)
                    continue
                try:
                    each = waiting.get_nowait()
                except queue.Empty:
                    drained.set()
                    return
                do(session, each)

    number = min(most(workers), len(work), _room(run))
    with ThreadPoolExecutor(number or 1) as pool:
        futures = [pool.submit(loop, workers == 0 and place > 0) for place in range(number)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            drained.set()
            while not all(future.done() for future in futures):  # again: one may have been between two statements
                for session in sessions:
                    if not session.connection.closed:
                        with suppress(psycopg.Error):
                            session.connection.cancel_safe(timeout=5)
                wait(futures, timeout=0.5)
    errors = [error for future in futures if (error := future.exception())]
    # What was cancelled is not the cause; a rewritten source is, whatever else came of it.
    for error in sorted(errors, key=lambda error: (isinstance(error, QueryCanceled), not isinstance(error, Rewritten))):
        raise error
