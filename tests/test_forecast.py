"""The forecast: by a sample that nobody notices and that leaves nothing, on any table, and beside it what it took."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import runbook
from runbook import charts, forecast
from runbook.errors import PlanBlocked, PromiseBroken
from runbook.ledger import Run
from runbook.statements import trusted
from tests import migration
from tests.test_partitioned_reference import TABLES as PARTITIONED
from tests.test_repair import BY_HAND, FEW, PLANNED
from tests.test_self_reference import TABLE as SELF
from tests.walk import dump

Sql = Callable[..., list[tuple[Any, ...]]]
DIVIDED: dict[str, tuple[int, dict[str, Any]]] = {
    "list": (3000, {"key": "kind", "partitions": {"a": ["a"], "b": ["b"], "c": ["c"], "rest": "default"}}),
    "list, more values than partitions that are tried": (3000, {"key": "step"}),
    "range": (3000, {"key": "n", "partition_by": "range", "every": 200}),
    "range, empty": (0, {"key": "n", "partition_by": "range", "partitions": {"low": [None, 0], "high": [0, None]}}),
    "hash": (3000, {"key": "n", "partition_by": "hash", "modulus": 20}),
    "hash, empty": (0, {"key": "n", "partition_by": "hash", "modulus": 20}),
}
SHORT = {"list, more values than partitions that are tried", "range, empty", "hash"}
EVENTS = """
    CREATE SCHEMA "Odd ""one"; CREATE TABLE "Odd ""one".events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, kind text, step int, n int NOT NULL UNIQUE,
      twice int GENERATED ALWAYS AS (n * 2) STORED, long text);
    CREATE TABLE notes (event bigint REFERENCES "Odd ""one".events ON DELETE CASCADE, note text);
    INSERT INTO "Odd ""one".events (kind, step, n, long) SELECT chr(97 + n % 3), n % 12, n, repeat('x', n % 90) FROM generate_series(1, {rows}) n;
    INSERT INTO notes SELECT id, 'one' FROM "Odd ""one".events
"""


def events(url: str, sql: Sql, rows: int, **given: Any) -> Run:
    sql(EVENTS.replace("{rows}", str(rows)))
    return runbook.draft(database=url, table='Odd "one.events', **given).freeze()


def measured(run: Run) -> Any:
    seen = forecast.measure(run)
    assert "seconds" in seen.facts, seen.sentence
    return seen


CASES = [pytest.param(*each, id=name, marks=() if name in SHORT else pytest.mark.long) for name, each in DIVIDED.items()]


@pytest.mark.long
@pytest.mark.parametrize("rows, given", CASES)
def test_any_table_has_a_forecast_that_leaves_nothing(database: str, sql: Sql, given: dict[str, Any], rows: int) -> None:
    run = events(database, sql, rows, **given)
    before = dump(database)
    seen = measured(run)
    assert dump(database) == before
    assert seen.rows == seen.facts["copied"] == rows  # so few that the sample is the whole
    assert all(length >= 0 for length in seen.facts["seconds"].values())
    assert seen.facts["locked_s"] > 0
    migration.walk(run, migration.FORWARD, last="index")
    sizes = forecast.beside(run).set_index("what").loc[["the partitions", "their indexes"]]
    if rows:
        assert (sizes["forecast"] / sizes["actual"]).between(0.75, 1.35).all(), sizes
    assert forecast.measure(run).sentence.startswith("Already done")


@pytest.mark.long
@pytest.mark.parametrize(
    "tables, table, key, rows", [(SELF.format(action=""), "staff", "dept", 500), (PARTITIONED, "device", "kind", 400)]
)
def test_a_table_that_is_referenced_by_itself_or_by_partitions_has_one(
    database: str, sql: Sql, tables: str, table: str, key: str, rows: int
) -> None:
    for each in tables.split(";"):
        sql(each)
    run = migration.plan(database, table, key)
    before = dump(database)
    assert measured(run).rows == rows
    assert dump(database) == before


def test_the_sample_locks_what_exists_as_a_reader_does(clinic: str, sql: Sql) -> None:
    run = migration.plan(clinic, unique="global")
    with run.database.session() as session, session.transaction():
        forecast.sampled(run, session)
        held = session.rows(
            trusted(
                "SELECT DISTINCT relation::regclass::text AS name, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
                " AND relation IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND xmin <> pg_current_xact_id()::xid)"
            ).format()
        )
        assert {row["name"] for row in held} >= {"users", "appointments"}
        assert {row["mode"] for row in held} == {"AccessShareLock"}
        raise psycopg.Rollback


def test_a_row_that_moves_meanwhile_is_not_sampled_twice(database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is copied piece by piece; an update leaves its new row in one that comes later, maybe."""
    sql("CREATE TABLE job (id int PRIMARY KEY, queue text NOT NULL, n int NOT NULL DEFAULT 0, body text); CREATE INDEX ON job (n);"
        " INSERT INTO job SELECT n, 'q', 0, repeat('x', 500) FROM generate_series(1, 6000) n; DELETE FROM job WHERE id / 1000 % 2 = 0")  # fmt: skip
    sql("VACUUM job")  # there is room everywhere
    run, plain, pieces = (
        runbook.draft(database=database, table="job", key="queue").freeze(),
        forecast.statement,
        itertools.count(),
    )

    def moving(name: str, /, **names: Any) -> Any:
        if name == "restore.copy_range" and next(pieces) == 5:
            sql("UPDATE job SET n = n + 1")
        return plain(name, **names)

    monkeypatch.setattr(forecast, "statement", moving)
    assert measured(run).facts["copied"] <= 3001


def test_writers_are_no_hindrance_and_who_is_one_stops_nobody(clinic: str, sql: Sql) -> None:
    with psycopg.connect(clinic) as other:
        other.execute("UPDATE users SET first_name = 'x'; DELETE FROM appointments")
        measured(migration.plan(clinic))
        other.execute("LOCK TABLE appointments IN ACCESS EXCLUSIVE MODE")
        run = migration.plan(clinic, backup="users_backup_2")
        seen = forecast.measure(run)
        assert seen.sentence.startswith("There is no forecast, because a sample could not be copied.")
        assert forecast.beside(run).empty


@pytest.mark.long
def test_an_index_that_could_not_be_built_anew_is_named_before_and_in_03(database: str, sql: Sql) -> None:
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL, note text)")
    sql("CREATE FUNCTION f(text) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT length($1)'; CREATE INDEX by_f ON t (f(note))")
    sql("INSERT INTO t SELECT n, (ARRAY['a','b'])[1 + n % 2], 'a secret' FROM generate_series(1, 100) n")
    sql("CREATE OR REPLACE FUNCTION f(text) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1::int'")
    run = migration.plan(database, "t", "k", partitions={"t_a": ["a"], "t_b": ["b"]})
    named = r"^The index by_f of public\.t cannot be built anew: error 22P02, InvalidTextRepresentation\. .*REINDEX INDEX by_f.*00_plan"
    with pytest.raises(PlanBlocked, match=named):
        forecast.measure(run)
    migration.walk(run, migration.FORWARD, last="settle")
    with pytest.raises(PromiseBroken, match=named):
        migration.walk(run, migration.FORWARD, first="index", last="index")
    sql("CREATE OR REPLACE FUNCTION f(text) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT length($1)'")
    migration.walk(run, migration.FORWARD, first="index")


@pytest.mark.parametrize("event", ["sql_drop", pytest.param("ddl_command_start", marks=pytest.mark.long)])
def test_an_event_trigger_that_refuses_what_a_step_does_is_named_before(clinic: str, sql: Sql, event: str) -> None:
    sql("CREATE FUNCTION keep_all() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'ask the DBA'; END$$")
    sql(f"CREATE EVENT TRIGGER \"No drop\" ON {event} WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION keep_all()")
    run = migration.plan(clinic)
    refused = r'^The event trigger "No drop" does not let public\.users be migrated: ask the DBA\..*ALTER EVENT TRIGGER "No drop" DISABLE'
    with pytest.raises(PlanBlocked, match=refused):
        forecast.measure(run)
    sql('ALTER EVENT TRIGGER "No drop" DISABLE')
    sql("CREATE EVENT TRIGGER hours ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION keep_all()")
    with pytest.raises(
        PlanBlocked, match=r"^The event trigger \"hours\" does not let tables be made: ask the DBA\. ALTER EVENT TRIGGER"
    ):
        migration.plan(clinic)
    sql("DROP EVENT TRIGGER hours")
    assert "will take about" in forecast.measure(migration.plan(clinic)).sentence


def test_the_forecast_stands_beside_what_it_took(clinic: str, sql: Sql) -> None:
    run = migration.plan(clinic, unique="global")
    measured(run)
    before = forecast.beside(run)
    assert list(before) == ["what", "unit", "forecast"]  # nothing is done: no empty columns
    assert before["forecast"].notna().all()
    migration.walk(run, migration.FORWARD)
    beside = forecast.beside(run).set_index("what")
    assert (
        beside.loc[["01_backup", "02_partition", "03_restore", "04_foreign_keys", "05_cutover", "names locked", "WAL"], "actual"]
        .gt(0)
        .all()
    )
    assert beside.loc["06_verify"].isna()["actual"]
    assert beside.loc["rows", "error"] == "+0%"
    for what in ("the partitions", "their indexes"):  # the sample is the whole clinic
        assert beside.loc[what, "forecast"] == pytest.approx(beside.loc[what, "actual"], rel=0.35)
    assert beside.loc["names locked", "error"][-1] == "%"
    shown = forecast.shown(forecast.beside(run)).set_index("what")
    assert (shown.loc["rows", "forecast"], shown.loc["06_verify", "actual"]) == (f"{int(beside.loc['rows', 'forecast']):,}", "")
    assert not shown.loc[:, ["forecast", "actual"]].stack().str.endswith(".000").any()
    migration.back(run)
    assert forecast.beside(run).set_index("what").loc["03_restore", "actual"] == beside.loc["03_restore", "actual"]


def test_a_migration_under_way_and_a_repair_have_none(clinic: str, sql: Sql) -> None:
    run = migration.forward(clinic, "shadow")
    assert "under way" in forecast.measure(run).sentence
    migration.back(run)
    sql(f"{BY_HAND}; {FEW}")
    repair = migration.plan(clinic, partitions=None, backup="users_backup", **PLANNED)
    assert "A repair has no forecast" in forecast.measure(repair).sentence
    assert forecast.beside(repair).empty
    assert charts.forecast(forecast.beside(repair)) is None  # no empty picture


def test_the_disk_that_is_needed_is_held_against_what_is_free(clinic: str) -> None:
    facts = {**measured(migration.plan(clinic)).facts, "rows": 1000}
    assert facts["free_bytes"] > 0  # the tests' server is on this machine
    for free, said in ((None, "only the server's machine can tell"), (10**12, "MB are free)"), (10**6, "NOT ENOUGH")):
        assert said in forecast.sentence({**facts, "free_bytes": free})


@pytest.mark.long
def test_many_partitions_are_counted_and_so_are_the_locks_that_they_take(database: str, sql: Sql) -> None:
    """Most of a small index is its first pages; and each look-up without the key locks every one of them."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL, v int); CREATE INDEX ON t (v); CREATE INDEX ON t (k, v);"
        " INSERT INTO t SELECT n, 'k' || n % 80, n FROM generate_series(1, 20000) n")  # fmt: skip
    run = migration.plan(database, "t", "k", unique="per_partition")
    (found,) = [each for each in run.plan.findings if "max_locks_per_transaction" in each.way_out]
    assert "locks 324 tables and indexes" in found.sentence and found.level == "warning"
    foretold = forecast.measure(run).facts["index_bytes"]
    migration.walk(run, migration.FORWARD, last="index")
    assert 0.6 < foretold / run.finished("restore", "index").facts["index_bytes"] < 1.6
