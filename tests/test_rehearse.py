"""A rehearsal takes every step but the cut-over on the real table, and leaves nothing but its record."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from runbook import archive, backup, cli, embedded, rollback
from runbook.audit import audit
from runbook.database import target
from runbook.errors import AlreadyRunning, OutOfOrder, PromiseBroken
from runbook.rehearsal import Watch
from runbook.rehearsing import RUNS_IN
from tests import servers
from tests.migration import FORWARD, forward, plan, walk
from tests.walk import CLINIC_FILE, dump


@pytest.mark.long
def test_a_rehearsal_compares_every_row_and_leaves_nothing_of_itself(clinic: str, tmp_path: Path) -> None:
    before = dump(clinic, "--exclude-schema=runbook")
    done = CliRunner().invoke(cli.main, ["rehearse", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert re.search(r"03_restore +s +[\d.]+ +[\d.]+ +[+-]\d+%", done.stdout)
    assert "05_cutover" not in done.stdout.partition("The forecast")[0]
    assert "1,000 rows were compared, and all were equal." in done.stdout
    assert re.search(r"looked [\d,]+ times, at most [\d,]+ ms apart", done.stdout)
    assert "public.users is what it was." in done.stdout
    assert "Nothing of it is left but its record and the ledger's" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Head:")
    assert dump(clinic, "--exclude-schema=runbook") == before
    assert audit(tmp_path / "runs") == []


@pytest.mark.long
def test_a_rehearsal_does_not_take_a_migration_away_that_is_under_way(clinic: str, tmp_path: Path) -> None:
    forward(clinic, "shadow")
    before = dump(clinic)
    done = CliRunner().invoke(cli.main, ["rehearse", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "runs")])
    assert done.exit_code == 1
    assert "is under way" in done.stderr
    assert dump(clinic) == before


@pytest.mark.long
def test_a_record_that_cannot_be_written_leaves_nothing_on_the_table_either(
    clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, add = dump(clinic, "--exclude-schema=runbook"), archive.Run.add

    def full(record: archive.Run, done: Any) -> None:
        if done.notebook.name == "02_partition.ipynb":
            raise OSError(28, "No space left on device")
        add(record, done)

    monkeypatch.setattr(archive.Run, "add", full)
    done = CliRunner().invoke(cli.main, ["rehearse", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "runs")])
    assert done.exit_code == 1
    assert dump(clinic, "--exclude-schema=runbook") == before


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def blocked(url: str, blocker: str, table: str, seen: Callable[[], Any]) -> None:
    """A writer waits for a session that calls itself `blocker`, until `seen`."""
    with psycopg.connect(url, application_name=blocker) as holder:
        holder.execute(f"LOCK TABLE {table}".encode())

        def write() -> None:
            with psycopg.connect(url) as writer:
                writer.execute(f"DELETE FROM {table}".encode())

        thread = threading.Thread(target=write)
        thread.start()
        try:
            until(seen)
        finally:
            holder.rollback()
            thread.join()


def test_whoever_waits_for_it_is_seen_and_nobody_else(clinic: str) -> None:
    with Watch(target(clinic), "users") as watch:
        blocked(clinic, "somebody else", "appointments", lambda: (watch.longest["statement"] or 0) > 0.2)
        assert watch.longest["waited"] is None
        until(lambda: watch.looks > 5)
        blocked(clinic, "runbook partition.log", "appointments", lambda: (watch.longest["waited"] or 0) > 0.2)
    assert 0 < watch.resolution_s < 20
    assert not watch.ended_early
    waits = " ".join(watch.waits())
    assert "The longest that anybody was seen waiting for it is" in waits
    assert "The longest statement seen that writes to public.users or to what references it ran for" in waits


@pytest.mark.long
def test_nobody_else_begins_or_goes_back_while_a_rehearsal_is_under_way(clinic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once an approval is in the ledger, which no rehearsal gives, it takes nothing back."""
    run = plan(clinic)
    with Watch(target(clinic), "users") as watch:
        with monkeypatch.context() as another:
            another.delenv(RUNS_IN)
            refused = r"A rehearsal of public\.users is under way: a session of .* \(pid \d+, since .* Wait for it"
            for act in (backup.make, rollback.swap_back, lambda run: plan(run.database.name, backup="another")):
                with pytest.raises(AlreadyRunning, match=refused):
                    act(run)
            with pytest.raises(AlreadyRunning, match="A rehearsal of"), Watch(target(clinic), "users"):
                pass
        walk(run, FORWARD, last="approval")
        with pytest.raises(
            OutOfOrder, match=r"The cut-over of public\.users was approved, .* the rehearsal does not take it back"
        ):
            rollback.swap_back(run)
    assert watch.looks
    backup.check(run)


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE users_backup ()", "ALTER TABLE appointments ADD user_role text", "CREATE SCHEMA runbook_1", "GRANT SELECT ON users TO public",
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER t BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey", "CREATE INDEX left_over ON users (role)",
    ],
)  # fmt: skip
def test_whatever_is_left_is_named(clinic: str, sql: Callable[..., Any], change: str) -> None:
    with Watch(target(clinic), "users") as watch:
        sql(
            "CREATE SCHEMA runbook; CREATE TABLE runbook.ledger (); INSERT INTO appointments SELECT * FROM appointments LIMIT 0; ANALYZE users"
        )
        watch.require_nothing()
        sql(change)
        with pytest.raises(PromiseBroken, match="are not what they were before the rehearsal"):
            watch.require_nothing()


@pytest.mark.long
def test_the_slowest_statement_is_known_where_statements_are_counted(server: servers.Server) -> None:
    with servers.start(server.version, settings={"shared_preload_libraries": "pg_stat_statements"}, complete=True) as own:
        embedded.load_clinic(own.conninfo(), users=200)
        with psycopg.connect(own.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
            watch = Watch(target(own.url()), "users")
            assert "nobody wrote" in watch.waits()[-1]
            connection.execute("DELETE FROM appointments")
            assert "the slowest of 1 kinds of writing statements took" in watch.waits()[-1]
            again = Watch(target(own.url()), "users")
            connection.execute("DELETE FROM appointments")
            assert "none of 1 kinds of writing statements took longer than it ever had before" in again.waits()[-1]
