"""A table that references the source may be partitioned itself: its leaves are logged, filled in and keyed like any table."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from runbook import cutover, verify
from runbook.errors import LockNotGranted, PromiseBroken
from tests import migration
from tests.walk import client

TABLES = """
CREATE TABLE device (id bigint PRIMARY KEY, kind text NOT NULL, name text NOT NULL UNIQUE);
CREATE TABLE reading (device_id bigint NOT NULL REFERENCES device ON DELETE CASCADE, at date NOT NULL, value float8,
  spare bigint CONSTRAINT reading_spare REFERENCES device (id), PRIMARY KEY (device_id, at)) PARTITION BY RANGE (at);
CREATE TABLE reading_1 PARTITION OF reading FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE reading_2 PARTITION OF reading FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY HASH (device_id);
CREATE TABLE reading_2a PARTITION OF reading_2 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE reading_2b PARTITION OF reading_2 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
COMMENT ON CONSTRAINT reading_spare ON reading IS 'kept';
INSERT INTO device SELECT n, (ARRAY['meter', 'meter', 'valve', 'pump'])[n % 4 + 1], 'device ' || n FROM generate_series(1, 400) n;
INSERT INTO reading SELECT n % 400 + 1, date '2026-01-01' + n / 400, n, CASE WHEN n % 3 = 0 THEN n % 400 + 1 END
  FROM generate_series(0, 20000) n
"""
WRONG = (
    "SELECT count(*) FROM reading r JOIN device d ON d.id = r.device_id LEFT JOIN device s ON s.id = r.spare"
    " WHERE r.device_kind <> d.kind OR r.spare IS NOT NULL AND r.spare_kind IS DISTINCT FROM s.kind"
)


@pytest.mark.parametrize("by", [{}, pytest.param({"partition_by": "hash", "modulus": 3, "key": "id"}, marks=pytest.mark.long)])
def test_it_is_filled_keyed_verified_and_left_as_it_was(database, sql, by):
    for each in TABLES.split(";"):
        sql(each)
    before = client("pg_dump", "-s", "-N", "runbook", "--restrict-key=x", "-d", database)
    run = migration.plan(database, "device", **{"key": "kind", "unique": "per_partition", **by})
    migration.walk(run, migration.FORWARD, last="columns")
    if not by:
        sql("UPDATE reading SET device_id = 399, at = '2026-02-24' WHERE device_id = 12 AND at = '2026-01-05'")
        sql("INSERT INTO reading_2a SELECT n, '2026-02-25' FROM generate_series(1, 400) n WHERE satisfies_hash_partition("
            "'reading_2'::regclass, 2, 0, n::bigint)")  # fmt: skip
        sql("UPDATE device SET kind = 'gone' WHERE id = 3")
        sql("UPDATE device SET kind = 'pump' WHERE id = 3")
    migration.walk(run, migration.FORWARD, first="fill")
    for part in verify.PARTS.values():
        part(run)
    verify.check(run)
    assert sql("SELECT count(*) > 20000 FROM reading") == [(True,)] or by
    if not by:
        assert sql(WRONG) == [(0,)]
        sql("INSERT INTO reading (device_id, at) VALUES (2, '2026-02-27')")
        sql(
            "INSERT INTO reading_1 (device_id, at, spare) VALUES (1, '2026-01-30', 8) ON CONFLICT (device_id, at) DO UPDATE SET spare = 8"
        )
        sql("SET session_replication_role = replica; INSERT INTO reading_2 (device_id, at) VALUES (4, '2026-02-27')")
        sql("CREATE TABLE reading_3 PARTITION OF reading FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')")
        sql("SET session_replication_role = replica; INSERT INTO reading (device_id, at) VALUES (4, '2026-03-27')")
        sql("DROP TABLE reading_3")
        assert sql(WRONG) == [(0,)]
        with pytest.raises(errors.ForeignKeyViolation):
            sql("INSERT INTO reading (device_id, at) VALUES (90000, '2026-02-27')")
        sql("DELETE FROM device WHERE id = 400")
        sql("DELETE FROM reading WHERE at = '2026-02-27'")
    migration.walk(run, migration.BACK)
    assert client("pg_dump", "-s", "-N", "runbook", "--restrict-key=x", "-d", database) == before
    with pytest.raises(errors.ForeignKeyViolation):
        sql("INSERT INTO reading (device_id, at) VALUES (90000, '2026-02-27')")


@pytest.mark.long
def test_partitions_that_come_and_go_meanwhile_are_followed(database, sql):
    """As a job makes and drops them every month: before the cut-over 04 has to look again, after it the key goes on as it is."""
    for each in TABLES.split(";"):
        sql(each)
    run = migration.plan(database, "device", key="kind", unique="per_partition")
    migration.walk(run, migration.FORWARD, last="keys check")
    sql("CREATE TABLE reading_3 PARTITION OF reading FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')")
    sql("INSERT INTO reading SELECT n, '2026-03-05' FROM generate_series(1, 400) n")
    sql("DROP TABLE reading_1")
    with pytest.raises(PromiseBroken, match="a partition of it came since 04"):
        migration.walk(run, migration.FORWARD, first="approval")
    migration.walk(run, migration.FORWARD, first="columns", last="swap")
    sql("DROP TABLE reading_2")
    sql("CREATE TABLE reading_4 PARTITION OF reading FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')")
    sql("INSERT INTO reading SELECT n, '2026-04-05', n, NULL, kind FROM device, generate_series(1, 9) n WHERE id = n")
    migration.walk(run, migration.FORWARD, first="validate")
    assert sql(WRONG) == [(0,)]
    with pytest.raises(errors.ForeignKeyViolation):
        sql("INSERT INTO reading (device_id, at) VALUES (90000, '2026-04-27')")
    migration.walk(run, migration.BACK)
    assert sql("SELECT count(*) FROM reading") == [(409,)]


@pytest.mark.long
def test_a_validation_that_did_not_get_its_lock_is_taken_up_where_it_stopped(database, sql):
    """Before 18 a partitioned table takes a key by an ADD of its own, which is not to be done twice."""
    for each in TABLES.split(";"):
        sql(each)
    sql("CREATE TABLE maker (id bigint PRIMARY KEY); CREATE TABLE town (id bigint PRIMARY KEY)")
    sql("ALTER TABLE device ADD maker bigint REFERENCES maker, ADD town bigint REFERENCES town")
    run = migration.plan(database, "device", key="kind", unique="per_partition")
    migration.walk(run, migration.FORWARD, last="swap")
    with psycopg.connect(database) as writer:
        writer.execute("INSERT INTO town VALUES (1)")
        if run.plan.server_version < 18:
            with pytest.raises(LockNotGranted, match=f"pid {writer.info.backend_pid}"):
                cutover.validate_foreign_keys(run, budget_s=1)
    migration.walk(run, migration.FORWARD, first="validate")
    assert sql("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND NOT convalidated") == [(0,)]
    migration.walk(run, migration.BACK)
