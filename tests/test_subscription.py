"""A logical subscriber of the table keeps getting every change: through migration, cut-over, rollback and finish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook import additions, verify
from tests.migration import BACK, END, FORWARD, plan, walk
from tests.servers import Server
from tests.test_add_partitions import add

TABLE = "CREATE TABLE thing (id bigint PRIMARY KEY, kind text NOT NULL, name text)"
ROWS = "INSERT INTO thing SELECT n, (ARRAY['a', 'b'])[1 + n % 2], 'n' || n FROM generate_series(1, 200) n"
CHANGES = (
    "INSERT INTO thing SELECT max(id) + 1, 'a', 'new' FROM thing",
    "UPDATE thing SET name = name || '!' WHERE id % 7 = 0",
    "UPDATE thing SET kind = CASE kind WHEN 'a' THEN 'b' ELSE 'a' END WHERE id % 11 = 0",
    "DELETE FROM thing WHERE id = (SELECT min(id) FROM thing)",
)


def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


@contextmanager
def subscriber(server: Server, publisher: str, *tables: str, copy: bool = True) -> Iterator[str]:
    """The URL of a database that subscribes to the publication p of another one on the same server."""
    name = f"{psycopg.conninfo.conninfo_to_dict(publisher)['dbname']}_subscriber"
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    here = server.url(name)
    for table in tables:
        rows(here, table)
    # The slot is made beforehand: CREATE SUBSCRIPTION would wait for its own transaction on the same server.
    rows(publisher, f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    options = f"create_slot = false, slot_name = '{name}', copy_data = {str(copy).lower()}"
    rows(here, f"CREATE SUBSCRIPTION s CONNECTION '{make_conninfo(publisher)}' PUBLICATION p WITH ({options})")
    try:
        yield here
    finally:
        rows(here, "ALTER SUBSCRIPTION s DISABLE")
        rows(here, "ALTER SUBSCRIPTION s SET (slot_name = NONE)")
        rows(here, "DROP SUBSCRIPTION s")
        end = time.monotonic() + 30
        while rows(publisher, f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{name}' AND active"):
            assert time.monotonic() < end, "the slot is not let go"
            time.sleep(0.05)
        rows(publisher, f"SELECT pg_drop_replication_slot('{name}')")
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def in_step(publisher: str, there: str, query: str = "SELECT id, kind, name FROM thing ORDER BY id") -> None:
    """Return when the subscriber has applied everything; the rows are the same then."""
    position = rows(publisher, "SELECT pg_current_wal_lsn()")[0][0]
    end = time.monotonic() + 30
    slot = psycopg.conninfo.conninfo_to_dict(there)["dbname"]
    done = f"SELECT confirmed_flush_lsn >= '{position}' FROM pg_replication_slots WHERE slot_name = '{slot}'"
    while not rows(publisher, done)[0][0] or rows(there, "SELECT 1 FROM pg_subscription_rel WHERE srsubstate <> 'r'"):
        assert time.monotonic() < end, "the subscriber does not follow"
        time.sleep(0.05)
    assert rows(there, query) == rows(publisher, query)


PUBLISHED = {
    "by name": "CREATE PUBLICATION p FOR TABLE thing WITH (publish_via_partition_root)",
    "columns and rows 15": "CREATE PUBLICATION p FOR TABLE thing (id, kind, name) WHERE (id > 0) WITH (publish_via_partition_root)",
    "full identity": "ALTER TABLE thing REPLICA IDENTITY FULL; CREATE PUBLICATION p FOR TABLE thing WITH (publish_via_partition_root)",
    "schema 15": "CREATE PUBLICATION p FOR TABLES IN SCHEMA public WITH (publish_via_partition_root)",
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.long] if n else []) for n, how in enumerate(PUBLISHED)])
def test_a_subscriber_gets_every_change_through_migration_cutover_and_rollback(server: Server, database: str, how: str) -> None:
    if how.endswith("15") and server.version < 15:
        pytest.skip(f"PostgreSQL {server.version} publishes neither columns nor schemas")
    for statement in (TABLE, ROWS, PUBLISHED[how]):
        rows(database, statement)
    # A publication of the schema publishes the original's changes too, on the way back: an empty table takes them, as 00 says.
    extra = ["CREATE TABLE thing_retired (LIKE thing INCLUDING ALL)"] if how.startswith("schema") else []
    with subscriber(server, database, TABLE, *extra) as there:
        in_step(database, there)
        run = plan(database, "thing", "kind", backup_method="dump")
        assert bool(extra) == any("whole schema" in finding.sentence for finding in run.plan.findings)
        actions = list(FORWARD)
        for last in ("log", "copy", "compare", "swap", "cutover check"):
            first = actions[0]
            walk(run, FORWARD, first=first, last=last)
            actions = actions[actions.index(last) + 1 :]
            for change in CHANGES:
                rows(database, change)
            in_step(database, there)
        for last in ("swap back", "rollback check"):
            walk(run, BACK, first="swap back" if last == "swap back" else "clean", last=last)
            for change in CHANGES:
                rows(database, change)
            in_step(database, there)


@pytest.mark.long
def test_a_subscriber_gets_every_change_after_the_end(server: Server, database: str) -> None:
    for statement in (TABLE, ROWS, PUBLISHED["by name"]):
        rows(database, statement)
    with subscriber(server, database, TABLE) as there:
        run = plan(database, "thing", "kind")
        walk(run, FORWARD)
        verify.check(run)
        walk(run, END)
        for change in CHANGES:
            rows(database, change)
        in_step(database, there)


def test_a_subscriber_keeps_the_rows_that_go_over_from_the_default_partition(server: Server, database: str) -> None:
    """No trigger sees them come, whether it fires always or is off."""
    assign = (
        "CREATE FUNCTION {0}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.name := '{0}'; RETURN NEW; END$$;"
        " CREATE TRIGGER {0} BEFORE INSERT ON thing FOR EACH ROW EXECUTE FUNCTION {0}()"
    )
    for statement in (TABLE, ROWS, PUBLISHED["by name"], *map(assign.format, ("often", "always", "never"))):
        rows(database, statement)
    rows(database, "ALTER TABLE thing ENABLE ALWAYS TRIGGER always, DISABLE TRIGGER never")
    run = plan(database, "thing", "kind", partitions={"thing_a": ["a"], "thing_rest": "default"})
    walk(run, FORWARD)
    fired = "SELECT tgname::text, tgenabled::text FROM pg_trigger WHERE tgrelid = '{}'::regclass AND tgname NOT LIKE 'RI_%' ORDER BY 1"
    with subscriber(server, database, TABLE) as there:
        in_step(database, there)
        before = rows(database, "SELECT * FROM thing ORDER BY id")
        add(run, add={"thing_b": ["b"]})
        assert rows(database, "SELECT count(*) FROM thing_b") == [(100,)]
        in_step(database, there)
        assert rows(database, "SELECT * FROM thing ORDER BY id") == before
        for change in CHANGES[1:]:
            rows(database, change)
        in_step(database, there)
    assert rows(database, fired.format("thing_b")) == rows(database, fired.format("thing_a"))
    verify.check(run)
    rows(database, "CREATE PUBLICATION late FOR TABLE thing")
    found = additions.draft(run, add={"thing_c": ["c"]}).growth.findings
    assert [each.object for each in found if "under their own names" in each.sentence] == ["late"]
