"""Long work says how far it is, and what the server has to say of it."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL
from tqdm import tqdm

from runbook import execution, pace, restore, workers
from runbook.database import Database
from runbook.session import Session
from tests.migration import FORWARD, forward, plan, walk

Sql = Callable[..., list[tuple[Any, ...]]]


def test_the_copy_says_rows_speed_time_and_the_logs_tail(clinic: str, sql: Sql, capsys: pytest.CaptureFixture[str]) -> None:
    run = forward(clinic, "partition check")
    sql("UPDATE users SET is_active = NOT is_active WHERE id IN (SELECT id FROM users LIMIT 7)")
    assert restore.copy(run).rows == 1000
    last = capsys.readouterr().out.split("\r")[-1].strip()
    assert last.startswith("copied: 100%|") and "1.00k/1.00k [00:0" in last, last
    assert last.endswith(" rows/s, log 7]"), last


@pytest.mark.parametrize(("busy", "given", "sessions"), [(False, 0, 2), (True, 0, 1), (True, 2, 2)])
def test_while_others_are_at_work_one_session_works_unless_told_otherwise(
    clinic: str, busy: bool, given: int, sessions: int
) -> None:
    run, pids = plan(clinic), list[int]()

    def do(session: Session, _: int) -> None:
        time.sleep(0.1)  # the other one has time to take up something, too
        pids.append(session.pid)

    def work() -> None:
        with suppress(psycopg.errors.QueryCanceled):
            application.execute("SELECT pg_sleep(60)")

    with psycopg.connect(clinic) as application:
        if busy:
            threading.Thread(target=work).start()
        time.sleep(1.2)
        workers.parallel(run, given, range(10), do)
        application.cancel()
    assert (len(pids), len(set(pids))) == (10, sessions)


@pytest.mark.long
def test_as_many_connections_stay_free_as_workers_take(clinic: str) -> None:
    pids: set[int] = set()
    with ExitStack() as others, psycopg.connect(clinic, autocommit=True) as asks:
        free = "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int - count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        while (left := asks.execute(free).fetchone()) and left[0] > 9:
            others.enter_context(psycopg.connect(clinic))
        workers.parallel(plan(clinic), 60, range(30), lambda session, _: pids.add(session.pid) or time.sleep(0.1))  # type: ignore[func-returns-value]
    assert 1 <= len(pids) <= 4


def test_what_the_server_warns_of_is_seen_but_no_notice_and_no_functions_words(
    clinic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Database("clinic", clinic).session() as session:
        session.run(SQL("DO $$ BEGIN RAISE WARNING 'ann@example.org has no doctor'; END $$").format())
        session.run(SQL("DROP TABLE IF EXISTS nothing").format())
        session.run(SQL("COMMIT").format())
    assert capsys.readouterr().out == "the server warns: there is no transaction in progress\n"


def test_the_logs_tail_is_counted_seldom() -> None:
    asked: list[int] = []
    progress = pace.Progress("copied", 100)
    for number in range(100):
        progress.add(1, lambda number=number: asked.append(number) or 5)  # type: ignore[misc]
    progress.close()
    assert asked == [0]


def test_beside_the_steps_stand_a_bars_numbers() -> None:
    bar = tqdm(total=8, file=io.StringIO())
    execution._teller(bar)("\rcopied:  45%|████▌     | 450k/1.00M [00:12<00:14, 37.2k rows/s, log 1,234]")
    assert bar.postfix == "copied:  45% 450k/1.00M [00:12<00:14, 37.2k rows/s, log 1,234]"


@contextmanager
def an_application(url: str) -> Iterator[None]:
    """Somebody who asks for something small all the time."""
    ended = threading.Event()

    def ask() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not ended.is_set():
                connection.execute("SELECT 1")
                at_work.set()
                ended.wait(0.1)

    at_work, asking = threading.Event(), threading.Thread(target=ask)
    asking.start()
    try:
        at_work.wait()
        yield
    finally:
        ended.set()
        asking.join()


def test_the_copy_gives_way_and_what_holds_locks_does_not(clinic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a lock of ours would wait for us to get the processor, too."""
    run, plain, seen = forward(clinic, "partition check"), Session.run, defaultdict[str, set[int]](set)

    def noting(session: Session, query: Any, *words: Any, **names: Any) -> Any:
        if isinstance(query, str):
            seen[query].add(os.getpriority(os.PRIO_PROCESS, session.pid))
        return plain(session, query, *words, **names)

    monkeypatch.setattr(Session, "run", noting)
    with an_application(clinic):
        walk(run, FORWARD, first="copy")
    assert seen["restore.copy_range"] == {10}
    assert seen["locks.evict"] == {0}, "with which each of our locks begins"
