"""A new value on Monday: partitions are added under light locks, and each can be looked after by itself."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

import runbook
from runbook import additions, charts, ledger, verify
from runbook.database import target
from runbook.errors import ApprovalMissing, BadInput, LockNotGranted, OutOfOrder, PlanBlocked, PlanOutdated, PromiseBroken
from tests import migration
from tests.walk import dump, walk

NURSES = {"users_nurses": ["nurse"]}
REST = {"users_patients": ["user"], "users_rest": "default"}


def insert(email: str, role: str) -> str:
    return f"INSERT INTO users (email, password, first_name, last_name, role) VALUES ('{email}', 'p', 'N', 'N', '{role}')"


def approved(run: runbook.ledger.Run, **given: Any) -> additions.Draft:
    draft = additions.draft(run, **given)
    draft.freeze()
    additions.require_approval(draft, "a test")
    return draft


def add(run: runbook.ledger.Run, **given: Any) -> additions.Draft:
    draft = approved(run, **given)
    additions.add(draft, 300, 30)
    additions.validate(draft)
    additions.check(draft)
    return draft


@contextmanager
def locked(url: str, *statements: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that holds what these statements lock, rolled back at the end."""
    with psycopg.connect(url) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[call-overload]
        yield connection
        connection.rollback()


@pytest.mark.parametrize("unique", ["global", pytest.param("per_partition", marks=pytest.mark.long)])
def test_a_new_value_gets_a_partition(forward, clinic, sql, unique):
    before = dump(clinic, "--exclude-schema=runbook*", "--exclude-table=users_backup")
    run = forward(unique=unique)
    with pytest.raises(psycopg.errors.CheckViolation):
        sql(insert("nurse@x", "nurse"))
    add(run, add=NURSES)
    sql(insert("nurse@x", "nurse"))
    sql(
        "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT u.id, d.id, now() FROM users u, doctors d WHERE u.role = 'nurse' LIMIT 1"
    )
    assert sql("SELECT count(*) FROM users_nurses n JOIN appointments a ON (a.user_id, a.user_role) = (n.id, n.role)") == [(1,)]
    verify.check(run)
    proved = {each.promise: each for each in verify.seen(run)}
    for promise in ("users_nurses holds its own rows only", "Queries for users_nurses read no other partition",
                    "A row of users_nurses can be deleted and inserted again"):  # fmt: skip
        assert proved[promise].verdict == "pass", proved[promise]
    assert proved["users_nurses holds its own rows only"].seen.startswith("1 row,")
    assert "SELECT 'users_nurses', COUNT(*)" in proved["psql shows the table, its rows, its plan and its keys"].sql
    rows, pruned = verify.distribution(run), verify.pruning(run)
    assert [(int(rows["rows"].sum()),)] == sql("SELECT count(*) FROM users") and set(pruned["of"]) == {4}
    assert (
        "users_nurses when the plan was made 0, now 1" in charts.before_after(rows).words
        and "users_nurses 1 (" in charts.rows_per_partition(rows).words
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(insert("nurse@x", "nurse"))
    if unique == "global":
        with pytest.raises(psycopg.errors.UniqueViolation):
            sql(insert("nurse@x", "doctor"))
    same = (
        """SELECT replace(pg_get_indexdef(indexrelid), 'users_{0}', 'x') FROM pg_index WHERE indrelid = 'users_{0}'::regclass"""
    )
    assert len(sql(same.format("nurses"))) == len(sql(same.format("doctors")))
    assert add(run, add=NURSES).growth.additions == ()  # once more harms nothing
    migration.back(run)
    assert sql("SELECT role FROM users WHERE email = 'nurse@x'") == [("nurse",)]
    sql(
        "DELETE FROM appointments WHERE user_id = (SELECT id FROM users WHERE role = 'nurse'); DELETE FROM users WHERE role = 'nurse'"
    )
    assert dump(clinic, "--exclude-schema=runbook*", "--exclude-table=users_backup") == before


def test_rows_of_the_default_partition_go_over_with_all_that_refers_to_them(clinic, sql):
    sql("CREATE TABLE audit (what text); CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit VALUES (TG_OP); RETURN NULL; END $$;"
        " CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON users FOR EACH ROW EXECUTE FUNCTION audit();"
        " CREATE CONSTRAINT TRIGGER audit_late AFTER INSERT OR DELETE ON users DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit()")  # fmt: skip
    sql("ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey, ADD CONSTRAINT appointments_user_id_fkey"
        " FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE")  # fmt: skip
    run = migration.forward(clinic, unique="global", partitions=REST)
    rows, referring = sql("SELECT count(*) FROM users WHERE role = 'doctor'")[0][0], sql("SELECT count(*) FROM appointments")
    audited = sql("SELECT count(*) FROM audit")
    draft = add(run, add={"users_doctors": ["doctor"]})
    assert draft.growth.additions[0].waiting == rows > 0
    assert sql("SELECT count(*), count(*) FILTER (WHERE role = 'doctor') FROM users_doctors") == [(rows, rows)]
    assert sql("SELECT count(*) FROM users_rest WHERE role = 'doctor'") == [(0,)]
    assert (sql("SELECT count(*) FROM appointments"), sql("SELECT count(*) FROM audit")) == (referring, audited)
    assert sql("SELECT bool_and(convalidated) FROM pg_constraint WHERE contype = 'f' AND conparentid = 0") == [(True,)]
    verify.check(run)
    sql("UPDATE users SET first_name = 'audited' WHERE id = (SELECT id FROM users_rest LIMIT 1)")
    assert sql("SELECT count(*) FROM audit") == [(audited[0][0] + 1,)]
    migration.back(run)
    assert sql("SELECT count(*) FROM users WHERE role = 'doctor'") == [(rows,)]


@pytest.mark.long
def test_a_key_of_the_same_name_in_another_schema_is_another(clinic, sql):
    """One of the two was NOT VALID before anything was done, and stays that."""
    sql("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.appointments (id int PRIMARY KEY, user_id uuid,"
        " CONSTRAINT appointments_user_id_fkey FOREIGN KEY (user_id) REFERENCES users)")  # fmt: skip
    sql("ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey, ADD CONSTRAINT appointments_user_id_fkey"
        " FOREIGN KEY (user_id) REFERENCES users NOT VALID")  # fmt: skip
    run = migration.forward(clinic, partitions=REST)
    draft = add(run, add={"users_doctors": ["doctor"]})
    assert draft.growth.additions[0].waiting > 0
    keys = (
        "SELECT conrelid::regclass::text, convalidated FROM pg_constraint WHERE conname = 'appointments_user_id_fkey' ORDER BY 1"
    )
    assert sql(keys) == [("appointments", False), ("elsewhere.appointments", True)]
    sql("ALTER TABLE elsewhere.appointments DROP CONSTRAINT appointments_user_id_fkey")
    sql(
        "ALTER TABLE elsewhere.appointments ADD CONSTRAINT appointments_user_id_fkey FOREIGN KEY (user_id, user_role) REFERENCES users (id, role) NOT VALID"
    )
    with pytest.raises(PromiseBroken, match="lacks appointments_user_id_fkey"):
        additions.check(draft)


@pytest.mark.long
def test_no_write_to_the_default_partition_is_lost_meanwhile(forward, clinic, sql):
    run = forward(unique="global", partitions=REST)
    acknowledged, stop = [], threading.Event()

    def write() -> None:
        number = 0
        with psycopg.connect(clinic, autocommit=True) as connection:
            while not stop.is_set():
                number += 1
                connection.execute(insert(f"w{number}@x", ("nurse", "clerk", "user")[number % 3]))  # type: ignore[call-overload]
                acknowledged.append(f"w{number}@x")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(acknowledged) < 30:
            assert writer.is_alive()
        add(run, add=NURSES | {"users_clerks": ["clerk"]})
    finally:
        stop.set()
        writer.join()
    assert sql("SELECT count(*) FROM users WHERE email LIKE 'w%@x'") == [(len(acknowledged),)]
    assert sql("SELECT count(*) FROM users_rest WHERE role IN ('nurse', 'clerk')") == [(0,)]
    verify.check(run)


@pytest.mark.long
def test_whoever_waits_while_rows_go_over_finds_them(database, sql):
    """A session that has read the list of partitions, and then waits for the default one, would find it without these rows."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL, n int);"
        " CREATE FUNCTION slow(id int) RETURNS bool LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_sleep(1) WHERE id = 1 AND current_query() LIKE '%FROM ONLY%'; RETURN true; END$$;"
        " ALTER TABLE t ADD CONSTRAINT slow CHECK (slow(id));"
        " INSERT INTO t SELECT n, CASE WHEN n < 100 THEN 'big' ELSE 'a' END, 0 FROM generate_series(1, 200) n")  # fmt: skip
    run = migration.plan(database, "t", "k", partitions={"t_a": ["a"], "t_rest": "default"}, unique="per_partition")
    migration.walk(run, migration.FORWARD)
    draft = approved(run, add={"t_big": ["big"]})
    adding = threading.Thread(target=additions.add, args=(draft,))
    adding.start()
    held = "SELECT count(*) FROM pg_locks WHERE relation = 't_rest'::regclass AND mode = 'AccessExclusiveLock' AND granted"
    while sql(held) == [(0,)]:
        assert adding.is_alive()
    with psycopg.connect(database, autocommit=True) as other:
        assert other.execute("UPDATE t SET n = 1 WHERE id = 2").rowcount == 1
        assert other.execute("DELETE FROM t WHERE id = 3").rowcount == 1
    adding.join()
    assert sql("SELECT count(*), sum(n) FROM t_big") == [(98, 1)]


def test_a_snapshot_to_which_rows_that_go_over_would_be_missing_is_waited_for_and_named(database, sql):
    """The new partition is there for everybody at once, and its rows not for who has looked before."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL); INSERT INTO t VALUES (1, 'a'), (2, 'big'); CREATE TABLE other ()")
    run = migration.forward(database, table="t", key="k", partitions={"t_a": ["a"], "t_rest": "default"})
    draft = approved(run, add={"t_big": ["big"]})
    with locked(database, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT FROM other") as reader:
        with pytest.raises(LockNotGranted, match=rf"A snapshot older than the move to t_big .* pid {reader.info.backend_pid} "):
            additions.add(draft, 300, 0.5)
        assert reader.execute("SELECT count(*) FROM t WHERE k = 'big'").fetchone() == (1,)
    additions.add(draft, 300, 30)
    assert sql("SELECT id FROM t_big") == [(2,)]


@pytest.mark.long
def test_readers_and_writers_do_not_wait_for_it_and_it_does_not_wait_for_them(forward, clinic, sql):
    run = forward()
    statements = (insert("open@x", "user"), "SELECT * FROM users", "UPDATE users SET first_name = 'open' WHERE role = 'doctor'")
    with locked(clinic, *statements):
        add(run, add=NURSES)
    assert sql("SELECT count(*) FROM users_nurses") == [(0,)]


@pytest.mark.long
def test_who_is_in_the_way_is_named_and_nothing_is_changed(forward, clinic, sql):
    run = forward()
    draft = approved(run, add=NURSES)
    with (
        locked(clinic, "LOCK TABLE ONLY users IN SHARE UPDATE EXCLUSIVE MODE") as other,
        pytest.raises(LockNotGranted, match=str(other.info.backend_pid)),
    ):
        additions.add(draft, 100, 1)
    assert "users_nurses" not in additions.tree(run)["partition"].to_list()
    additions.add(draft, 300, 30)
    additions.check(draft)


def leave_behind(clinic: str, draft: additions.Draft) -> None:
    """Make the partition, and fail to attach it."""
    with locked(clinic, "LOCK TABLE ONLY users IN SHARE UPDATE EXCLUSIVE MODE"), pytest.raises(LockNotGranted):
        additions.add(draft, 100, 1)


@pytest.mark.long
def test_the_same_command_goes_on_after_it_could_not_attach(forward, clinic, sql):
    run = forward()
    leave_behind(clinic, approved(run, add=NURSES))
    assert sql("SELECT relispartition FROM pg_class WHERE oid = 'users_nurses'::regclass") == [(False,)]
    assert 'DROP TABLE "public"."users_nurses"' in repr(additions.draft(run, add=NURSES).preview())
    walk(clinic, "20_add_partitions", add=NURSES | {"users_clerks": ["clerk"]}, approved_by="ann")
    sql(insert("nurse@x", "nurse"))
    sql(insert("clerk@x", "clerk"))
    assert sql("SELECT obj_description('users_nurses'::regclass)") == [(None,)]


@pytest.mark.long
@pytest.mark.parametrize("end", [migration.BACK, migration.END], ids=["back", "end"])
def test_what_it_made_and_could_not_attach_goes_with_the_migration(forward, clinic, sql, end):
    run = forward()
    verify.check(run)
    leave_behind(clinic, approved(run, add=NURSES))
    migration.walk(run, end)
    assert sql("SELECT to_regclass('users_nurses')") == [(None,)]


@pytest.mark.long
def test_the_end_waits_until_keys_that_stood_aside_are_valid_again(forward, clinic, sql):
    run = forward(partitions=REST)
    verify.check(run)
    sql(insert("nurse@x", "nurse"))
    draft = approved(run, add=NURSES)
    additions.add(draft, 300, 30)
    with pytest.raises(OutOfOrder, match="if 20_add_partitions was stopped, run it again"):
        migration.walk(run, migration.END)
    additions.validate(draft)
    migration.walk(run, migration.END)


@pytest.mark.long
def test_what_somebody_else_made_meanwhile_is_named_and_survives(forward, clinic, sql):
    run = forward()
    draft = approved(run, add=NURSES)
    marks = ("NULL", "'Made by the partition runbook, to be attached to public.doctors: plan 123'")
    for mark in marks:
        sql(f"CREATE TABLE users_nurses AS SELECT 1 AS theirs; COMMENT ON TABLE users_nurses IS {mark}")
        with pytest.raises(PlanBlocked, match=r"public\.users_nurses is taken\. .*rename what has it"):
            additions.add(draft, 300, 30)
        assert sql("SELECT theirs FROM users_nurses") == [(1,)]
        sql("DROP TABLE users_nurses")
    leave_behind(clinic, draft)
    sql(insert("nurse@x", "nurse").replace("INTO users", "INTO users_nurses"))
    for attempt in (lambda: additions.add(draft, 300, 30), lambda: additions.draft(run, add=NURSES).freeze()):
        with pytest.raises(PlanBlocked, match=r"public\.users_nurses, .* has rows by now"):
            attempt()
    assert sql("SELECT email FROM users_nurses") == [("nurse@x",)]
    sql("TRUNCATE users_nurses")
    add(run, add=NURSES)


GRANTED = """
    SELECT grantee::regrole::text, privilege_type, is_grantable FROM pg_class, aclexplode(relacl)
     WHERE pg_class.oid = '{0}'::regclass AND grantee <> relowner
    UNION ALL
    SELECT grantee::regrole::text, privilege_type || attname, is_grantable FROM pg_attribute, aclexplode(attacl)
     WHERE attrelid = '{0}'::regclass ORDER BY 1, 2
"""


@pytest.mark.parametrize("secured", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_new_partition_is_granted_what_all_others_are(clinic, sql, secured):
    sql("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO clinic_app, PUBLIC;"
        " GRANT SELECT (id), UPDATE (phone) ON users TO pg_monitor; GRANT SELECT (email) ON users TO PUBLIC;"
        " GRANT DELETE ON users TO pg_monitor WITH GRANT OPTION")  # fmt: skip
    if secured:
        sql("ALTER TABLE users ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON users USING (email = current_user)")
    run = migration.forward(clinic)
    sql("GRANT TRUNCATE ON users_patients TO clinic_app")
    add(run, add=NURSES)
    granted = sql(GRANTED.format("users_nurses"))
    assert granted == sql(GRANTED.format("users_admins")) and bool(granted) != secured


MONTHS = {"t_2020_01": ["2020-01-01", "2020-02-01"], "t_2020_02": ["2020-02-01", "2020-03-01"]}
FAR = {"t_far": ["2999-01-01", None]}


def steps(sql: Any, database: str, key_type: str, rows: str, partitions: dict[str, Any], **given: Any) -> dict[str, str]:
    """What 20 adds by steps to a table with these rows and partitions."""
    sql(
        f"CREATE TABLE t (id int PRIMARY KEY, at {key_type} NOT NULL); INSERT INTO t SELECT row_number() OVER (), v FROM ({rows}) r (v)"
    )
    run = migration.forward(database, table="t", key="at", partition_by="range", partitions=partitions)
    return {each.name: each.bound for each in add(run, **given).growth.additions}


@pytest.mark.parametrize(
    ("partitions", "rows", "asked"),
    [
        (MONTHS | FAR, "VALUES (date '2020-02-03'), ('2999-12-31')", {}),
        (MONTHS | {"t_far": ["2999-01-01", "3000-01-01"]}, "VALUES (date '2020-02-03'), ('2999-12-31')", {}),
        (MONTHS | {"rest": "default"}, "VALUES (date '2020-02-03'), ('2999-12-31')", {"add": FAR}),
    ],
    ids=["that has no end", "that has one", "that is added"],
)
def test_what_lies_far_off_has_a_partition_of_its_own_and_keeps_none_from_the_next_months(database, sql, partitions, rows, asked):
    added = steps(sql, database, "date", rows, partitions, every="year", ahead=1, **asked)
    this = sql("SELECT extract(year FROM now())::int")[0][0]
    years = {f"t_{year}": f"FOR VALUES FROM ('{year}-01-01') TO ('{year + 1}-01-01')" for year in range(2021, this + 2)}
    first = {"t_2020": "FOR VALUES FROM ('2020-03-01') TO ('2021-01-01')"}
    assert {name: bound for name, bound in added.items() if name != "t_far"} == first | years
    sql("INSERT INTO t VALUES (99, now())")


def test_what_a_partition_leaves_of_a_step_is_added_too(database, sql):
    """As of one made by hand, for half a step or in another time zone."""
    assert steps(sql, database, "int", "VALUES (1)", {"t_0": [0, 100]}, every=100, ahead=0) == {}
    sql("CREATE TABLE t_late PARTITION OF t FOR VALUES FROM (200) TO (250)")
    found = add(ledger.of(target(database), "t"), every=100, ahead=3).growth.additions
    assert [each.bound for each in found] == [
        "FOR VALUES FROM (100) TO (200)",
        "FOR VALUES FROM (250) TO (300)",
        "FOR VALUES FROM (300) TO (400)",
    ]


@pytest.mark.long
def test_a_new_partition_belongs_to_whom_the_table_belongs_now(forward, clinic, sql):
    run = forward()
    role = sql("SELECT format('%I', 'clerk of ' || current_database())")[0][0]
    sql(f"CREATE ROLE {role}; ALTER TABLE users OWNER TO {role}")
    try:
        add(run, add={"users_nurses": ["nurse"]})
        assert sql("SELECT quote_ident(pg_get_userbyid(relowner)) FROM pg_class WHERE relname = 'users_nurses'") == [(role,)]
    finally:
        sql(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_where_the_last_partition_has_no_end_there_is_nothing_to_add(database, sql):
    partitions = {"t_0": [None, 100], "t_100": [100, None]}
    assert steps(sql, database, "int", "VALUES (1), (2000000001)", partitions, every=100) == {}
    with pytest.raises(BadInput, match=r"every is 'month', which does not fit at \(integer\)"):
        add(runbook.open(database, "t"), every="month")


def test_numbers_far_off_are_no_end_to_go_on_from(database, sql):
    partitions = {"t_0": [0, 100], "t_far": [2_000_000_000, 2_100_000_000]}
    added = steps(sql, database, "int", "VALUES (1), (2000000001)", partitions, every=100, ahead=2)
    assert added == {"t_100": "FOR VALUES FROM (100) TO (200)", "t_200": "FOR VALUES FROM (200) TO (300)"}


@pytest.mark.long
def test_what_lies_far_off_and_has_none_is_not_gone_after(database, sql):
    with pytest.raises(BadInput, match=r"more than 1,000 partitions of t, .* name a partition of their own"):
        steps(sql, database, "date", "VALUES (date '2020-02-03'), ('2999-12-31')", MONTHS | {"rest": "default"}, every="month")


def test_a_gap_before_the_last_partitions_stays_one(database, sql):
    """What retention dropped does not come back."""
    partitions = {"t_0": [0, 100], "t_200": [200, 300], "t_300": [300, 350]}
    added = steps(sql, database, "int", "VALUES (1), (210), (340)", partitions, every=100, ahead=1)
    assert list(added.values()) == ["FOR VALUES FROM (350) TO (400)", "FOR VALUES FROM (400) TO (500)"]


@pytest.mark.parametrize("key_type", ["smallint", "int", "bigint"])
def test_where_the_numbers_end_the_last_partition_has_no_end(database, sql, key_type):
    last = {"smallint": 2**15, "int": 2**31, "bigint": 2**63}[key_type] - 1
    step = (last + 1) // 4
    sql(
        f"CREATE TABLE t (id int PRIMARY KEY, at {key_type} NOT NULL); INSERT INTO t VALUES (1, {-last}), (2, {step}), (3, {last})"
    )
    given = {"partition_by": "range", "every": step}
    draft = migration.plan(database, "t", "at", ahead=3, **given)
    bounds = [each.bound for each in draft.plan.partitions]
    assert (len(bounds), bounds[0][:26], bounds[-1][-13:]) == (8, "FOR VALUES FROM (MINVALUE)", "TO (MAXVALUE)")
    migration.walk(draft, migration.FORWARD)
    assert add(draft, every=step, ahead=3).growth.additions == ()


@pytest.mark.long
def test_it_works_after_91_and_for_the_next_months(database, sql):
    sql(
        "CREATE TABLE visits (id int PRIMARY KEY, at timestamptz NOT NULL); INSERT INTO visits SELECT n, now() - n * interval '1 day' FROM generate_series(0, 40) n"
    )
    given = {"partition_by": "range", "every": "month", "ahead": 0}
    run = migration.forward(database, table="visits", key="at", **given)
    verify.check(run)
    migration.walk(run, migration.END)
    run = runbook.open(database, "visits")
    had = len(additions.tree(run))
    assert len(add(run, every="month", ahead=3).growth.additions) == 3
    assert len(additions.tree(run)) == had + 3
    assert add(run, every="month", ahead=3).growth.additions == ()
    sql("INSERT INTO visits VALUES (99, now() + interval '2 months')")
    verify.structure(run)
    assert not [each for each in verify.seen(run) if each.promise == "It is partitioned as planned" and each.verdict != "pass"]


REFUSED: dict[str, dict[str, Any]] = {
    "add is empty": {},
    'users_more" would overlap partition "users_patients': {"add": {"users_more": ["user"]}},
    "is taken": {"add": {"doctors": ["nurse"]}},
    r"public\.users_patients is taken": {"add": {"users_patients": ["USER"]}},
    "has no value": {"add": {"users_nurses": []}},
}


def test_what_cannot_be_added_is_refused_and_nothing_is_made(forward, clinic, sql):
    run = forward()
    before = dump(clinic, "--exclude-schema=runbook")
    for said, given in REFUSED.items():
        with pytest.raises((BadInput, PlanBlocked), match=said):
            additions.draft(run, **given).freeze()
    assert dump(clinic, "--exclude-schema=runbook") == before


def test_it_has_its_time_and_its_approval(clinic, database, sql):
    run = migration.plan(clinic)
    with pytest.raises(OutOfOrder, match="not partitioned yet"):
        additions.draft(run, add=NURSES)
    migration.walk(run, migration.FORWARD)
    draft = additions.draft(run, add=NURSES)
    draft.freeze()
    with pytest.raises(ApprovalMissing):
        additions.require_approval(draft, "")
    with pytest.raises(ApprovalMissing):
        additions.add(draft)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE things (id int PRIMARY KEY)")
    hashed = migration.forward(database, table="things", key="id", partition_by="hash", modulus=2)
    with pytest.raises(BadInput, match="another modulus"):
        additions.draft(hashed, add={"more": [2]})


def test_the_notebook_adds_a_partition(forward, clinic, sql):
    forward()
    walk(clinic, "20_add_partitions", add=NURSES, approved_by="ann")
    sql(insert("nurse@x", "nurse"))


UPKEEP = {
    "emptied": ["DELETE FROM users_doctors WHERE id NOT IN (SELECT user_id FROM appointments)"],
    "vacuumed": ["VACUUM (ANALYZE) users_doctors"],
    "vacuumed in full": ["VACUUM (FULL) users_doctors"],
    "re-indexed": ["REINDEX TABLE users_doctors"],
    "re-indexed concurrently": ["REINDEX TABLE CONCURRENTLY users_doctors"],
    "detached and attached": [
        "DELETE FROM appointments WHERE user_role = 'doctor'", "ALTER TABLE users DETACH PARTITION users_doctors CONCURRENTLY",
        "ALTER TABLE users ATTACH PARTITION users_doctors FOR VALUES IN ('doctor')"],
}  # fmt: skip


SHORT = ("detached and attached",)


@pytest.mark.parametrize("what", [each if each in SHORT else pytest.param(each, marks=pytest.mark.long) for each in UPKEEP])
def test_one_partition_is_looked_after_while_the_others_are_locked(forward, clinic, sql, what):
    forward()
    # Whoever works with another partition, and even locks it against everybody, neither waits nor is waited for.
    others = ("users_patients", "users_admins")
    locks = [f"LOCK TABLE ONLY {name} IN ACCESS EXCLUSIVE MODE" for name in others]
    with locked(clinic, *locks), psycopg.connect(clinic, autocommit=True) as connection:
        connection.execute("SET lock_timeout = '2s'")
        for statement in UPKEEP[what]:
            connection.execute(statement)  # type: ignore[call-overload]
    assert sql("SELECT count(*) FROM users WHERE role = 'user'") == [(949,)]


@pytest.mark.long
@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("DELETE FROM users_doctors WHERE false", marks=pytest.mark.long),
        pytest.param("REINDEX TABLE users_doctors", marks=pytest.mark.long),
        "LOCK TABLE users_doctors",
    ],
)
def test_the_application_works_with_the_other_partitions_meanwhile(forward, clinic, sql, statement):
    forward()
    with locked(clinic, statement), psycopg.connect(clinic) as application:
        application.execute("SET lock_timeout = '2s'")
        application.execute(insert("meanwhile@x", "user"))  # type: ignore[call-overload]
        application.execute("UPDATE users SET first_name = 'meanwhile' WHERE role = 'admin'")
        assert application.execute("SELECT count(*) FROM users WHERE role = 'user'").fetchone() == (950,)


def test_guards_follow_a_partition_that_is_detached_and_attached(forward, sql):
    run = forward(unique="global")
    shown = (
        repr(additions.draft(run, add=NURSES).upkeep())
        .replace("users_patients", "users_doctors")
        .replace("('user')", "('doctor')")
    )
    forget = [each for each in shown.split(";") if "DELETE FROM" in each and "_unique" in each]
    take = [each for each in shown.split(";") if "INSERT INTO" in each]
    sql("DELETE FROM appointments WHERE user_role = 'doctor'")
    email = sql("SELECT email FROM users_doctors LIMIT 1")[0][0]
    sql(f"ALTER TABLE users DETACH PARTITION users_doctors; {';'.join(forget)}; {insert(email, 'user')}")
    attach = f"ALTER TABLE users ATTACH PARTITION users_doctors FOR VALUES IN ('doctor'); {';'.join(take)}"
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(f"BEGIN; {attach}; COMMIT")
    sql(f"DELETE FROM users WHERE email = '{email}'; BEGIN; {attach}; COMMIT")
    verify.check(run)
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(insert(email, "user"))


def test_the_statements_for_one_partition_name_one_that_is_there(forward, sql):
    run = forward()
    sql("ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey; ALTER TABLE users DETACH PARTITION users_patients;"
        " CREATE SCHEMA old; ALTER TABLE users_doctors SET SCHEMA old")  # fmt: skip
    shown = repr(additions.draft(run, add=NURSES).upkeep())
    assert "users_patients" not in shown and 'DELETE FROM "old"."users_doctors"' in shown
    assert """ATTACH PARTITION "old"."users_doctors" FOR VALUES IN ('doctor')""" in shown


def test_a_run_that_died_before_the_validation_is_made_good_by_the_next(clinic, sql):
    run = migration.forward(clinic, partitions=REST)
    sql(f"{insert('nurse@x', 'nurse')}; INSERT INTO appointments (user_id, doc_id, scheduled_at)"
        " SELECT u.id, d.id, now() FROM users u, (SELECT id FROM doctors LIMIT 1) d WHERE u.role = 'nurse'")  # fmt: skip
    additions.add(approved(run, add=NURSES), 300, 30)
    loose = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND NOT convalidated"
    assert sql(loose) == [(1,)]
    again = approved(run, add=NURSES)
    with pytest.raises(PromiseBroken):
        additions.check(again)
    additions.validate(again)
    additions.check(again)
    assert sql(loose) == [(0,)]
    verify.check(run)


@pytest.mark.parametrize(
    "identity", ["FULL", "USING INDEX things_code", pytest.param("USING INDEX things_pkey", marks=pytest.mark.long)]
)
def test_a_new_partition_is_what_its_siblings_are(database, sql, identity):
    """A publication refuses updates and deletes of a partition that has no replica identity, and with it those of the whole table."""
    sql("CREATE TABLE things (id bigint PRIMARY KEY, k text NOT NULL, code text NOT NULL, v text); CREATE UNIQUE INDEX things_code ON things (code);"
        " CREATE INDEX things_lower ON things (lower(v)); ALTER INDEX things_lower ALTER COLUMN 1 SET STATISTICS 77;"
        " ALTER TABLE things ALTER v SET STATISTICS 55, ALTER code SET (n_distinct = -1); CLUSTER things USING things_code;"
        f" ALTER TABLE things REPLICA IDENTITY {identity}; CREATE STATISTICS pair (ndistinct) ON code, v FROM things;"
        " CREATE STATISTICS odd (mcv) ON k, (id % 3) FROM things; ALTER STATISTICS pair SET STATISTICS 44; ALTER STATISTICS odd OWNER TO pg_monitor;"
        " INSERT INTO things SELECT n, (ARRAY['a', 'b'])[1 + n % 2], n, n FROM generate_series(1, 40) n;"
        " CREATE PUBLICATION p FOR TABLE things WITH (publish_via_partition_root)")  # fmt: skip
    run = migration.plan(database, "things", "k", unique="per_partition")
    migration.walk(run, migration.FORWARD)
    add(run, add={"things_c": ["c"]})
    sql(
        "INSERT INTO things VALUES (100, 'c', 'x', 'y'); UPDATE things SET v = 'z' WHERE id IN (1, 100); DELETE FROM things WHERE id IN (1, 100)"
    )
    own = (
        "SELECT relreplident::text, (SELECT array_agg((indisreplident, indisclustered, replace(pg_get_indexdef(indexrelid), relname, '')) ORDER BY indkey::text, indisunique) FROM"
        " (SELECT i.*, x.relname FROM pg_index i JOIN pg_class x ON x.oid = indexrelid WHERE indrelid = c.oid) i)::text,"
        " (SELECT array_agg(concat_ws(' ', attname, to_jsonb(a) -> 'attstattarget', attoptions) ORDER BY attnum) FROM pg_attribute a WHERE attrelid = c.oid AND attnum > 0)"
        ", (SELECT array_agg(concat_ws(' ', replace(pg_get_statisticsobjdef(x.oid), '{0}', ''), to_jsonb(x) -> 'stxstattarget', stxowner::regrole) ORDER BY stxname)"
        " FROM pg_statistic_ext x WHERE stxrelid = c.oid)::text FROM pg_class c WHERE oid = '{0}'::regclass"
    )
    new, old = (str(sql(own.format(each))).replace(each, "leaf") for each in ("things_c", "things_a"))
    assert new == old
    statistics = "SELECT (to_jsonb(a) ->> 'attstattarget') FROM pg_attribute a JOIN pg_index i ON i.indexrelid = attrelid WHERE indrelid = 'things_c'::regclass AND pg_get_indexdef(indexrelid) LIKE '%lower%'"
    assert sql(statistics) == [("77",)]
    assert verify.check(run)


def test_what_a_table_by_list_cannot_be_given_is_refused(forward):
    run = forward(partitions=REST)
    with pytest.raises(BadInput, match=r"every is for a table that is partitioned by range, and public\.users is by list"):
        additions.draft(run, every="month")
    with pytest.raises(BadInput, match=r"users_none is to take NULL, which role of public\.users cannot be"):
        additions.draft(run, add={"users_none": [None]})


@pytest.mark.long
def test_a_row_that_breaks_a_check_which_is_not_valid_does_not_go_over(database, sql):
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL, n int); INSERT INTO t VALUES (1, 'a', 1), (2, 'b', -1), (3, 'b', 1), (4, 'b', NULL);"
        " ALTER TABLE t ADD CONSTRAINT npos CHECK (n > 0) NOT VALID")  # fmt: skip
    run = migration.forward(database, table="t", key="k", partitions={"t_a": ["a"], "t_rest": "default"})
    with pytest.raises(
        PlanBlocked, match=r"1 row of t_rest that would go over to t_b breaks npos, which is NOT VALID\. Correct them"
    ):
        additions.draft(run, add={"t_b": ["b"]}).freeze()
    sql("UPDATE t SET n = 1 WHERE id = 2")
    add(run, add={"t_b": ["b"]})
    assert sql("SELECT count(*) FROM t_b") == [(3,)]


NOTES = (
    "CREATE TABLE notes (id int, k text, CONSTRAINT notes_fk FOREIGN KEY (id, k) REFERENCES {0} (id, k) ON DELETE CASCADE);"
    " INSERT INTO notes SELECT * FROM {0}"
)
KEY = "ALTER TABLE items {} CONSTRAINT items_fk"
ALTERED = {
    "notes_fk of public.notes points at it since": (NOTES.format("t"), "DROP TABLE notes"),
    "notes_fk of public.notes points at public.t_rest": (NOTES.format("t_rest"), "DROP TABLE notes"),
    "items_fk of public.items is another now, or gone": (KEY.format("DROP"), f"{KEY.format('ADD')} FOREIGN KEY (id, id_k) REFERENCES t (id, k)"),
    "public.t_rest is not its default partition any more": ("DELETE FROM items; ALTER TABLE t DETACH PARTITION t_rest", "ALTER TABLE t ATTACH PARTITION t_rest DEFAULT"),
    'relation "public.t_rest" does not exist': ("ALTER TABLE t_rest RENAME TO x", "ALTER TABLE x RENAME TO t_rest"),
    'relation "public.items" does not exist': ("DROP TABLE items", NOTES.format("t")),
}  # fmt: skip


def test_what_was_altered_since_20_was_planned_is_named_and_no_row_is_lost(database, sql):
    """A key of which the plan does not know would not step aside, and take its rows along."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL); INSERT INTO t SELECT n, CASE n WHEN 1 THEN 'a' ELSE 'big' END FROM generate_series(1, 5) n;"
        " CREATE TABLE items (id int PRIMARY KEY, CONSTRAINT items_fk FOREIGN KEY (id) REFERENCES t); INSERT INTO items VALUES (2)")  # fmt: skip
    run = migration.forward(database, table="t", key="k", partitions={"t_a": ["a"], "t_rest": "default"})
    draft = approved(run, add={"t_big": ["big"]})
    for said, (altered, back) in ALTERED.items():
        sql(altered)
        with pytest.raises(PlanOutdated, match=rf"{re.escape(said)}.* 20_add_partitions .*again"):
            additions.add(draft, 300, 30)
        if "points at public.t_rest" in said:
            with pytest.raises(
                PlanBlocked, match=r"points at public\.t_rest itself, which rows that go over leave\. Drop it first"
            ):
                additions.draft(run, add={"t_big": ["big"]}).freeze()
        sql(back)
    add(run, add={"t_big": ["big"]})
    assert sql("SELECT (SELECT count(*) FROM t_big), (SELECT count(*) FROM notes)") == [(4, 5)]


def test_a_key_that_was_not_valid_before_stays_that_and_keeps_nobody_from_the_end(database, sql):
    """Those that stood aside are known from the ledger: the catalog no longer says which of them were valid."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL); INSERT INTO t VALUES (1, 'a'), (2, 'big')")
    run = migration.forward(database, table="t", key="k", partitions={"t_a": ["a"], "t_rest": "default"})
    verify.check(run)
    key = "CREATE TABLE {0} (id int, k text); INSERT INTO {0} VALUES ({1}, 'big'); ALTER TABLE {0} ADD CONSTRAINT {0}_fk FOREIGN KEY (id, k) REFERENCES t (id, k)"
    sql(f"{key.format('notes', 9)} NOT VALID; {key.format('marks', 2)}")
    additions.add(approved(run, add={"t_big": ["big"]}), 300, 30)
    with pytest.raises(OutOfOrder, match=r"foreign keys marks_fk of public\.marks are missing or not valid: if 20"):
        migration.walk(run, migration.END)
    add(run, add={"t_big": ["big"]})
    assert sql("SELECT conname, convalidated FROM pg_constraint WHERE conparentid = 0 AND conname IN ('notes_fk', 'marks_fk') ORDER BY 1") == [
        ("marks_fk", True), ("notes_fk", False)]  # fmt: skip
    migration.walk(run, migration.END)
