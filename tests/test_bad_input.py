"""What cannot be meant is refused with a sentence, and nothing is changed: object, cause, way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import runbook
from runbook import cli, ledger, parameters, restore, verify
from runbook.errors import BadInput, OutOfOrder, PlanBlocked, PlanOutdated, RunbookError, ServerUnavailable
from tests import migration, servers
from tests.conftest import fresh
from tests.walk import CLINIC_FILE, FORWARD, client, dump, walk

Sql = Callable[..., list[tuple[Any, ...]]]

# What is given, and what must stand in the sentence.
PARAMETERS: list[tuple[dict[str, Any], type[RunbookError], list[str]]] = [
    ({"key": "rol"}, BadInput, ["rol is not a column of public.users", "role"]),
    ({"key": ""}, BadInput, ["key is not named", "-p key"]),
    ({"table": "usres"}, BadInput, ["usres is not a table of", "did you mean", "users"]),
    ({"table": "nowhere.users"}, BadInput, ["nowhere.users is not a table of"]),
    ({"table": 7}, BadInput, ["table is 7 (number)", "must be text"]),
    ({"table": False}, BadInput, ["table is False (yes/no)", "put it in quotes"]),
    ({"unique": "globally"}, BadInput, ["unique is 'globally'", "'global' or 'per_partition'"]),
    ({"partitions": ["user"]}, BadInput, ["partitions is ['user'] (list)", "must be a mapping", '{"name": ["value"]}']),
    ({"partitions": '{"a": ["user"'}, BadInput, ["partitions", "is not valid JSON from character 14 on"]),
    ({"partitions": '{"a": ["user"], "a": ["doctor"]}'}, BadInput, ["partitions", "'a' stands there twice"]),
    ({"partitions": {"a": "user"}}, BadInput, ["a has the value 'user'", "list of values"]),
    ({"partitions": {"a": []}}, BadInput, ["a has no value", "at least one"]),
    ({"partitions": {"a": ["user", "user"]}}, BadInput, ["'user' stands in partitions more than once"]),
    ({"table": "use\0rs"}, BadInput, ["table has a NUL character", "take it out"]),
    ({"table": "USERS"}, BadInput, ["USERS is not a table of", "did you mean users"]),
    ({"backup": "b" * 64}, BadInput, ["cannot be the backup's name", "1 to 63 bytes"]),
    ({"partitions": {"": ["user"]}}, BadInput, ["'' cannot be a partition's name"]),
    ({"partitions": {"p" * 64: ["user"]}}, BadInput, ["63 bytes"]),
    ({"partitions": {"a": ["user"], "b": ["user", "doctor"]}}, BadInput, ["'user' stands in partitions more than once"]),
    ({"partitions": {"a": "default", "b": "default"}}, BadInput, ["more than one default partition"]),
    ({"partitions": {"users_patients": ["user"]}}, PlanBlocked, ["51 rows", "'doctor' (50), 'admin' (1)", "Add a partition"]),
    ({"partitions": {"doctors": "default"}}, PlanBlocked, ["The name public.doctors is taken", "Choose another name"]),
    ({"partitions": {"users_pkey": "default"}}, PlanBlocked, ["The name public.users_pkey is taken"]),
    (
        {"partitions": {"users_retired": "default"}},
        PlanBlocked,
        ["A partition is to be called users_retired, as the original after the cut-over is"],
    ),
    ({"partitions": {"old": "default"}, "backup": "old"}, PlanBlocked, ["A partition is to be called old, as the backup is"]),
    ({"backup": "doctors"}, PlanBlocked, ["A backup public.doctors exists", "never overwritten"]),
    ({"fail_on": "warning"}, PlanBlocked, ["email"]),
    ({"database": "postgresql://ann:secret@localhost/clinic"}, BadInput, ["holds a password", "PGPASSWORD"]),
    ({"database": "host=localhost password=secret"}, BadInput, ["holds a password", "PGPASSFILE"]),
    ({"database": ""}, BadInput, ["database cannot be read"]),
    ({"database": "clinic of ours"}, BadInput, ["database cannot be read", "postgresql://user@host/db"]),
]
# A wish for the table, and what must stand in the sentence.
TABLES: list[tuple[str, list[str]]] = [
    ("UPDATE users SET role = NULL WHERE role = 'admin'", ["1 row whose role is NULL", "null_value"]),
    ("INSERT INTO users SELECT gen_random_uuid(), 'n@x', '', '', '', '', 'nurse'", ["'nurse' (1)", "Add a partition"]),
    ("ALTER TABLE users DROP CONSTRAINT users_pkey CASCADE", ["public.users has no primary key", "Give it one"]),
    ("CREATE TABLE users_admins ()", ["The name public.users_admins is taken"]),
    ("CREATE TABLE users_retired ()", ["The name public.users_retired is taken"]),
    ("CREATE TABLE users_backup ()", ["A backup public.users_backup exists"]),
    ("ALTER TABLE appointments DROP COLUMN user_id; DROP TABLE users CASCADE; CREATE TABLE users (id int, role text,"
     " PRIMARY KEY (id, role)) PARTITION BY LIST (role)", ["public.users is partitioned already", 'restore_from = "backup"']),
    ("CREATE TABLE more_users () INHERITS (users)", ["inheritance"]),
    ("CREATE TABLE more_appointments () INHERITS (appointments)", ["public.appointments is inherited from", "NO INHERIT"]),
    ("CREATE TABLE parts (user_id uuid) PARTITION BY LIST (user_id); CREATE TABLE part PARTITION OF parts DEFAULT;"
     " ALTER TABLE part ADD FOREIGN KEY (user_id) REFERENCES users", ["public.part is a partition", "the whole of its table"]),
    ("CREATE FUNCTION hidden(text) RETURNS boolean LANGUAGE sql AS 'SELECT true'; CREATE FUNCTION known(text) RETURNS boolean LANGUAGE plpgsql"
     " AS 'BEGIN RETURN hidden($1); END'; ALTER TABLE users ADD CHECK (known(role::text)); ALTER FUNCTION hidden RENAME TO gone",
     ["cannot be copied", "hidden(text) does not exist"]),
]  # fmt: skip


# The same, where null_value is to be what NULL becomes.
FILLED: list[tuple[str, list[str]]] = [
    ("UPDATE users SET role = NULL WHERE role = 'admin'; ALTER TABLE users ADD CONSTRAINT known CHECK (role <> '?')", ["cannot be copied", "known"]),
    ("CREATE TABLE roles (role varchar PRIMARY KEY); INSERT INTO roles SELECT DISTINCT role FROM users; ALTER TABLE users ADD FOREIGN KEY (role)"
     " REFERENCES roles", ["role references public.roles", "no row '?'", "Insert that row first"]),
    ("ALTER TABLE users ADD label text GENERATED ALWAYS AS (coalesce(role, 'none') || email) STORED", ["label is computed from role", "another value"]),
]  # fmt: skip


@pytest.mark.long
def test_a_schema_of_the_next_migrations_name_is_nobodys_to_take(clinic: str, sql: Any) -> None:
    sql("CREATE SCHEMA runbook_1; CREATE TABLE runbook_1.theirs ()")
    with pytest.raises(BadInput, match="The schema runbook_1, which the migration would make, is somebody else's"):
        migration.plan(clinic)
    run = migration.forward(clinic)
    migration.back(run)
    assert sql("SELECT to_regclass('runbook_1.theirs')::text") == [("runbook_1.theirs",)]


@pytest.mark.long
def test_who_has_no_way_back_is_not_sent_there(clinic: str, sql: Sql, tmp_path: Path) -> None:
    run = migration.forward(clinic)
    verify.check(run)
    migration.walk(run, migration.END)
    sql("ALTER TABLE users DROP phone CASCADE")
    given = ["-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path), "--from", "verify", "--to", "verify"]
    said = CliRunner().invoke(cli.main, ["run", *given])
    assert said.exit_code == 1
    assert "06_verify stopped at “" in said.stderr and "is not what it was planned to be" in said.stderr
    assert "rollback" not in said.stderr
    assert CliRunner().invoke(cli.main, ["audit", str(tmp_path)]).exit_code == 0


def is_a_sentence(text: str) -> bool:
    """No traceback, no list of Python's, ends like a sentence."""
    return "Traceback" not in text and text.rstrip()[-1] in ".);?" and text[0] not in "[{("


@pytest.fixture(scope="module")
def untouched(server: servers.Server, clinic_template: str) -> Iterator[str]:
    """A clinic for all the tests that change nothing; in the end it is what it was."""
    for database in fresh(server, clinic_template):
        before = dump(database)
        yield database
        assert dump(database) == before


@pytest.mark.parametrize(("given", "error", "said"), PARAMETERS, ids=[str(case[0])[:40] for case in PARAMETERS])
def test_a_parameter_that_cannot_be_meant(
    untouched: str, given: dict[str, Any], error: type[RunbookError], said: list[str]
) -> None:
    with pytest.raises(error) as caught:
        walk(untouched, "00_plan", **given)
    for part in said:
        assert part in str(caught.value)
    assert "secret" not in str(caught.value)
    assert is_a_sentence(str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("change", "said"), TABLES, ids=[case[0][:40] for case in TABLES])
def test_a_table_that_cannot_be_partitioned_as_asked(clinic: str, sql: Sql, change: str, said: list[str]) -> None:
    sql(change)
    before = dump(clinic)
    with pytest.raises(PlanBlocked) as caught:
        walk(clinic, "00_plan", partitions={"users_patients": ["user"], "users_doctors": ["doctor"], "users_admins": ["admin"]})
    for part in said:
        assert part in str(caught.value)
    assert is_a_sentence(str(caught.value)), str(caught.value)
    assert dump(clinic) == before


def test_nobody_is_told_to_drop_what_holds_rows(clinic: str, sql: Sql) -> None:
    """A partition or a child is no obstacle that could be made anew; and a partitioned table that was moved is told by its name of then."""
    sql("CREATE TABLE parts (id int, k text, PRIMARY KEY (id, k)) PARTITION BY LIST (k); CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');"
        " INSERT INTO parts SELECT n, 'a' FROM generate_series(1, 100) n; CREATE TABLE more_users () INHERITS (users)")  # fmt: skip
    for asked, said in (
        ({"table": "parts", "key": "k"}, "public.parts is partitioned already"),
        ({}, "public.users takes part in inheritance"),
    ):
        with pytest.raises(PlanBlocked, match=said) as caught:
            migration.plan(clinic, **asked)
        assert "Drop" not in str(caught.value) and is_a_sentence(str(caught.value))
    sql("DROP TABLE more_users")
    run = migration.forward(clinic)
    verify.check(run)
    migration.walk(run, migration.END)
    sql("CREATE SCHEMA app; ALTER TABLE users SET SCHEMA app")
    with pytest.raises(OutOfOrder, match=r"app\.users was public\.users when it was partitioned, .*move or rename it back"):
        ledger.of(run.database, "users")
    with pytest.raises(PlanBlocked, match=r"app\.users is partitioned already") as caught:
        migration.plan(clinic)
    assert "Drop" not in str(caught.value)


def test_what_papermill_injects_and_the_plan_does_not_have_is_refused(clinic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every notebook after 00; the way back is the answer to it."""
    migration.plan(clinic)
    monkeypatch.setattr(ledger, "injected", lambda: {"key": "rolle", "database": clinic})
    with pytest.raises(BadInput, match=r"key is 'rolle', but the plan .* has 'role'"):
        runbook.open(clinic, "users")
    assert runbook.open_last(clinic, "users").plan.key == "role"


@pytest.mark.parametrize("command", ["monitor", "add", "finish"])
def test_a_command_that_asks_for_another_plan_is_refused(clinic: str, tmp_path: Path, command: str) -> None:
    migration.plan(clinic)
    words = [command, "-f", CLINIC_FILE, "--database", clinic, "-p", "unique", "global", "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(cli.main, words)
    assert (done.exit_code, (tmp_path / "runs").exists()) == (1, False)
    assert "unique is 'global', but the plan" in done.stderr


def test_nothing_is_settled_before_it_is_copied(forward: Callable[..., Any]) -> None:
    run = forward("partition check")
    for step in (restore.settle, restore.replay, restore.compare_all):
        with pytest.raises(OutOfOrder, match=r"public\.users has not been copied yet: run 03_restore from its beginning"):
            step(run)


def test_a_shadow_is_not_taken_for_the_table(forward: Callable[..., Any], clinic: str, sql: Sql) -> None:
    """Nor is the table planned again by the name that it has now: the way back of that would take the first one's triggers away."""
    forward("log")
    sql("ALTER TABLE users RENAME TO people")
    renamed = r"public\.users, whose migration is open, is there no more, .* rename it back"
    for asked in (
        lambda: runbook.open(clinic, "users"),
        lambda: migration.plan(clinic),
        lambda: migration.plan(clinic, "people", "role"),
    ):
        with pytest.raises(OutOfOrder, match=renamed):
            asked()


def test_a_name_in_several_schemas_is_not_guessed_at(clinic: str, sql: Sql) -> None:
    """Unless the search_path decides it."""
    sql("CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.users ()")
    assert runbook.draft(table="users", key="role", database=clinic).plan.full_name == "public.users"
    sql("ALTER TABLE users SET SCHEMA b")
    with pytest.raises(BadInput, match=r"users is a table in several schemas \(b, a\): say which, as b\.users\."):
        runbook.draft(table="users", key="role", database=clinic)


@pytest.mark.parametrize(("change", "said"), FILLED, ids=[case[0][:40] for case in FILLED])
def test_a_null_value_that_the_table_cannot_have(clinic: str, sql: Sql, change: str, said: list[str]) -> None:
    sql(change)
    with pytest.raises(PlanBlocked) as caught:
        walk(clinic, "00_plan", null_value="?", partitions={"users_rest": "default"})
    for part in said:
        assert part in str(caught.value)
    assert is_a_sentence(str(caught.value)), str(caught.value)


def test_a_step_before_its_time(untouched: str) -> None:
    for step in FORWARD[1:]:
        with pytest.raises(OutOfOrder, match="run 00_plan first"):
            walk(untouched, step)


def test_a_step_whose_predecessor_has_not_been_completed(walked: Callable[..., None], clinic: str) -> None:
    walked("00_plan")
    before = dump(clinic)
    for step in FORWARD[2:-1]:  # 07 is of use at any time
        with pytest.raises(OutOfOrder, match=r"rests on 01_backup, which has not been completed .*: run 01_backup first"):
            walk(clinic, step)
    assert dump(clinic) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE users ADD COLUMN nickname text", "column nickname added"),
        ("ALTER TABLE users DROP COLUMN phone", "column phone dropped"),
        ("ALTER TABLE users ALTER phone TYPE text", "column phone was character varying(20), is text"),
        ("CREATE INDEX users_phone_idx ON users (phone)", "index users_phone_idx added"),
        ("CREATE TABLE notes (user_id uuid REFERENCES users)", "public.notes references it now"),
        ("ALTER TABLE users ENABLE ROW LEVEL SECURITY", "(row security enabled)"),
        ("CREATE PUBLICATION every FOR ALL TABLES", "publication every"),
        ("COMMENT ON INDEX users_email_key IS 'by mail'", "index public.users_email_key"),
        ("ALTER TABLE users CLUSTER ON users_pkey", "index public.users_pkey"),
    ],
)
@pytest.mark.parametrize("step", ["01_backup", pytest.param("05_cutover", marks=pytest.mark.long)])
def test_a_table_that_was_altered_since_the_plan(
    walked: Callable[..., None], clinic: str, sql: Sql, change: str, said: str, step: str
) -> None:
    walked(*FORWARD[: FORWARD.index(step)])
    sql(change)
    before = dump(clinic)
    with pytest.raises(PlanOutdated) as caught:
        walk(clinic, step)
    assert said in str(caught.value)
    assert "plan again with 00_plan" in str(caught.value)
    assert dump(clinic) == before


def test_a_plan_that_is_not_the_approved_one(clinic: str) -> None:
    plan = walk(clinic, "00_plan")["run"].plan.hash
    walk(clinic, "01_backup", plan=plan[:12])
    before = dump(clinic)
    with pytest.raises(PlanOutdated, match=f"has the plan {plan[:12]}, not 0123456789ab"):
        walk(clinic, "02_partition", plan="0123456789abcdef")
    assert dump(clinic) == before
    with pytest.raises(BadInput, match="plan is 'latest'"):
        walk(clinic, "02_partition", plan="latest")


def test_another_key_than_the_one_of_the_plan_that_is_under_way(clinic: str) -> None:
    walk(clinic, "00_plan", "01_backup")
    before = dump(clinic)
    with pytest.raises(BadInput, match=r"key is 'is_active', but the plan .* has 'role'"):
        walk(clinic, "00_plan", key="is_active")
    with pytest.raises(BadInput, match=r"partitions is {'everybody': 'default'}, but the plan .* has {'users_admins': "):
        walk(clinic, "00_plan", partitions={"everybody": "default"})
    with pytest.raises(BadInput, match="partition_by is 'hash', but the plan"):
        walk(clinic, "00_plan", partition_by="hash", partitions=None, modulus=2)
    assert dump(clinic) == before


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[servers.Server]:
    """A server that asks for a password."""
    with servers.start(18, settings={"listen_addresses": "127.0.0.1"}) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE ROLE ann LOGIN PASSWORD 'right'")
        yield server


def test_a_wrong_password_and_a_missing_database(guarded: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "wrong-as-can-be")
    url = f"postgresql://ann@127.0.0.1:{guarded.port}/postgres"
    with pytest.raises(ServerUnavailable, match=r"password authentication failed for user .ann.") as caught:
        walk(url, "00_plan")
    assert "wrong-as-can-be" not in str(caught.value)
    monkeypatch.setenv("PGPASSWORD", "right")
    with pytest.raises(ServerUnavailable, match='database "nowhere" does not exist'):
        walk(url.replace("/postgres", "/nowhere"), "00_plan")
    with pytest.raises(ServerUnavailable, match=r"cannot be reached.*correct database"):
        walk("postgresql://ann@127.0.0.1:1/postgres", "00_plan")


@pytest.mark.long
@pytest.mark.pooler
def test_a_pool_of_transactions_is_refused_and_one_of_sessions_works(server, clinic):
    """A session's settings, and the lock by which a second run is refused, would be somebody else's after each transaction."""
    before = dump(clinic)
    with (
        servers.pooler(server, "transaction") as port,
        pytest.raises(BadInput, match=r"connection pool that gives a session away.*name the server itself"),
    ):
        walk(clinic.replace(f"port={server.port}", f"port={port}"), "00_plan")
    assert dump(clinic) == before
    with servers.pooler(server, "session") as port:
        walk(clinic.replace(f"port={server.port}", f"port={port}"))
    with psycopg.connect(clinic) as connection:
        assert connection.execute("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass").fetchone() == ("p",)


COMMANDS: list[tuple[list[str], int, list[str]]] = [
    (["run", "-p", "partition", "users"], 1, ["partition is not a parameter of any notebook: did you mean partitions?"]),
    (["run", "-p", "workers", "1", "-p", "workers", "2"], 1, ["workers is given twice: say it once."]),
    (["run", "-p", "nope", "1"], 1, ["nope is not a parameter of any notebook; there are: database, "]),
    (["run", "-p", "workers", "two"], 1, ["workers is 'two' (text)", "must be a whole number"]),
    (["run", "-p", "drop_backup", '"false"'], 1, ["drop_backup is 'false' (text)", "must be true or false: write one of these, without quotes"]),
    (["run", "-p", "workers", "-1"], 1, ["workers is -1", "must be at least 0: choose a larger one"]),
    (["run", "--users", "5"], 1, ["users loads the embedded example"]),
    (["run", "--reset"], 1, ["--reset begins the embedded example afresh", "is left alone"]),
    (["run", "--from", "cutover", "--to", "plan"], 2, ["--from 05_cutover comes after --to 00_plan"]),
    (["run", "--from", "bakup"], 2, ["'bakup' is not a step", "01_backup"]),
    (["run", "-f", "nowhere.yaml"], 1, ["nowhere.yaml does not exist: name"]),
    (["run", "-p", "table", "orders"], 1, ["orders is not a table of"]),
    (["status", "-p", "tables", "users"], 1, ["tables is not a parameter of any notebook"]),
    (["rollback"], 1, ["has no plan on", "run 00_plan first"]),
    (["sql", "-p", "key", "nothing"], 1, ["nothing is not a column of public.users"]),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("words", "code", "said"), COMMANDS, ids=[" ".join(case[0])[:40] for case in COMMANDS])
def test_a_command_that_cannot_be_meant(untouched: str, tmp_path: Path, words: list[str], code: int, said: list[str]) -> None:
    out = ["--out", str(tmp_path)] if words[0] in ("run", "rollback") else []
    given = [] if "-f" in words else ["-f", CLINIC_FILE]
    result = CliRunner().invoke(cli.main, [*words, *given, "--database", untouched, *out])
    assert result.exit_code == code, result.output
    for part in said:
        assert part in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("table: no\nkey: role", "table is False (yes/no)"),
        ("table: users\nkey: 012", "key is 10 (number)"),
        ("table:", "table is empty, but must be text: give it one, or leave it out."),
        (
            "table: users\nevery: 2026-01-01",
            "every is 2026-01-01 (date), but must be hour, day, week, month, quarter, year or a whole number",
        ),
        (
            "table: users\npartitions: {a: [[user]]}",
            "A value of a in partitions is ['user'] (list), but must be text or a number",
        ),
        ("table: users\npartitions: {a: [2026-01-01]}", "A value of a in partitions is 2026-01-01 (date)"),
        ("table: users\npartitions: {a: [user], 7: [doctor]}", "A name in partitions is 7 (number), but must be text"),
        ("table: users\npartitions: {a: [user], b: 7}", "b in partitions is 7 (number), but must be a list of values"),
        ("table: users\nfoo: 1", "foo is not a parameter of any notebook; there are: database"),
        ("- table", "must hold parameters, a line each"),
        ("table: [", "cannot be read as a YAML file"),
        (b"table: caf\xe9", "cannot be read as a YAML file"),
        ("table: users\npartitions: {a: [user], a: [doctor]}", "'a' stands there twice"),
        ("? [table]\n: users", "cannot be read as a YAML file"),
        ("key: role", "No table is named"),
        ("table: users\nkey: role\npartitions: {users_patients: user}", "users_patients has the value 'user'"),
    ],
)
def test_a_file_that_cannot_be_meant(untouched: str, tmp_path: Path, text: str | bytes, said: str) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(cli.main, ["sql", "-f", str(file), "--database", untouched])
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


def test_the_clinics_file_is_no_default_for_another_database(untouched: str) -> None:
    for words in (["run"], ["rollback"], ["finish"], ["sql"]):
        result = CliRunner().invoke(cli.main, [*words, "--database", untouched])
        assert result.exit_code == 1
        assert "No table is named for" in result.stderr
    with pytest.raises(BadInput, match="table is not named"):
        walk(untouched, "00_plan", table="")


def test_the_client_of_the_tests_fails_loudly(untouched: str) -> None:
    with pytest.raises(AssertionError, match="psql failed"):
        client("psql", untouched, text="\\set ON_ERROR_STOP on\nSELECT 1/0")


def test_a_plan_that_was_read_before_another_one_was_begun_is_not_frozen(clinic: str, sql: Any) -> None:
    """As in a notebook 00 that was left open: the migration under way would lose its way back."""
    read = [runbook.draft(database=clinic, table="users", key="role", partitions=migration.PARTITIONS) for _ in range(2)]
    other = read[0].freeze()
    run = migration.plan(clinic)  # nothing was done by the first one yet: another takes its place
    with pytest.raises(PlanOutdated, match="planned anew since this notebook was opened"):
        migration.walk(other, migration.FORWARD, last="backup")
    migration.walk(run, migration.FORWARD)
    with pytest.raises((PlanOutdated, BadInput)):
        read[1].freeze()
    migration.back(run)
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]
    assert sql("SELECT to_regnamespace('runbook_2'), to_regclass('users_backup')") == [(None, None)]


def test_the_script_of_another_plan_than_the_approved_one_is_refused(untouched: str) -> None:
    words = ["sql", "-f", CLINIC_FILE, "--database", untouched]
    assert CliRunner().invoke(cli.main, [*words, "-p", "plan", "0" * 12]).exit_code == 1
    assert CliRunner().invoke(cli.main, words).exit_code == 0


def test_a_value_that_yaml_reads_as_no_text_is_refused_where_the_key_is_text(database: str, sql: Any, tmp_path: Path) -> None:
    sql("CREATE TABLE orders (id int PRIMARY KEY, region text NOT NULL); INSERT INTO orders VALUES (1, 'no')")
    file = tmp_path / "orders.yaml"
    file.write_text(f"database: {database}\ntable: orders\nkey: region\npartitions: {{orders_eu: [de, no], rest: default}}\n")
    done = CliRunner().invoke(cli.main, ["sql", "-f", str(file)])
    assert done.exit_code == 1
    assert "False is no text, and region (text) holds text: put it in quotes" in done.output


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("partitions", {"users_patients": ["user", "guest"], "users_doctors": ["doctor"], "users_admins": ["admin"]},
         "partitions is {'users_patients': ['user', 'guest']}, but the plan"),
        ("null_value", "user", "null_value is 'user', but the plan"),
        ("backup", "elsewhere", "which is in force, has 'users_backup': go on with that, or roll back"),
        ("unique", "global", "has 'per_partition'"),
    ],
)  # fmt: skip
def test_what_only_the_plan_takes_is_not_ignored_after_it(
    clinic: str, tmp_path: Path, name: str, value: object, said: str
) -> None:
    run = migration.forward(clinic, last="backup check")
    given = {"partitions": {"users_doctors": ["doctor"], "users_admins": ["admin"], "users_patients": ["user"]}}
    asked = parameters.clinic() | {"database": clinic}
    assert runbook.draft(**asked | given).already
    with pytest.raises(BadInput) as refused:
        runbook.draft(**asked | {name: value})
    assert said in str(refused.value)
    words = ["run", "--from", "partition", "--to", "partition", "--database", clinic, "-f", CLINIC_FILE, "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.main, [*words, "-p", name, value if isinstance(value, str) else json.dumps(value)])
    assert (done.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert said in done.stderr
    assert run.finished("partition", "shadow") is None


def test_a_plan_that_somebody_altered_in_the_ledger_is_not_executed(clinic: str, sql: Any) -> None:
    run = migration.forward(clinic, last="keys check")
    view = "'{views,0,definition}', to_jsonb(plan #>> '{views,0,definition}' || '; CREATE TABLE smuggled (x int)')"
    altered = rf"public\.users that the ledger holds is another \(\w+\) than was frozen \({run.plan.hash[:12]}\): somebody altered runbook\.migration"
    kept = sql(
        f"UPDATE runbook.migration m SET plan = jsonb_set(m.plan, {view.replace('plan', 'm.plan', 1)}) FROM runbook.migration o RETURNING o.plan::text"
    )
    for again in (
        lambda: runbook.open(clinic, "users"),
        lambda: migration.plan(clinic),
        lambda: runbook.open_last(clinic, "users"),
    ):
        with pytest.raises(PlanOutdated, match=altered):
            again()
    sql("UPDATE runbook.migration SET plan = %s::jsonb", kept[0])
    assert runbook.open(clinic, "users").plan.hash == run.plan.hash


def test_a_schema_of_the_ledgers_name_that_is_somebody_elses_is_named(clinic: str, sql: Any) -> None:
    sql("CREATE SCHEMA runbook; CREATE TABLE runbook.action (id int PRIMARY KEY, what text)")
    with pytest.raises(BadInput, match="somebody else's table"):
        migration.plan(clinic)
    sql("DROP TABLE runbook.action; CREATE TABLE runbook.migration (x int)")
    with pytest.raises(
        BadInput, match=r"runbook\.migration or runbook\.action of test_\d+ is somebody else's table.*rename the schema"
    ):
        migration.plan(clinic)
    done = CliRunner().invoke(cli.main, ["status", "--database", clinic])
    assert done.exit_code == 1 and "somebody else's table" in done.stderr


def test_what_stays_unique_is_named_as_its_index_has_it(database: str, sql: Any) -> None:
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL, tenant int, zip text, state text);"
        " CREATE UNIQUE INDEX open ON t (tenant, lower(zip)) WHERE state = 'open'; INSERT INTO t VALUES (1, 'a')")  # fmt: skip
    said = " ".join(each.sentence for each in runbook.draft(database=database, table="t", key="k", unique="global").plan.findings)
    assert "(tenant, lower(zip)) WHERE (state = 'open'::text) stays unique in the whole of public.t" in said
