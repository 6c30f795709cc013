"""Honest advice in the plan: when partitioning will not help, and when there is no room for it."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

import runbook
from runbook import embedded
from runbook.errors import PlanBlocked
from runbook.findings import LEVELS
from tests import migration, servers

Sql = Callable[..., list[tuple[Any, ...]]]
DRAWN = {"table": "users", "key": "role", "partitions": migration.PARTITIONS}


def findings(url: str, level: str = "") -> str:
    found = runbook.draft(database=url, **DRAWN).findings()
    assert list(found["level"]) == sorted(found["level"], key=LEVELS.index)
    assert found["sentence"].str.endswith(".").all()
    return "\n".join(found[found["level"].isin([level] if level else LEVELS)]["sentence"])


def test_a_table_smaller_than_memory_is_told_that_reading_gains_nothing(clinic: str, sql: Sql) -> None:
    assert "is smaller than shared_buffers (134 MB)" in findings(clinic, "note")
    sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET effective_cache_size = ''10MB''', current_database()); END $$")
    sql("CREATE INDEX ON users (id) WITH (fillfactor = 10)")
    grow(sql, 200)
    assert "smaller than" not in findings(clinic)
    sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET effective_cache_size = ''1GB''', current_database()); END $$")
    assert "is smaller than effective_cache_size (1,074 MB)" in findings(clinic, "note")


def test_a_database_that_does_not_prune_is_told_so_before(clinic: str, sql: Sql) -> None:
    assert "enable_partition_pruning" not in findings(clinic)
    sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET enable_partition_pruning = off', current_database()); END $$")
    assert "every query would read all partitions of public.users" in findings(clinic, "warning")


def test_housekeeping_that_goes_by_ctid_is_named(clinic: str, sql: Sql) -> None:
    """What finds ten rows by their places deletes those of other partitions that lie at the same places."""
    assert "by ctid" not in findings(clinic)
    sql(
        "CREATE FUNCTION purge(days int) RETURNS void LANGUAGE sql AS 'DELETE FROM users WHERE ctid = ANY (ARRAY(SELECT ctid FROM users LIMIT days))'"
    )
    sql("CREATE FUNCTION other() RETURNS void LANGUAGE sql AS 'DELETE FROM doctors WHERE ctid IS NULL'")
    assert "public.purge(integer) changes rows by ctid, which is a place in every partition of public.users" in findings(
        clinic, "warning"
    )


def test_functions_and_triggers_that_the_cut_over_breaks_are_named(clinic: str, sql: Sql) -> None:
    said = findings(clinic)
    assert "42P10" not in said and "does not fire" not in said
    sql("CREATE FUNCTION sign_up(mail text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN INSERT INTO \"public\".users AS u (email) VALUES (mail)"
        " ON CONFLICT (\"email\") DO UPDATE SET email = mail; END $$;"
        " CREATE FUNCTION other() RETURNS void LANGUAGE sql AS 'WITH a AS (INSERT INTO users (email) VALUES (''x'') RETURNING id)"
        " INSERT INTO doctors (id) SELECT id FROM a ON CONFLICT (id) DO NOTHING';"
        " CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER promoted AFTER UPDATE OF role ON users FOR EACH ROW EXECUTE FUNCTION noted();"
        " CREATE TRIGGER logged AFTER INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION noted();"
        " CREATE TRIGGER counted AFTER UPDATE ON users FOR EACH STATEMENT EXECUTE FUNCTION noted()")  # fmt: skip
    said = findings(clinic, "warning")
    assert (
        "public.sign_up(text) inserts into public.users with ON CONFLICT (email), and fails from the cut-over on (42P10)." in said
    )
    assert "The trigger promoted (AFTER UPDATE OF role) does not fire for an update of role that moves the row" in said
    assert re.search("The trigger logged fires for an update of role, too, .*; to its function that is no UPDATE", said)
    assert "public.other()" not in said and "counted" not in said and "logged (" not in said


def grow(sql: Sql, megabytes: int) -> None:
    """As the server sees it, the table has so many MB more: its free space map is a file with a hole."""
    sql("VACUUM users")
    ((path,),) = sql("SELECT current_setting('data_directory') || '/' || pg_relation_filepath('users') || '_fsm'")
    with open(path, "r+b") as file:
        file.truncate(megabytes * 1_000_000 // 8192 * 8192)


def test_a_disk_without_room_for_it_stops_the_plan(clinic: str, sql: Sql) -> None:
    assert "disk" not in findings(clinic)
    grow(sql, int(shutil.disk_usage(Path.home()).total / 1e6 + shutil.disk_usage(tempfile.gettempdir()).total / 1e6))
    said = findings(clinic, "blocker")
    assert "There is not enough disk: the partitions, their indexes and the backup of public.users need up to" in said
    with pytest.raises(PlanBlocked, match="Make room first"):
        migration.plan(clinic)


def test_one_partition_with_nearly_everything_is_named(clinic: str, sql: Sql) -> None:
    sql("UPDATE users SET role = CASE WHEN id < 'a0000000-0000-0000-0000-000000000000' THEN 'user' ELSE 'doctor' END")
    assert "gain little" not in findings(clinic)
    sql("UPDATE users SET role = 'user' WHERE id < 'f2000000-0000-0000-0000-000000000000'")
    assert "of the rows fall into users_patients: queries that read it gain little." in findings(clinic, "note")
    sql("UPDATE users SET role = 'user'")
    assert "100.0% of the rows fall into users_patients" in findings(clinic, "warning")


def look_up(url: str, where: str, times: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET enable_seqscan = off")
        for _ in range(times):
            connection.execute(f"SELECT email FROM users WHERE {where}".encode())
        servers.flush_statistics(connection)


def test_index_scans_that_are_not_by_the_key_are_counted(clinic: str, sql: Sql) -> None:
    look_up(clinic, "email = 'x'", 900)
    assert "index scans" not in findings(clinic)  # too few to say anything
    look_up(clinic, "email = 'x'", 600)
    assert "of 10 index scans of public.users are of indexes without role" in findings(clinic, "warning")
    sql("CREATE INDEX ON users (role, created_at); ANALYZE users")
    look_up(clinic, "role = 'admin' AND created_at > now() + '1 day'", 2500)
    assert "index scans" not in findings(clinic)


@pytest.mark.long
def test_the_statements_themselves_are_asked_where_they_are_counted(server: servers.Server) -> None:
    settings = {"shared_preload_libraries": "pg_stat_statements"}
    with servers.start(server.version, settings=settings, complete=True) as own:
        embedded.load_clinic(own.conninfo(), users=200)
        with psycopg.connect(own.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements; SELECT pg_stat_statements_reset()")
        look_up(own.url(), "email = 'role'", 90)
        assert "of 10 calls" not in findings(own.url())
        look_up(own.url(), "email = 'role'", 60)
        assert "do not name role (by pg_stat_statements): each of them will visit all 3 partitions." in findings(
            own.url(), "warning"
        )
        look_up(own.url(), "email = 'x' AND role = 'doctor'", 400)
        assert "of 10 calls" not in findings(own.url())
