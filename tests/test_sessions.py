"""A connection that rests between two sessions: nothing of the one is seen in the other, and it does not stay."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql as composed

from runbook.database import REST_S, target
from runbook.errors import ServerUnavailable, told
from runbook.execution import under_way
from tests import migration, servers

Query = Callable[..., list[tuple[Any, ...]]]


def test_a_session_inherits_nothing_from_the_one_before(database: str) -> None:
    found = target(database)
    with found.session("first") as first:
        first.connection.execute("SET search_path = pg_catalog; SET runbook.correcting = 'on'; SET work_mem = '1MB'")
        first.connection.execute(
            "SELECT pg_advisory_lock(1); CREATE TEMP TABLE t (); CREATE FUNCTION pg_temp.f() RETURNS int RETURN 1"
        )
        with first.transaction("REPEATABLE READ"):
            first.connection.execute("SELECT 1")
        pid = first.pid
    with found.session("second") as second:
        assert second.pid == pid, "the connection was not taken up again"
        asked = """SELECT current_setting('search_path') AS path, current_setting('runbook.correcting', true) AS correcting,
                          current_setting('application_name') AS name, current_setting('row_security') AS security,
                          current_setting('work_mem') <> '1MB' AS work_mem, current_setting('transaction_isolation') AS isolation,
                          to_regclass('pg_temp.t') AS table, to_regproc('pg_temp.f') AS function"""
        assert second.connection.execute(asked).fetchone() == {
            "path": '"$user", public', "correcting": "", "name": "runbook second", "security": "off", "work_mem": True,
            "isolation": "read committed", "table": None, "function": None,
        }  # fmt: skip
        held = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert not second.connection.execute(held).fetchall()


def test_a_lock_is_free_as_soon_as_its_session_ended(database: str, sql: Query) -> None:
    with target(database).session("holder") as holder:
        holder.connection.execute("SELECT pg_advisory_lock(1)")
        assert sql("SELECT pg_try_advisory_lock(1)") == [(False,)]
    assert sql("SELECT pg_try_advisory_lock(1)") == [(True,)]


def test_a_connection_that_failed_or_was_ended_is_not_taken_up_again(database: str, sql: Query) -> None:
    found = target(database)
    with pytest.raises(LookupError), found.session("failing") as failing:
        failed = failing.pid
        raise LookupError
    with found.session("next") as after:
        assert after.pid != failed
        ended = after.pid
    sql("SELECT pg_terminate_backend(%s, 5000)", [ended])
    with found.session("last") as last:
        assert last.pid != ended


def test_what_ends_a_readers_connection_is_the_servers_error_and_no_full_disk(database: str, sql: Query) -> None:
    """pandas makes an OSError of it, SQLAlchemy an error of its own, with the whole statement in it."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(target(database).frame, composed.SQL("SELECT pg_sleep(60)").format())
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'runbook reader' AND wait_event = 'PgSleep'"
        while not sql(ended):
            time.sleep(0.05)
        with pytest.raises(psycopg.errors.AdminShutdown) as caught:
            reading.result()
    assert told(caught.value).startswith("The server refused it (57P01): terminating connection")
    assert told(psycopg.OperationalError("consuming input failed: server closed")) == "The connection to the server was lost."


def test_a_server_that_is_away_for_a_moment_is_asked_again_whether_a_migration_is_under_way(
    server: servers.Server, clinic: str
) -> None:
    """Else a rehearsal that it broke off would leave its triggers on the table, unsaid."""
    migration.forward(clinic, last="log")
    server.stop()
    try:
        with pytest.raises(ServerUnavailable):
            under_way(clinic, "users")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(under_way, clinic, "users", 60)
            time.sleep(1)
            assert not asked.done()
            server.start()
            assert asked.result()
    finally:
        server.start() if server.process and server.process.poll() is not None else None


def test_what_rests_is_closed_after_a_while(server: servers.Server, database: str, sql: Query) -> None:
    found = target(database)
    with found.session("one"), found.session("two"), found.session("three"):
        pass
    seen = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'runbook%'"
    deadline = time.monotonic() + 20 * REST_S
    while sql(seen) != [(0,)] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sql(seen) == [(0,)]


def test_what_gave_way_to_the_application_is_used_for_nothing_else(database: str) -> None:
    found = target(database)
    with found.session("copy") as first:
        first.give_way()
        pid = first.pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == 0, "nobody else is at work"
    with found.session("copy") as first, psycopg.connect(database, autocommit=True) as application:
        assert first.pid == pid
        application.execute("SELECT 1")
        first.give_way()
        assert os.getpriority(os.PRIO_PROCESS, pid) == 10
    with found.session("swap") as second:
        assert second.pid != pid
        assert os.getpriority(os.PRIO_PROCESS, second.pid) == 0


@pytest.mark.pooler
def test_a_pools_connection_stays_what_it_was_for_the_application(server: servers.Server, clinic: str) -> None:
    """It goes on to whoever comes next."""
    with servers.pooler(server, "session") as port:
        found = target(clinic.replace(f"port={server.port}", f"port={port}"))
        with found.session("copy") as session:
            with psycopg.connect(clinic, autocommit=True) as application:
                application.execute("SELECT 1")
                session.give_way()
            assert os.getpriority(os.PRIO_PROCESS, session.pid) == 0
