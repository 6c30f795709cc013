"""The repair of a migration that went wrong elsewhere: partitioned by hand, rows missing, a backup has them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import runbook
from runbook import cli, foreign_keys, repair
from runbook.errors import BadInput, OutOfOrder, PlanBlocked, PromiseBroken
from tests.servers import Server
from tests.traffic import COUNTING, counting_elsewhere
from tests.walk import CLINIC_FILE, REPAIR, dump, walk

Sql = Callable[..., list[tuple[Any, ...]]]
PLANNED = {"restore_from": "backup", "references": {"appointments": ["user_id"]}}
# What the hand-made migration did, up to where it lost the rows and the foreign key.
BY_HAND = """
    CREATE TABLE users_backup AS SELECT * FROM users;
    ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey;
    DROP VIEW active_users; DROP TABLE users;
    CREATE TABLE users (LIKE users_backup) PARTITION BY LIST (role);
    ALTER TABLE users ALTER id SET DEFAULT gen_random_uuid(), ALTER role SET DEFAULT 'user', ALTER is_active SET DEFAULT true,
      ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now(), ALTER email SET NOT NULL;
    CREATE TABLE users_patients PARTITION OF users FOR VALUES IN ('user');
    CREATE TABLE users_doctors PARTITION OF users FOR VALUES IN ('doctor');
    CREATE TABLE users_admins PARTITION OF users FOR VALUES IN ('admin');
    ALTER TABLE users ADD PRIMARY KEY (id, role);
    CREATE UNIQUE INDEX ON users_patients (email); CREATE UNIQUE INDEX ON users_doctors (email);
    CREATE UNIQUE INDEX ON users_admins (email);
    CREATE INDEX ON users (is_active); CREATE INDEX ON users (created_at)
"""
FEW = "INSERT INTO users SELECT * FROM users_backup WHERE is_active AND role = 'user' LIMIT 100"
LOST = [
    "",  # the role column was never added
    "ALTER TABLE appointments ADD user_role varchar(50) NOT NULL DEFAULT 'user'",  # it was, and filled in for nobody
]


@pytest.mark.parametrize("column", LOST, ids=["without the column", "with the column"])
@pytest.mark.parametrize("legacy", ["fill", "strict"])
def test_rows_column_and_key_come_back(clinic: str, sql: Sql, column: str, legacy: str) -> None:
    rows = sql("SELECT md5(string_agg(u::text, '' ORDER BY id)) FROM users u")
    sql(f"{BY_HAND}; {FEW}; {column}")
    walk(clinic, *REPAIR, **PLANNED, legacy_inserts=legacy)
    assert sql("SELECT md5(string_agg(u::text, '' ORDER BY id)) FROM users u") == rows
    counts = (
        "SELECT (SELECT count(*) FROM users_patients), (SELECT count(*) FROM users_doctors), (SELECT count(*) FROM users_admins)"
    )
    assert sql(counts) == [(949, 50, 1)]
    assert sql("SELECT user_role, count(*) FROM appointments GROUP BY 1 ORDER BY 2") == [
        ("admin", 2),
        ("doctor", 100),
        ("user", 1898),
    ]
    key = "SELECT pg_get_constraintdef(oid), convalidated FROM pg_constraint WHERE conname = %s AND conparentid = 0"
    assert sql(key, ["appointments_user_id_fkey"]) == [
        ("FOREIGN KEY (user_id, user_role) REFERENCES users(id, role) ON UPDATE CASCADE", True)
    ]
    assert sql("SELECT attnotnull FROM pg_attribute WHERE attname = 'user_role' AND attrelid = 'appointments'::regclass") == [
        (True,)
    ]


def test_a_row_that_the_table_has_is_newer_and_stays(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}")
    # Someone became a doctor since: by the whole primary key the backup's row would be missing, and stand there twice.
    [(one,)] = sql(
        "UPDATE users SET role = 'doctor', phone = 'new' WHERE id = (SELECT id FROM users_patients LIMIT 1) RETURNING id"
    )
    walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT role, phone FROM users WHERE id = %s", [one]) == [("doctor", "new")]
    assert sql("SELECT count(*) FROM users") == [(1000,)]
    assert sql("SELECT DISTINCT user_role FROM appointments WHERE user_id = %s", [one]) == [("doctor",)]


@pytest.mark.long
def test_old_code_goes_on_inserting_and_role_changes_are_carried_along(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}")
    walk(clinic, *REPAIR, **PLANNED)
    [(doctor,)] = sql("SELECT id FROM users_doctors LIMIT 1")
    insert = (
        "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT %s, id, now() FROM doctors LIMIT 1 RETURNING user_role"
    )
    assert sql(insert, [doctor]) == [("doctor",)]
    if sql("SELECT current_setting('server_version_num')::int >= 150000")[0][0]:
        sql("UPDATE users SET role = 'admin' WHERE id = %s", [doctor])
        assert sql("SELECT DISTINCT user_role FROM appointments WHERE user_id = %s", [doctor]) == [("admin",)]


def test_a_trigger_that_counts_elsewhere_gives_the_application_no_deadlock(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}; {LOST[1]}; {COUNTING}")
    [(row,)] = sql("SELECT a.id FROM appointments a JOIN users_backup u ON u.id = a.user_id WHERE u.role = 'doctor' LIMIT 1")
    walk(clinic, *REPAIR[:2], **PLANNED)
    with counting_elsewhere(clinic, row):
        walk(clinic, REPAIR[2], **PLANNED)
    assert sql("SELECT count(*) FROM appointments a JOIN users u ON u.id = a.user_id WHERE a.user_role <> u.role") == [(0,)]


@pytest.mark.long
def test_rows_that_move_all_the_while_stop_no_repair(clinic: str, sql: Sql, server: Server) -> None:
    if server.version == 14:
        pytest.skip("PostgreSQL 14 refuses a changed role of a row that is referred to")
    sql(f"{BY_HAND}; {FEW}; {LOST[0]}")
    walk(clinic, *REPAIR[:2], **PLANNED)
    ended = threading.Event()

    def move() -> None:
        with psycopg.connect(clinic, autocommit=True) as application:
            while not ended.is_set():
                application.execute("UPDATE users SET role = CASE role WHEN 'user' THEN 'doctor' ELSE 'user' END"
                                    " WHERE id = (SELECT user_id FROM appointments ORDER BY random() LIMIT 1)")  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(move)
        try:
            walk(clinic, REPAIR[2], **PLANNED)
        finally:
            ended.set()
        moving.result()
    assert sql("SELECT count(*) FROM appointments a JOIN users u ON u.id = a.user_id WHERE a.user_role <> u.role") == [(0,)]


@pytest.mark.long
def test_a_repair_twice_says_that_it_is_done(clinic: str, sql: Sql, capsys: pytest.CaptureFixture[str]) -> None:
    sql(f"{BY_HAND}; {FEW}")
    walk(clinic, *REPAIR, **PLANNED)
    before = dump(clinic)
    walk(clinic, *REPAIR, **PLANNED)
    assert dump(clinic) == before
    assert "Already done: the plan" in capsys.readouterr().out


@pytest.mark.long
def test_what_the_application_deletes_after_it_was_put_back_is_not_missing(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}")
    walk(clinic, *REPAIR[:2], **PLANNED)
    [(user,)] = sql("SELECT id FROM users_backup LIMIT 1")
    sql("DELETE FROM appointments WHERE user_id = %s", [user])
    sql("DELETE FROM users WHERE id = %s", [user])
    walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT (SELECT count(*) FROM users_backup) - (SELECT count(*) FROM users)") == [(1,)]


@pytest.mark.long
@pytest.mark.parametrize("column", LOST, ids=["without the column", "with the column"])
def test_the_way_back_takes_the_key_away_and_leaves_the_rows(clinic: str, sql: Sql, column: str) -> None:
    sql(f"{BY_HAND}; {column}")
    before = dump(clinic, "--exclude-schema=runbook", "--schema-only")
    walk(clinic, *REPAIR, **PLANNED)
    walk(clinic, "90_rollback", **PLANNED)
    assert dump(clinic, "--exclude-schema=runbook", "--schema-only") == before
    [(said,)] = sql("SELECT sentence FROM runbook.action WHERE (step, action) = ('rollback', 'check')")
    assert said == "The keys and columns of the repair are gone; the rows that it put back stay, and so does users_backup."
    assert sql("SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM users_backup)") == [(1000, 1000)]


@pytest.mark.long
def test_a_finished_repair_leaves_the_strict_form(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}")
    walk(clinic, *REPAIR, **PLANNED)
    walk(clinic, "91_finish", unneeded_for_h=0, drop_backup=True, **PLANNED)
    assert sql("SELECT to_regclass('users_backup'), to_regnamespace('runbook_1')") == [(None, None)]
    default = (
        "SELECT column_default FROM information_schema.columns WHERE table_name = 'appointments' AND column_name = 'user_role'"
    )
    assert sql(default) == [("'user'::character varying",)]


TWICE = "INSERT INTO users SELECT (jsonb_populate_record(b, '{\"role\": \"user\"}')).* FROM users_backup b WHERE role = 'admin'"
BROKEN: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("", {"key": "email"}, BadInput, "partitioned by list (role), and a repair by email was asked for"),
    ("", {"backup": "nothing"}, BadInput, "public.nothing is not there"),
    ("ALTER TABLE users_backup DROP phone", {}, BadInput, "public.users_backup lacks phone"),
    ("", {"references": {"appointments": ["usr_id"]}}, BadInput, "name the columns of it that stand for id"),
    ("", {"references": {"appointment": ["user_id"]}}, BadInput, "appointment is not a table of"),
    ("UPDATE users_backup SET role = 'nurse' WHERE role = 'admin'", {}, PlanBlocked, "fits no partition: 'nurse' (1)"),
    ("UPDATE users_backup SET role = NULL WHERE role = 'admin'", {}, PlanBlocked, "fits no partition: NULL (1)"),
    ("ALTER TABLE users_backup ALTER id TYPE text", {}, BadInput, 'public.users_backup.id cannot be compared with public.users.id (operator does not exist: text = uuid): ALTER TABLE "public"."users_backup" ALTER "id" TYPE'),
    ("ALTER TABLE appointments ADD user_role integer", {}, BadInput, "public.appointments.user_role cannot be compared with public.users.role"),
    ("ALTER TABLE users DROP CONSTRAINT users_pkey", {}, PlanBlocked, "has no primary key"),
    (f"INSERT INTO users SELECT * FROM users_backup WHERE role = 'admin'; {TWICE}", {}, PlanBlocked, "public.users has rows of the same id in more than one partition: ("),
    ("DELETE FROM users_backup WHERE role = 'admin'", {}, PlanBlocked, "2 rows of public.appointments refer to rows that"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "given", "error", "said"), BROKEN, ids=[case[3][:40] for case in BROKEN])
def test_a_repair_that_cannot_be_done(
    clinic: str, sql: Sql, change: str, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    sql(f"{BY_HAND}; {change}")
    before = dump(clinic)
    with pytest.raises(error, match=re.escape(said)):
        walk(clinic, *REPAIR, **{**PLANNED, **given})
    assert dump(clinic) == before


@pytest.mark.long
def test_rows_that_get_no_role_are_told_with_what_keeps_them(clinic: str, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "ROUNDS", 3)
    sql(f"{BY_HAND}; {FEW}")
    sql("CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER undo BEFORE UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION undo()")  # fmt: skip
    with pytest.raises(PromiseBroken, match="a trigger or a rule of appointments undoes the update"):
        walk(clinic, *REPAIR[:3], **PLANNED)
    sql("DROP FUNCTION undo CASCADE")
    with psycopg.connect(clinic) as other:
        other.execute("SELECT FROM appointments FOR UPDATE")
        with pytest.raises(PromiseBroken, match="of appointments stay held by others"):
            walk(clinic, "04_foreign_keys", **PLANNED)
    sql(TWICE)
    with pytest.raises(PromiseBroken, match=r"public.users has rows of the same id in more than one partition: \("):
        walk(clinic, "04_foreign_keys", **PLANNED)
    sql("DELETE FROM users_patients WHERE id IN (SELECT id FROM users_admins)")
    walk(clinic, "04_foreign_keys", **PLANNED)


def test_a_key_that_still_points_at_the_old_table_is_said(clinic: str, sql: Sql) -> None:
    sql(f"CREATE TABLE users_old AS SELECT * FROM users; ALTER TABLE users_old ADD PRIMARY KEY (id); {BY_HAND}; {FEW};"
        " ALTER TABLE appointments ADD CONSTRAINT old FOREIGN KEY (user_id) REFERENCES users_old")  # fmt: skip
    found = [
        each.sentence
        for each in runbook.draft(database=clinic, table="users", key="role", **PLANNED).plan.findings
        if each.level == "warning"
    ]
    assert (
        "old of public.appointments refers to public.users_old by the same columns: a row that this lacks is refused still."
        in found
    )


def test_a_table_that_is_not_partitioned_has_nothing_to_repair(clinic: str) -> None:
    with pytest.raises(BadInput, match="is partitioned not at all"):
        walk(clinic, "00_plan", **PLANNED)
    with pytest.raises(BadInput, match="references is for a repair"):
        walk(clinic, "00_plan", references={"appointments": ["user_id"]})


def test_a_row_that_clashes_with_a_newer_one_is_named_and_nothing_put_back(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}")
    sql("INSERT INTO users (email, password, first_name, last_name) SELECT email, '', '', '' FROM users_backup LIMIT 1")
    with pytest.raises(PromiseBroken, match=r"clashes with one that public.users got since, in users_patients_email_idx"):
        walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT count(*) FROM users") == [(1,)]


@pytest.mark.long
def test_the_command_line_executes_the_notebooks_of_a_repair_only(clinic: str, sql: Sql, tmp_path: Path) -> None:
    sql(f"{BY_HAND}; {FEW}")
    words = ["-p", "restore_from", "backup", "-p", "references", '{"appointments": ["user_id"]}', "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, ["run", "-f", CLINIC_FILE, "--database", clinic, *words])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[: len(REPAIR)]] == list(REPAIR)
    with pytest.raises(OutOfOrder, match="01_backup is no part of a repair"):
        walk(clinic, "01_backup", **PLANNED)
    for command, said in (("sql", "A repair has no script"), ("rehearse", "A repair is not rehearsed")):
        result = CliRunner().invoke(cli.main, [command, "-f", CLINIC_FILE, "--database", clinic, *words[:-2]])
        assert (result.exit_code, said in result.stderr) == (1, True), result.output


CHANGES = """
    CREATE FUNCTION scribble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {0} RETURN NEW; END $$;
    CREATE TRIGGER scribbles BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION scribble()
"""


def test_rows_go_back_as_they_were_or_not_at_all(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}; {CHANGES.format('NEW.phone := 1;')}")
    plan = runbook.draft(database=clinic, table="users", key="role", **PLANNED).plan
    assert any(each.sentence.startswith("scribbles fires for each row that is put back") for each in plan.findings)
    with pytest.raises(
        PromiseBroken,
        match=r"A trigger of public\.users \(scribbles\) changes or keeps off rows that are put back: nothing was put back",
    ):
        walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT count(*) FROM users") == [(100,)]
    sql("ALTER TABLE users DISABLE TRIGGER scribbles")
    walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT count(*), (SELECT count(*) FROM (TABLE users EXCEPT TABLE users_backup) x) FROM users") == [(1000, 0)]


@pytest.mark.long
@pytest.mark.parametrize("number", ["GENERATED ALWAYS AS IDENTITY", "GENERATED BY DEFAULT AS IDENTITY", "DEFAULT nextval('own')"])
def test_the_next_number_is_one_that_no_row_has(database: str, sql: Sql, number: str) -> None:
    sql("CREATE SEQUENCE own; CREATE TABLE things_backup AS SELECT n AS id, 'a' AS kind FROM generate_series(1, 50) n")
    sql(f"CREATE TABLE things (id int {number if 'own' in number else ''}, kind text) PARTITION BY LIST (kind)")
    if "own" not in number:
        if (version := int(sql("SHOW server_version_num")[0][0]) // 10000) < 17:
            pytest.skip(f"PostgreSQL {version} has no identity on a partitioned table")
        sql(f"ALTER TABLE things ALTER id SET NOT NULL, ALTER id ADD {number}")
    sql("CREATE TABLE things_a PARTITION OF things FOR VALUES IN ('a'); ALTER TABLE things ADD PRIMARY KEY (id, kind)")
    walk(database, *REPAIR, table="things", key="kind", partitions=None, backup="", restore_from="backup")
    assert sql("INSERT INTO things (kind) VALUES ('a') RETURNING id") == [(51,)]


@pytest.mark.long
def test_a_table_that_is_divided_by_its_own_primary_key_gets_its_key_back(database: str, sql: Sql) -> None:
    sql("CREATE TABLE things_backup AS SELECT n AS id, 'a' AS kind FROM generate_series(1, 50) n")
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text) PARTITION BY RANGE (id)")
    sql("CREATE TABLE things_a PARTITION OF things FOR VALUES FROM (1) TO (100)")
    sql(
        "CREATE TABLE notes (id int PRIMARY KEY, thing_id int NOT NULL); INSERT INTO notes SELECT n, n FROM generate_series(1, 50) n"
    )
    given = {"table": "things", "key": "id", "partition_by": "range", "partitions": None, "backup": "", "restore_from": "backup"}
    walk(database, *REPAIR, **given, references={"notes": ["thing_id"]})
    assert sql("SELECT pg_get_constraintdef(oid), convalidated FROM pg_constraint WHERE conrelid = 'notes'::regclass AND contype = 'f' AND conparentid = 0") == [
        ("FOREIGN KEY (thing_id) REFERENCES things(id) ON UPDATE CASCADE", True)
    ]  # fmt: skip


def test_what_a_repair_does_not_look_into_is_said_before(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; DROP TABLE users_admins")
    sql("CREATE TABLE users_admins PARTITION OF users FOR VALUES IN ('admin') PARTITION BY HASH (id)")
    with pytest.raises(PlanBlocked, match="users_admins is itself partitioned, which a repair does not look into"):
        walk(clinic, "00_plan", **PLANNED)


def test_a_backup_in_which_a_row_stands_twice_is_given_as_the_reason(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; INSERT INTO users_backup SELECT * FROM users_backup WHERE role = 'admin'")
    with pytest.raises(BadInput, match="id alone does not name one row of users_backup each: it is there twice, or NULL"):
        walk(clinic, "00_plan", **PLANNED)


@pytest.mark.long
@pytest.mark.parametrize(
    "body", ["RETURN NULL;", "UPDATE users SET phone = '1' WHERE id = NEW.id;"], ids=["keeps off", "changes afterwards"]
)
def test_a_trigger_that_keeps_rows_off_or_changes_them_afterwards_is_seen_too(clinic: str, sql: Sql, body: str) -> None:
    sql(f"{BY_HAND}; {FEW}; {CHANGES.format(body)}")
    if "UPDATE" in body:
        sql(
            "DROP TRIGGER scribbles ON users; CREATE TRIGGER scribbles AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION scribble()"
        )
    with pytest.raises(PromiseBroken, match=r"\(scribbles\) changes or keeps off rows"):
        walk(clinic, *REPAIR, **PLANNED)
    assert sql("SELECT count(*) FROM users") == [(100,)]


@pytest.mark.long
@pytest.mark.parametrize(("column", "sequence", "following"), [
    ("id numeric DEFAULT nextval('own')", "", 1), ("id int DEFAULT nextval('own')", "INCREMENT -1", -51),
    ("id int DEFAULT nextval('own') + 100", "", 101), ("id int DEFAULT nextval('own')", "MAXVALUE 40 CYCLE", 1),
])  # fmt: skip
def test_a_sequence_that_cannot_be_moved_keeps_no_row_off(
    database: str, sql: Sql, column: str, sequence: str, following: int
) -> None:
    sign = -1 if "-1" in sequence else 1
    sql(
        f"CREATE SEQUENCE own {sequence}; CREATE TABLE things_backup AS SELECT {sign} * n AS id, 'a' AS kind FROM generate_series(1, 50) n"
    )
    sql(
        f"CREATE TABLE things ({column}, kind text) PARTITION BY LIST (kind); CREATE TABLE things_a PARTITION OF things FOR VALUES IN ('a')"
    )
    sql("ALTER TABLE things ADD PRIMARY KEY (id, kind)")
    walk(database, *REPAIR, table="things", key="kind", partitions=None, backup="", restore_from="backup")
    assert sql("SELECT count(*) FROM things") == [(50,)]
    value = column.partition("DEFAULT ")[2]
    assert sql(f"SELECT ({value})::int") == [(following,)]


def test_a_partitioned_table_gets_no_key_by_a_repair_and_that_is_said_before(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; ALTER TABLE appointments RENAME TO old; CREATE TABLE appointments (LIKE old) PARTITION BY HASH (id)")
    with pytest.raises(
        PlanBlocked, match=r"public\.appointments, which is to get a foreign key to public\.users, is itself partitioned"
    ):
        walk(clinic, "00_plan", **PLANNED)


@pytest.mark.long
def test_a_repair_goes_back_from_between_its_columns_and_their_values(clinic: str, sql: Sql) -> None:
    sql(f"{BY_HAND}; {FEW}")
    before = dump(clinic, "--exclude-schema=runbook", "--schema-only")
    walk(clinic, "00_plan", "03_restore", **PLANNED)
    foreign_keys.add_columns(runbook.open(clinic, "users"))
    walk(clinic, "90_rollback", **PLANNED)
    assert dump(clinic, "--exclude-schema=runbook", "--schema-only") == before
