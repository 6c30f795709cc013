"""What was unique stays unique: a guard waits, fails and reports as the index did that partitioning took away."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import runbook
from runbook import embedded, verify
from runbook.errors import BadInput, PlanBlocked, PromiseBroken
from tests import migration, servers
from tests.walk import dump, restored

PAYLOAD = "(email, password, first_name, last_name, role)"
VALUES = "VALUES ('{email}', 'p', 'N', 'N', '{role}')"


def insert(email: str, role: str) -> str:
    return f"INSERT INTO users {PAYLOAD} {VALUES.format(email=email, role=role)}"


def version(sql: Any) -> int:
    return int(sql("SHOW server_version_num")[0][0]) // 10000


@pytest.fixture
def guarded(forward: Callable[..., runbook.ledger.Run]) -> runbook.ledger.Run:
    return forward(unique="global")


def refusals(sql: Any) -> list[tuple[str | None, ...]]:
    """What a duplicate of each unique key ends in, with its constraint and its message."""
    seen: list[tuple[str | None, ...]] = []
    same_id = (
        f"INSERT INTO users (id, {PAYLOAD[1:]} SELECT id, 'other@x', 'p', 'N', 'N', 'doctor' FROM users WHERE email = 'one@x'"
    )
    for statement in (insert("one@x", "doctor"), same_id):
        with pytest.raises(psycopg.errors.UniqueViolation) as refused:
            sql(statement)
        seen.append(
            (
                refused.value.sqlstate,
                refused.value.diag.constraint_name,
                refused.value.diag.message_primary,
                refused.value.diag.message_detail,
            )
        )
    return seen


def test_a_duplicate_is_refused_as_it_was_before(clinic, sql):
    sql(insert("one@x", "user"))
    before = refusals(sql)
    run = migration.forward(clinic, unique="global")
    verify.check(run)
    assert refusals(sql) == before
    migration.back(run)
    assert refusals(sql) == before
    assert sql("SELECT to_regnamespace('users_unique')") == [(None,)]


def test_a_dump_of_the_result_is_restored_as_it_was(server, clinic, guarded):
    assert restored(server, clinic) == dump(clinic)


@pytest.mark.parametrize("outcome", ["commit", pytest.param("rollback", marks=pytest.mark.long)])
def test_of_two_sessions_with_one_email_one_waits_and_one_fails(clinic, sql, guarded, outcome):
    waits, errors = threading.Event(), []

    def second() -> None:
        with psycopg.connect(clinic, autocommit=True, application_name="second") as connection:
            waits.set()
            try:
                connection.execute(insert("both@x", "doctor"))
            except psycopg.errors.UniqueViolation as error:
                errors.append(error.diag.constraint_name)

    with psycopg.connect(clinic) as first:
        first.execute(insert("both@x", "user"))
        thread = threading.Thread(target=second)
        thread.start()
        waits.wait()
        while not sql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'second' AND wait_event_type = 'Lock'"):
            assert thread.is_alive(), "it did not wait"
        getattr(first, outcome)()
        thread.join()
    kept = sql("SELECT role FROM users WHERE email = 'both@x'")
    assert (len(errors), kept) == ((1, [("user",)]) if outcome == "commit" else (0, [("doctor",)]))


def test_every_way_to_write_is_held_to_it(clinic, sql, guarded):
    sql(insert("one@x", "user") + ";" + insert("two@x", "doctor"))
    for statement in (
        "UPDATE users SET email = 'one@x' WHERE email = 'two@x'",
        f"INSERT INTO users_doctors {PAYLOAD} {VALUES.format(email='one@x', role='doctor')}",
        "WITH moved AS (UPDATE users SET email = 'one@x', role = 'admin' WHERE email = 'two@x' RETURNING 1) SELECT * FROM moved",
        f"SET session_replication_role = replica; {insert('one@x', 'admin')}",
    ):
        if version(sql) == 14 and "moved" in statement:
            continue
        with pytest.raises(psycopg.errors.UniqueViolation):
            sql(statement)
    with (
        psycopg.connect(clinic) as connection,
        pytest.raises(psycopg.errors.UniqueViolation),
        connection.cursor().copy(f"COPY users {PAYLOAD} FROM STDIN") as copy,
    ):
        copy.write_row(("one@x", "p", "N", "N", "admin"))
    if version(sql) > 14:
        sql("UPDATE users SET role = 'doctor' WHERE email = 'one@x'; UPDATE users SET role = 'user' WHERE email = 'one@x'")
    sql("BEGIN; DELETE FROM users WHERE email = 'one@x'; " + insert("one@x", "admin") + "; ROLLBACK")
    sql("DELETE FROM users WHERE email = 'two@x';" + insert("two@x", "admin"))
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(insert("one@x", "admin"))
    verify.check(guarded)


@pytest.mark.long
def test_what_was_emptied_is_free_again(clinic, sql, guarded):
    email = sql("SELECT email FROM users_doctors LIMIT 1")[0][0]
    sql("TRUNCATE users_doctors CASCADE")
    sql(insert(email, "user"))
    verify.structure(guarded)
    assert not [each for each in verify.seen(guarded) if "unique in the whole" in each.promise and each.verdict != "pass"]


@pytest.mark.long
def test_a_guard_that_was_switched_off_breaks_a_promise(clinic, sql, guarded):
    trigger = sql(
        "SELECT quote_ident(tgname) FROM pg_trigger WHERE tgrelid = 'users'::regclass AND tgname LIKE '%email%keep' LIMIT 1"
    )[0][0]
    sql(
        f"ALTER TABLE users_doctors DISABLE TRIGGER {trigger}; {insert('unguarded@x', 'doctor')}; ALTER TABLE users_doctors ENABLE ALWAYS TRIGGER {trigger}"
    )
    with pytest.raises(PromiseBroken, match="unique in the whole table"):
        verify.check(guarded)


KEYS = {
    "on an expression": "CREATE UNIQUE INDEX things_one ON things (lower(a), b)",
    "partial": "CREATE UNIQUE INDEX things_one ON things (a) WHERE b > 10",
    "with INCLUDE": "ALTER TABLE things ADD CONSTRAINT things_one UNIQUE (a) INCLUDE (b)",
    "deferrable": "ALTER TABLE things ADD CONSTRAINT things_one UNIQUE (a) DEFERRABLE INITIALLY DEFERRED",
    "where NULL is a value": "ALTER TABLE things ADD CONSTRAINT things_one UNIQUE NULLS NOT DISTINCT (a)",
    "with a collation and an order": 'CREATE UNIQUE INDEX things_one ON things (a COLLATE "C" text_pattern_ops DESC NULLS LAST)',
}
DOUBLES = {"on an expression": ("'A20'", 20), "where NULL is a value": ("NULL", 1)}


@pytest.mark.parametrize(
    "form", [each if each in ("on an expression", "deferrable") else pytest.param(each, marks=pytest.mark.long) for each in KEYS]
)
def test_a_unique_key_of_any_form_is_kept(database, sql, form):
    if form == "where NULL is a value" and version(sql) == 14:
        pytest.skip("PostgreSQL 14 has no NULLS NOT DISTINCT")
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text NOT NULL, a text, b int)")
    sql(
        "INSERT INTO things SELECT n, CASE WHEN n % 2 = 0 THEN 'x' ELSE 'y' END, nullif('a' || n, 'a1'), n FROM generate_series(1, 40) n"
    )
    sql(KEYS[form])
    before = dump(database, "--exclude-schema=runbook*")
    run = migration.forward(database, table="things", key="kind")
    verify.check(run)
    a, b = DOUBLES.get(form, ("'a20'", 20))
    double = f"INSERT INTO things SELECT 99, k, {a}, {b} FROM unnest(ARRAY['x', 'y']) k WHERE k <> (SELECT kind FROM things WHERE b = {b})"
    with pytest.raises(psycopg.errors.UniqueViolation) as refused:
        sql(double)
    assert refused.value.diag.constraint_name == "things_one"
    if form == "partial":
        sql(
            "INSERT INTO things VALUES (99, 'x', 'a9', 9); UPDATE things SET b = 1 WHERE id = 99; DELETE FROM things WHERE id = 99"
        )
    if form == "deferrable":
        sql("BEGIN; UPDATE things SET a = CASE id WHEN 2 THEN 'a3' ELSE 'a2' END WHERE id IN (2, 3);"
            " UPDATE things SET a = 'a' || id WHERE id IN (2, 3); COMMIT")  # fmt: skip
    verify.check(run)
    migration.back(run)
    assert dump(database, "--exclude-schema=runbook*") == before


CONTRIB = """
CREATE EXTENSION citext; CREATE EXTENSION ltree;
CREATE TABLE things (path ltree PRIMARY KEY, name citext NOT NULL UNIQUE, kind citext NOT NULL);
INSERT INTO things SELECT ('a.b' || n)::ltree, 'N' || n, (ARRAY['X', 'y'])[1 + n % 2] FROM generate_series(1, 40) n;
CREATE TABLE notes (path ltree REFERENCES things ON DELETE CASCADE); INSERT INTO notes SELECT path FROM things
"""


@pytest.mark.long
def test_the_types_of_an_extension_are_compared_by_operators_of_its_own(server, database, sql):
    if server.version in servers.WHEEL:
        pytest.skip(f"PostgreSQL {server.version} has no contrib in the wheel")
    sql(CONTRIB)
    before = dump(database, "--exclude-schema=runbook*")
    run = migration.forward(database, table="things", key="kind", partitions={"x": ["x"], "y": ["Y"]})
    assert [partition.rows for partition in run.plan.partitions] == [20, 20]
    verify.check(run)
    sql(
        "INSERT INTO notes VALUES ('a.b3'); UPDATE notes SET path = 'a.b4' WHERE path = 'a.b3'; DELETE FROM things WHERE path = 'a.b3'"
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql("INSERT INTO things VALUES ('c', 'n1', 'x')")
    sql(
        "INSERT INTO things VALUES ('a.b3', 'N3', 'y'); UPDATE notes SET path = 'a.b3' WHERE ctid IN (SELECT max(ctid) FROM notes)"
    )
    sql("TRUNCATE notes; INSERT INTO notes SELECT path FROM things")
    migration.back(run)
    assert dump(database, "--exclude-schema=runbook*") == before


def test_the_plan_says_what_each_choice_costs_and_which_targets_stop(clinic, sql):
    sql("CREATE UNIQUE INDEX partly ON users (lower(email)) INCLUDE (id) WITH (fillfactor = 90) WHERE first_name <> ' INCLUDE ('")
    for choice, said in (("global", "stays unique in the whole"), ("per_partition", "becomes unique per partition")):
        draft = runbook.draft(database=clinic, table="users", key="role", partitions=migration.PARTITIONS, unique=choice)
        findings = draft.findings().to_string()
        assert said in findings
        assert "ON CONFLICT (email) stops working" in findings
        assert "ON CONFLICT (id, role)" in findings
        partly = draft.findings().set_index("object").loc["partly"]
        assert "UPDATE first, and INSERT" in partly["way out"]
        target = re.search(r"(ON CONFLICT \(.*\)) stops working", partly["sentence"])[1]
        sql(f"INSERT INTO users SELECT * FROM users LIMIT 1 {target} DO NOTHING".replace("%", "%%"))
    costs = draft.uniqueness().set_index("unique")
    assert list(costs.index) == ["per_partition", "global"]
    assert (costs["µs a row"] > 0).all()
    assert costs["MB more"]["global"] > costs["MB more"]["per_partition"] == 0
    assert sql("SELECT count(*) FROM pg_class WHERE relname LIKE '%values'") == [(0,)]


def test_a_partition_that_was_detached_and_emptied_takes_no_value_along(forward, sql):
    forward(unique="global")
    sql("DELETE FROM appointments WHERE user_role = 'doctor'")
    held = sql("SELECT count(*) FROM users_unique.users_email_key_values")
    sql("ALTER TABLE users DETACH PARTITION users_doctors; TRUNCATE users_doctors")
    assert sql("SELECT count(*) FROM users_unique.users_email_key_values") == held
    email = sql("SELECT email FROM users WHERE role = 'user' LIMIT 1")[0][0]
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql("INSERT INTO users (email, password, first_name, last_name, role) VALUES (%s, 'p', 'F', 'L', 'admin')", [email])


@pytest.mark.long
@pytest.mark.parametrize("unique", ["global", "per_partition"])
def test_keys_of_an_extensions_type_are_replayed_whatever_the_search_path(server, database, sql, unique):
    """citext's "=" is in a schema that the migrating role does not search: text's would be found, and 'n7' is not 'N7' to it."""
    if server.version in servers.WHEEL:
        pytest.skip(f"PostgreSQL {server.version} has no contrib in the wheel")
    sql(
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext;"
        " CREATE TABLE things (id ext.citext PRIMARY KEY, kind text NOT NULL, body text);"
        " INSERT INTO things SELECT 'N' || n, (ARRAY['x', 'y'])[1 + n % 2] FROM generate_series(1, 40) n;"
        " CREATE TABLE notes (thing ext.citext NOT NULL REFERENCES things ON UPDATE CASCADE);"
        " INSERT INTO notes SELECT 'n' || n FROM generate_series(1, 40) n"
    )
    run = migration.plan(database, "things", "kind", unique=unique)
    migration.walk(run, migration.FORWARD, last="keys check")
    sql("UPDATE things SET id = 'n7' WHERE id OPERATOR(ext.=) 'N7'; UPDATE things SET kind = 'y' WHERE id OPERATOR(ext.=) 'N8'")
    migration.walk(run, migration.FORWARD, first="approval")
    verify.check(run)
    sql("UPDATE things SET id = 'N9' WHERE id OPERATOR(ext.=) 'n9'")
    if server.version > 14:  # there a row that is referred to cannot move
        sql("UPDATE things SET kind = 'x' WHERE id OPERATOR(ext.=) 'N8'")
    migration.back(run)
    assert sql("SELECT count(*), count(*) FILTER (WHERE id::text = 'n7') FROM things") == [(40, 1)]


@pytest.mark.parametrize("language", ["plpgsql", "sql"])
def test_a_function_that_needs_the_search_path_stops_the_plan(database, sql, language):
    """The trigger that keeps the key unique has none, and every insert would fail after the cut-over."""
    sql("CREATE FUNCTION strip(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT replace($1, ''.'', '''')'")
    body = "BEGIN RETURN lower(strip($1)); END" if language == "plpgsql" else "SELECT lower(strip($1))"
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text NOT NULL, email text)")
    sql("INSERT INTO things SELECT n, (ARRAY['x', 'y'])[1 + n % 2], 'a.b' || n FROM generate_series(1, 40) n")
    sql(f"CREATE FUNCTION plain(text) RETURNS text IMMUTABLE LANGUAGE {language} AS '{body}'")
    sql("ALTER FUNCTION plain SET search_path = public; CREATE UNIQUE INDEX things_email ON things (plain(email))")
    sql("ALTER FUNCTION plain RESET search_path")
    with pytest.raises((PlanBlocked, BadInput), match=r"search_path.*function strip\(text\) does not exist.*ALTER FUNCTION"):
        migration.plan(database, "things", "kind")
    sql("ALTER FUNCTION plain SET search_path = public")
    run = migration.forward(database, table="things", key="kind")
    sql("INSERT INTO things VALUES (99, 'x', 'c')")
    verify.check(run)


@pytest.mark.long
def test_an_upgrade_of_the_server_takes_the_result_along_and_the_way_back():
    """pg_upgrade restores a dump of every object; what the partitions hold is copied as files."""
    with servers.start(16) as old:
        with psycopg.connect(old.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE clinic")
        embedded.load_clinic(old.conninfo("clinic"), users=200)
        verify.check(migration.forward(old.url("clinic"), unique="global"))
        old.stop()
        data = servers.temporary_folder(servers.memory())
        new = servers.Server(18, servers.installation(18) / "bin", data, old.sockets, old.port)
        try:
            made = [
                new.programs / "initdb",
                "--pgdata",
                data,
                "--username=postgres",
                "--no-sync",
                "--encoding=UTF8",
                "--no-data-checksums",
            ]
            locale = (old.data / "postgresql.conf").read_text().partition("lc_messages = '")[2].partition("'")[0]
            subprocess.run([*made, f"--locale={locale}"], cwd=data, check=True, capture_output=True, **servers.service())
            shutil.copy(old.data / "postgresql.conf", data / "postgresql.conf")
            servers.hand_over(data)
            upgrade = [
                new.programs / "pg_upgrade",
                "-b",
                old.programs,
                "-B",
                new.programs,
                "-d",
                old.data,
                "-D",
                data,
                "-U",
                "postgres",
                "--no-sync",
            ]
            done = subprocess.run([*upgrade, "-s", old.sockets], cwd=data, capture_output=True, text=True, **servers.service())
            assert done.returncode == 0, done.stdout + done.stderr
            new.start()
            run = runbook.open(new.url("clinic"), "users")
            with psycopg.connect(new.conninfo("clinic")) as connection, pytest.raises(psycopg.errors.UniqueViolation):
                connection.execute(
                    "UPDATE users SET email = (SELECT max(email) FROM users) WHERE email = (SELECT min(email) FROM users)"
                )
            verify.check(run)
            migration.back(run)
        finally:
            new.stop()
            shutil.rmtree(data, ignore_errors=True)


@pytest.mark.long
def test_a_composite_value_with_a_null_in_it_is_a_value(database, sql):
    """To IS NOT NULL it is none, and a key that has none but NULLs is no TRUNCATE either."""
    sql(
        "CREATE TYPE pair AS (a int, b int); CREATE TABLE things (id pair PRIMARY KEY, kind text NOT NULL, c pair UNIQUE);"
        " INSERT INTO things SELECT ROW(n, NULL)::pair, (ARRAY['x', 'y'])[1 + n % 2], ROW(n, NULL)::pair FROM generate_series(1, 40) n;"
        " INSERT INTO things VALUES (ROW(NULL, NULL), 'x'), (ROW(0, 0), 'x');"
        " CREATE TABLE notes (id pair REFERENCES things); INSERT INTO notes SELECT id FROM things"
    )
    run = migration.plan(database, "things", "kind")
    migration.walk(run, migration.FORWARD, last="keys check")
    sql("INSERT INTO notes VALUES (ROW(1, NULL)); UPDATE things SET c = ROW(9, 9) WHERE id = ROW(NULL, NULL)::pair")
    migration.walk(run, migration.FORWARD, first="approval")
    verify.check(run)
    for kind in ("x", "y"):
        with pytest.raises(psycopg.errors.UniqueViolation):
            sql("INSERT INTO things VALUES (ROW(99, 99), %s, ROW(1, NULL))", [kind])
    sql(
        "UPDATE things SET c = ROW(8, 8) WHERE id = ROW(NULL, NULL)::pair; UPDATE things SET c = ROW(1, NULL) WHERE c = ROW(1, NULL)::pair"
    )
    migration.back(run)
    assert sql("SELECT c::text FROM things WHERE id = ROW(NULL, NULL)::pair") == [("(8,8)",)]


WRITERS = """
CREATE TABLE things (id int PRIMARY KEY, kind text NOT NULL, slug text UNIQUE);
INSERT INTO things SELECT n, (ARRAY['x', 'y'])[1 + n % 2], 's' || n FROM generate_series(1, 40) n;
CREATE FUNCTION assign() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  UPDATE things SET kind = 'y', slug = 's' || NEW.id WHERE id = NEW.id AND NEW.slug = 'new'; DELETE FROM things WHERE id = NEW.id AND NEW.slug = 'old';
  RETURN NULL; END $$;
CREATE TRIGGER assign AFTER INSERT ON things FOR EACH ROW EXECUTE FUNCTION assign();
CREATE FUNCTION begin_anew() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO things SELECT 1, 'x', 's1' WHERE NOT EXISTS (SELECT FROM things); RETURN NULL; END $$;
CREATE TRIGGER begin_anew AFTER TRUNCATE ON things FOR EACH STATEMENT EXECUTE FUNCTION begin_anew()
"""


def test_a_trigger_that_writes_the_row_again_finds_its_key_kept(database, sql):
    """Triggers fire by name: whatever the application's is called, the guard knows of the row before."""
    sql(WRITERS)
    run = migration.forward(database, table="things", key="kind")
    assert "assign of public.things writes to it" in " ".join(each.sentence for each in run.plan.findings)
    assert "begin_anew of public.things writes to it" not in " ".join(each.sentence for each in run.plan.findings)
    sql("INSERT INTO things VALUES (98, 'x', 'new'); INSERT INTO things VALUES (99, 'x', 'old')")
    sql("INSERT INTO things VALUES (99, 'y', 'old'); INSERT INTO things VALUES (99, 'y', 'new')")
    assert sql("SELECT id, kind, slug FROM things WHERE id > 90 ORDER BY 1") == [(98, "y", "s98"), (99, "y", "s99")]
    sql("UPDATE things SET slug = 'new' WHERE id = 2")
    verify.check(run)
    sql("TRUNCATE things")
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql("INSERT INTO things VALUES (1, 'y', 'other')")


@pytest.mark.long
def test_a_truncate_by_an_old_snapshot_leaves_no_value_taken(clinic, sql, guarded):
    """It sees no values that came since, and the rows go all the same."""
    with psycopg.connect(clinic) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT count(*) FROM users")
        sql(insert("late@x", "admin"))
        with pytest.raises(psycopg.errors.FeatureNotSupported, match=r"users_admins .* READ COMMITTED"):
            other.execute("TRUNCATE users_admins CASCADE")
        other.rollback()
        other.execute("SELECT count(*) FROM users")
        sql("DELETE FROM users WHERE email = 'late@x'; " + insert("late@x", "doctor"))
        other.execute("TRUNCATE users CASCADE")
    assert sql("SELECT count(*) FROM users_unique.users_email_key_values") == [(0,)]
    sql(insert("late@x", "user"))
    sql("BEGIN; TRUNCATE users CASCADE; " + insert("late@x", "doctor") + "; ROLLBACK")
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql(insert("late@x", "doctor"))
    verify.structure(guarded)
    assert not [each for each in verify.seen(guarded) if "unique in the whole" in each.promise and each.verdict != "pass"]
