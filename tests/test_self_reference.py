"""A table that references itself: the shadow gains the role column, the composite key points at the partitioned table."""

from __future__ import annotations

import psycopg
import pytest

from runbook import finish, verify
from runbook.ledger import Run
from tests import migration
from tests.walk import client

TABLE = """
CREATE TABLE staff (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, manager_id bigint REFERENCES staff {action},
  dept text NOT NULL, name text NOT NULL UNIQUE, mentor bigint REFERENCES staff (id) DEFERRABLE INITIALLY DEFERRED);
CREATE INDEX ON staff (manager_id);
INSERT INTO staff (dept, name) SELECT (ARRAY['ops', 'ops', 'eng', 'law'])[n % 4 + 1], 'person ' || n FROM generate_series(1, 500) n;
UPDATE staff SET manager_id = id / 10 + 1 WHERE id > 5;
UPDATE staff SET mentor = id WHERE id % 50 = 0
"""


def planned(url: str, action: str = "", **given: str) -> Run:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLE.format(action=action).encode())
        connection.execute("VACUUM ANALYZE staff")
    return migration.plan(url, "staff", "dept", unique="per_partition", **given)


@pytest.mark.parametrize("action", ["", "ON DELETE CASCADE"])
def test_it_migrates_is_verified_and_goes_back(database, sql, action):
    run = planned(database, action)
    before = client("pg_dump", "-s", "-N", "runbook", "--restrict-key=x", "-d", database)
    migration.walk(run, migration.FORWARD)
    for part in verify.PARTS.values():
        part(run)
    verify.check(run)
    assert sql("SELECT count(*) FROM staff WHERE manager_id IS NOT NULL AND manager_dept IS NULL") == [(0,)]
    assert sql("SELECT count(*) FROM staff s JOIN staff m ON m.id = s.manager_id WHERE s.manager_dept <> m.dept") == [(0,)]
    migration.walk(run, migration.BACK)
    assert client("pg_dump", "-s", "-N", "runbook", "--restrict-key=x", "-d", database) == before


def test_a_manager_who_moves_takes_the_reports_columns_along(database, server, sql):
    run = planned(database)
    migration.walk(run, migration.FORWARD, last="copy")
    sql("UPDATE staff SET dept = 'law' WHERE id = 2")  # its reports were copied with the old value
    migration.walk(run, migration.FORWARD, first="settle", last="index")
    sql("UPDATE staff SET dept = 'eng' WHERE id = 3")
    sql("UPDATE staff SET manager_id = 7 WHERE id = 77")
    migration.walk(run, migration.FORWARD, first="replay")
    wrong = "SELECT count(*) FROM staff s LEFT JOIN staff m ON m.id = s.manager_id WHERE s.manager_dept IS DISTINCT FROM m.dept"
    assert sql(wrong) == [(0,)]
    if server.version > 14:
        sql("UPDATE staff SET dept = 'new law' WHERE false")
        sql("UPDATE staff SET dept = 'law' WHERE id = 4")
        assert sql(wrong) == [(0,)]
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        sql("UPDATE staff SET manager_id = 100000 WHERE id = 9")
    migration.walk(run, migration.BACK)
    assert sql("SELECT manager_id FROM staff WHERE id = 77") == [(7,)]


@pytest.mark.long
def test_old_code_need_not_know_the_column(database, sql):
    run = planned(database)
    migration.walk(run, migration.FORWARD)
    sql("INSERT INTO staff (dept, name, manager_id) VALUES ('eng', 'new', 3)")
    assert sql("SELECT manager_dept = (SELECT dept FROM staff WHERE id = 3) FROM staff WHERE name = 'new'") == [(True,)]
    sql("INSERT INTO staff (id, dept, name, manager_id) OVERRIDING SYSTEM VALUE VALUES (9000, 'law', 'alone', 9000)")
    assert sql("SELECT manager_dept FROM staff WHERE id = 9000") == [("law",)]
    sql("SET session_replication_role = replica; UPDATE staff SET manager_id = 4 WHERE id = 9000")
    assert sql("SELECT s.manager_dept = m.dept FROM staff s JOIN staff m ON m.id = s.manager_id WHERE s.id = 9000") == [(True,)]


@pytest.mark.long
def test_who_comes_before_the_row_it_refers_to_must_name_the_column(database, sql):
    sql("CREATE TABLE page (id int PRIMARY KEY, kind text NOT NULL, up int REFERENCES page); INSERT INTO page VALUES (1, 'a'), (2, 'b'), (9, 'a');"
        " CREATE TABLE part (id int PRIMARY KEY, page int NOT NULL REFERENCES page); INSERT INTO part VALUES (1, 1)")  # fmt: skip
    run = migration.forward(database, table="page", key="kind")
    said = " ".join(each.sentence for each in run.plan.findings)
    assert "a row that an INSERT of several has before the one it refers to can be, too." in said
    assert (
        "a referencing row that one statement, as WITH … INSERT, writes before the row it refers to can be refused (23503)."
        in said
    )
    into = "WITH c AS (UPDATE part SET page = 3{} RETURNING page) INSERT INTO page SELECT page, 'b' FROM c"
    for early in ("INSERT INTO page VALUES (3, 'a', 4), (4, 'b', NULL)", into.format("")):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            sql(early)
    sql("INSERT INTO page (id, kind, up) VALUES (6, 'b', NULL), (5, 'a', 6)")
    sql("INSERT INTO page (id, kind, up, up_kind) VALUES (7, 'a', 8, 'b'), (8, 'b', NULL, NULL)")
    sql(into.format(", page_kind = 'b'"))


@pytest.mark.long
def test_the_old_key_has_no_row_without_its_column(database, sql):
    run = planned(database, legacy_inserts="strict")
    migration.walk(run, migration.FORWARD)
    with pytest.raises(psycopg.errors.CheckViolation):
        sql("INSERT INTO staff (dept, name, manager_id) VALUES ('eng', 'new', 3)")
    migration.walk(run, migration.BACK)


@pytest.mark.long
def test_who_needs_the_trigger_for_a_row_that_refers_to_itself_is_counted(database, sql):
    sql("CREATE TABLE partner (id serial PRIMARY KEY, kind text NOT NULL, main_id int REFERENCES partner)")
    sql("INSERT INTO partner (kind, main_id) SELECT (ARRAY['a', 'b'])[1 + n % 2], n FROM generate_series(1, 20) n")
    run = migration.forward(database, table="partner", key="kind")
    filled = f"SELECT count(*) FROM runbook_{run.migration}.filled"
    assert sql(filled) == [(0,)]
    if version(sql) >= 15:
        sql("UPDATE partner SET kind = 'a' WHERE id = 7")
        assert sql(filled) == [(1,)]
    sql("INSERT INTO partner (id, kind, main_id) VALUES (99, 'b', 99)")
    needed = sql(filled)[0][0]
    assert needed == (2 if version(sql) >= 15 else 1)
    sql("UPDATE partner SET kind = kind, main_id = main_id")
    assert sql(filled) == [(needed,)]
    verify.check(run)
    migration.walk(run, {"approval": migration.END["approval"], "drop": lambda run: finish.drop(run, keep_fill=True)})
    sql("INSERT INTO partner (id, kind, main_id) VALUES (100, 'b', 100)")
    assert sql("SELECT main_kind FROM partner WHERE id = 100") == [("b",)]


def version(sql):
    return int(sql("SHOW server_version_num")[0][0]) // 10000
