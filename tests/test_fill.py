"""04: rows are filled in by their addresses, and nothing but the role column seems to change."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from runbook import correction, cutover, finish, foreign_keys, ledger, references, verify
from runbook.errors import LockNotGranted, PlanBlocked, PromiseBroken
from tests import migration
from tests.traffic import COUNTING, counting_elsewhere
from tests.walk import walk

WRONG = "SELECT count(*) FROM appointments a JOIN users u ON u.id = a.user_id WHERE a.user_role <> u.role"
FILLED = "SELECT count(*) > 0 FROM appointments WHERE user_role <> 'user'"


def test_rows_that_moved_since_they_were_listed_are_filled_all_the_same(clinic, sql, monkeypatch):
    """A VACUUM FULL in between gives every row another address."""
    run, parallel = migration.forward(clinic, last="columns"), correction.parallel

    def moved_before(*given: Any) -> None:
        sql("DELETE FROM appointments WHERE ctid < '(3,0)'")
        sql("VACUUM FULL appointments")
        parallel(*given)

    monkeypatch.setattr(correction, "parallel", moved_before)
    migration.walk(run, {"fill": migration.FORWARD["fill"]})
    assert (sql(WRONG), sql(FILLED)) == ([(0,)], [(True,)])


@pytest.mark.parametrize("own", [False, True])
def test_no_trigger_notices_the_indexed_columns(clinic, sql, own):
    """They are set to what they are, which is quicker, unless a trigger is for one of them."""
    sql("CREATE TABLE noticed (id uuid); CREATE FUNCTION notice() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO noticed VALUES (NEW.id); RETURN NEW; END $$")  # fmt: skip
    columns = "user_id, doc_id, id" if own else "status, user_role"
    run = migration.forward(clinic, last="columns")
    sql(f"CREATE TRIGGER notice BEFORE UPDATE OF {columns} ON appointments FOR EACH ROW EXECUTE FUNCTION notice()")
    migration.walk(run, {"fill": migration.FORWARD["fill"]})
    assert (sql(WRONG), sql(FILLED)) == ([(0,)], [(True,)])
    seen, filled = sql("SELECT (SELECT count(*) FROM noticed), (SELECT count(*) FROM appointments WHERE user_role <> 'user')")[0]
    assert seen == (0 if own else filled)


def look_for_stuck_rows(run: Any) -> None:
    own = references.names(run, references.added(run)[0])
    with run.database.session("test") as session:
        session.run("foreign_keys.log_wrong", **own)
        assert correction.stuck(session, own) == 0


@pytest.mark.parametrize("step", ["fill", "stuck", pytest.param("check", marks=pytest.mark.long)])
def test_a_trigger_that_counts_elsewhere_makes_nobody_wait_long(clinic, sql, step):
    """It waits for a row that the application holds while we hold the row for which the application comes next."""
    run = migration.forward(clinic, last="columns" if step == "fill" else "fill")
    sql(COUNTING)
    if step != "fill":  # as if old code had written them
        sql("UPDATE appointments a SET user_role = 'user' FROM users u WHERE u.id = a.user_id AND u.role = 'doctor'")
    [(row,)] = sql("SELECT a.id FROM appointments a JOIN users u ON u.id = a.user_id WHERE u.role = 'doctor' LIMIT 1")
    with counting_elsewhere(clinic, row):
        {"fill": foreign_keys.fill, "check": foreign_keys.check, "stuck": look_for_stuck_rows}[step](run)
    assert sql(WRONG) == [(0,)]


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_trigger_that_touches_the_row_referred_to_is_followed(clinic, sql, monkeypatch, late):
    """It writes to the table itself while 04 fills, and while the last rows are corrected under the locks."""
    sql("CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE users SET phone = 'touched' WHERE id = NEW.user_id; RETURN NULL; END $$;"
        " CREATE TRIGGER touches AFTER UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION touch()")  # fmt: skip
    run, caught_up = migration.forward(clinic, last="keys check"), cutover._catch_up

    def then_a_role_changes(*given: Any) -> None:
        caught_up(*given)
        sql("UPDATE users SET role = 'admin' WHERE id = (SELECT user_id FROM appointments WHERE user_role = 'user' LIMIT 1)")

    if late:
        monkeypatch.setattr(cutover, "_catch_up", then_a_role_changes)
    migration.walk(run, migration.FORWARD, first="approval")
    verify.check(run)
    touched = "SELECT count(*) > 0 FROM users WHERE phone = 'touched' AND role = 'admin'"
    assert (sql(WRONG), sql(touched)) == ([(0,)], [(True,)])


def test_what_a_log_knows_of_is_not_wrong(clinic, sql):
    """One change of a user is ten wrong appointments until the replay; a role without a user refers to nobody."""
    sql("ALTER TABLE appointments ALTER user_id DROP NOT NULL")
    run = migration.forward(clinic, last="fill")
    doctor = sql("SELECT user_id FROM appointments WHERE user_role = 'doctor' LIMIT 1")[0][0]
    sql("UPDATE appointments SET user_id = %s WHERE user_role = 'user' AND random() < 0.1", [doctor])
    migration.walk(run, migration.FORWARD, first="replay", last="replay")
    sql("UPDATE users SET role = 'admin' WHERE id = %s", [doctor])
    sql("UPDATE appointments SET user_id = NULL WHERE id IN (SELECT id FROM appointments WHERE user_role = 'admin' LIMIT 1)")
    migration.walk(run, migration.FORWARD, first="keys check")
    assert sql(WRONG) == [(0,)]


@pytest.mark.parametrize("when", [pytest.param("fill", marks=pytest.mark.long), "keys check"])
def test_what_was_written_while_triggers_were_off_is_found(clinic, sql, when):
    """As a restore of data alone does it; afterwards the log's triggers are not what they were."""
    run = migration.forward(clinic, last=when)
    doctor, patient = (sql("SELECT id FROM users WHERE role = %s LIMIT 1", [role])[0][0] for role in ("doctor", "user"))
    sql("ALTER TABLE appointments DISABLE TRIGGER ALL")
    sql("INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT %s, id, now() FROM doctors LIMIT 2", [doctor])
    sql("UPDATE appointments SET user_id = %s WHERE user_role = 'admin'", [patient])
    sql("ALTER TABLE appointments ENABLE TRIGGER ALL")
    assert sql(WRONG)[0][0] >= 3
    with pytest.raises(PromiseBroken, match=r"The log of appointments was switched off.*Run 04_foreign_keys again"):
        migration.walk(run, migration.FORWARD, first="keys check" if when == "fill" else "approval")
    migration.walk(run, migration.FORWARD, first="columns")
    assert sql(WRONG) == [(0,)]


def test_two_keys_to_one_table_are_filled_each_for_itself(database, sql):
    """What a statement names of one key says nothing of the other."""
    sql(
        "CREATE TABLE places (id int PRIMARY KEY, kind text NOT NULL); INSERT INTO places SELECT n, (ARRAY['a', 'b'])[1 + n % 2] FROM"
        " generate_series(1, 40) n; CREATE TABLE trips (id int PRIMARY KEY, from_id int NOT NULL REFERENCES places, to_id int NOT NULL"
        " REFERENCES places); INSERT INTO trips VALUES (1, 1, 2)"
    )
    migration.forward(database, table="places", key="kind")
    for named, other in (("from", "to"), ("to", "from")):
        sql(f"UPDATE trips SET {other}_id = 3, {named}_id = 4, {named}_kind = 'a'")
        assert sql(f"SELECT {named}_kind, {other}_kind FROM trips") == [("a", "b")]
        sql("UPDATE trips SET from_id = 1, to_id = 2")


def test_what_is_right_already_is_dropped_from_the_log_at_once(forward, clinic, sql):
    """However long the log has become: an application that writes all day makes it as long as that."""
    run = forward("fill")
    for _ in range(10):
        sql("UPDATE appointments SET notes = 'x'")
    entries = sql("SELECT count(*) FROM runbook_1.references_1")[0][0]
    assert entries >= 10_000
    done = len(run.database.statements)
    with run.database.session() as session:
        assert correction.drain(run, session, run.plan.references[0], batch_rows=10) == 0
    assert sql("SELECT count(*) FROM runbook_1.references_1") == [(0,)]
    assert len(run.database.statements) - done < 10


def test_no_more_rows_are_held_at_once_than_was_said_however_many_refer_to_one(forward, clinic, sql):
    run = forward("fill")
    user = sql("SELECT id FROM users WHERE role = 'user' LIMIT 1")[0][0]
    sql("INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT %s, d.id, now() FROM (SELECT id FROM doctors LIMIT 1) d,"
        " generate_series(1, 5000)", [user])  # fmt: skip
    sql("UPDATE users SET role = 'doctor' WHERE id = %s", [user])
    done = len(run.database.statements)
    with run.database.session() as session:
        assert correction.drain(run, session, run.plan.references[0], batch_rows=300) >= 5000
    rows = [
        each.rows
        for each in run.database.statements[done:]
        if each.name in ("foreign_keys.fill_places", "foreign_keys.correct_some")
    ]
    assert len(rows) > 10 and max(rows) <= 600, "a batch is some blocks of addresses"
    assert sql("SELECT DISTINCT user_role FROM appointments WHERE user_id = %s", [user]) == [("doctor",)]


def test_a_log_that_is_long_is_not_looked_through_under_the_locks(forward, clinic, sql, monkeypatch):
    run = forward("approval")
    monkeypatch.setattr(correction, "drain", lambda *given: 0)
    for _ in range(5):
        sql("UPDATE appointments SET notes = 'x'")
    with pytest.raises(
        LockNotGranted, match=r"because of [\d,]+ changes of appointments, more than can be looked at under the locks"
    ):
        cutover.swap(run, budget_s=0.5)


UNDONE = {
    "a trigger that gives another value": "CREATE TRIGGER keep BEFORE UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION old()",
    "a trigger that leaves the row out": "CREATE TRIGGER keep BEFORE UPDATE ON appointments FOR EACH ROW"
    " WHEN (NEW.user_role <> OLD.user_role) EXECUTE FUNCTION left_out()",
    "a rule": "CREATE RULE keep AS ON UPDATE TO appointments WHERE NEW.user_role <> OLD.user_role DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("what", UNDONE)
def test_what_undoes_every_correction_is_found_before_the_cut_over(forward, clinic, sql, what):
    run = forward("columns")
    sql("CREATE FUNCTION old() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.user_role := OLD.user_role; RETURN NEW; END';"
        " CREATE FUNCTION left_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")  # fmt: skip
    sql(UNDONE[what])
    with pytest.raises(PromiseBroken, match=r"rows of appointments keep another user_role .* undoes the update\. Disable it"):
        migration.walk(run, migration.FORWARD, first="fill", last="keys check")


def test_a_row_that_somebody_is_writing_is_not_one_that_an_update_cannot_correct(forward, clinic, sql, monkeypatch):
    """It is held at one moment and free at the next; that it is wrong at both does not mean that anybody tried."""
    run = forward("fill")
    one = sql("SELECT id FROM appointments WHERE user_role = 'doctor' LIMIT 1")[0]
    with psycopg.connect(clinic) as writer:
        drain = foreign_keys.drain

        def drained(*given: Any) -> int:
            writer.execute("UPDATE appointments SET user_role = 'user' WHERE id = %s", one)
            corrected = drain(*given)
            writer.commit()
            return corrected

        sql("UPDATE appointments SET user_role = 'admin' WHERE id = %s", one)
        monkeypatch.setattr(foreign_keys, "drain", drained)
        migration.walk(run, migration.FORWARD, first="keys check", last="keys check")


def test_for_an_application_that_never_names_the_column_the_fill_trigger_stays(forward, clinic, sql):
    run = forward()
    walk(clinic, "06_verify")
    walk(clinic, "91_finish", approved_by="ann", keep_fill=True)
    user = sql("SELECT id FROM users WHERE role = 'admin'")[0][0]
    book = "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT %s, doc_id, now() FROM appointments LIMIT 1 RETURNING user_role"
    assert sql(book, [user]) == [("admin",)]
    assert sql(book.replace("%s", "(SELECT id FROM users WHERE role = 'doctor' LIMIT 1)")) == [("doctor",)]
    assert sql("SELECT to_regnamespace('runbook_1'), to_regclass('users_retired')") == [(None, None)]
    functions = "SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname LIKE 'appointments%' ORDER BY 1"
    assert sql(functions) == [("appointments_user_role_fill_1",), ("appointments_user_role_named_1",)]
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        sql(book, ["00000000-0000-0000-0000-000000000000"])
    assert ledger.of(run.database, "users").state == "finished"


REPLICA = "SET session_replication_role = replica; "


@pytest.mark.long
def test_writers_of_every_kind_are_followed_after_the_cut_over(database, sql):
    """In replica mode, as a subscription and many loaders work; and where a trigger of the table sets the reference itself."""
    sql(
        "CREATE TABLE u (id int PRIMARY KEY, k text NOT NULL, merged_into int); INSERT INTO u SELECT n, (ARRAY['a', 'b'])[1 + n % 2]"
        " FROM generate_series(1, 30) n; CREATE TABLE r (id int PRIMARY KEY, u_id int NOT NULL REFERENCES u, note text);"
        " INSERT INTO r SELECT n, n FROM generate_series(1, 30) n; CREATE FUNCTION redirect() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN SELECT coalesce(merged_into, id) INTO NEW.u_id FROM u WHERE id = NEW.u_id; RETURN NEW; END $$;"
        " CREATE TRIGGER zzzz_redirect BEFORE INSERT OR UPDATE ON r FOR EACH ROW EXECUTE FUNCTION redirect()"
    )
    run = migration.forward(database, table="u", key="k")
    wrong = "SELECT count(*) FROM r LEFT JOIN u ON (u.id, u.k) = (u_id, u_k) WHERE u.id IS NULL"
    for kept in (False, True):
        sql(
            REPLICA
            + "INSERT INTO r (id, u_id) VALUES (99, 2); UPDATE r SET u_id = 2 WHERE id = 2; UPDATE r SET u_id = 2 WHERE id = 1"
        )
        sql(REPLICA + "UPDATE r SET u_id = 1, u_k = 'b' WHERE id = 1")
        sql("UPDATE u SET merged_into = 6 WHERE id = 5; UPDATE r SET note = 1 WHERE id = 5")
        assert sql("SELECT u_id, u_k FROM r WHERE id IN (5, 99) ORDER BY id") == [(6, "a"), (2, "a")]
        assert sql(wrong) == [(0,)]
        if not kept:
            verify.check(run)
            sql('ALTER TABLE r ENABLE TRIGGER "~runbook_fill_u_k"')
            with pytest.raises(PromiseBroken, match=r"No row of public\.r has a key without its u_k"):
                verify.check(run)
            sql("DELETE FROM r WHERE id = 99; UPDATE u SET merged_into = NULL; UPDATE r SET u_id = 5 WHERE id = 5")
            sql('ALTER TABLE r ENABLE ALWAYS TRIGGER "~runbook_fill_u_k"')
            verify.check(run)
            migration.walk(run, {"approval": migration.END["approval"], "drop": lambda run: finish.drop(run, keep_fill=True)})


HISTORY = """CREATE TABLE history (LIKE appointments, at timestamptz DEFAULT now());
CREATE FUNCTION hist() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO history SELECT OLD.*, now(); RETURN NULL; END $$;
CREATE TRIGGER hist AFTER UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION hist()"""
FROZEN = """CREATE FUNCTION frozen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the notes % are frozen', OLD.notes; END $$;
UPDATE appointments SET notes = 'zoe@example.org';
CREATE TRIGGER frozen BEFORE UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION frozen()"""
ASTRAY = """CREATE SCHEMA app; CREATE TABLE app.audit (at timestamptz); CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO audit VALUES (now()); RETURN NEW; END $$;
CREATE TRIGGER note AFTER UPDATE ON appointments FOR EACH ROW EXECUTE FUNCTION app.note()"""
UNCHECKED = "UPDATE appointments SET notes = ''; ALTER TABLE appointments ADD CONSTRAINT noted CHECK (notes <> '') NOT VALID"


@pytest.mark.parametrize(
    ("made", "said", "passed"),
    [
        (HISTORY, r"hist\(\) does not let user_role of public\.appointments be filled in \(42601: .*\)\. Let it pass .* name each column",
         "ALTER TABLE history DROP at, ADD user_role text, ADD at timestamptz"),
        (FROZEN, r"frozen\(\) does not let user_role of public\.appointments be filled in \(P0001\)\. .* DISABLE TRIGGER",
         "ALTER TABLE appointments DISABLE TRIGGER frozen"),
        (ASTRAY, r"app\.note\(\), .* does not find what it names \(42P01: .*audit.*: it relies on the application's search_path",
         "ALTER FUNCTION app.note() SET search_path = app"),
        (UNCHECKED, r"user_role cannot be filled in where a row of public\.appointments breaks noted, .* correct them, or drop the check",
         "ALTER TABLE appointments DROP CONSTRAINT noted"),
    ],
    ids=["by position", "raises", "search_path", "a check"],
)  # fmt: skip
def test_what_lets_no_row_be_updated_is_named_with_a_way_out(clinic, sql, made, said, passed):
    sql(made)
    run = migration.forward(clinic, last="columns")
    with pytest.raises(PromiseBroken, match=said) as stopped:
        foreign_keys.fill(run)
    assert "zoe" not in str(stopped.value) + str(sql("SELECT sentence FROM runbook.action"))
    sql(passed)
    migration.walk(run, {"fill": migration.FORWARD["fill"]})
    assert (sql(WRONG), sql(FILLED)) == ([(0,)], [(True,)])


def test_what_does_not_bear_another_column_is_named_before(clinic, sql):
    """Of the tables that refer to it; each was found by a run that failed, or by an application that did."""
    sql(HISTORY)
    columns = sql(
        "SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'appointments'::regclass AND attnum > 0"
    )[0][0]
    sql(f"CREATE FUNCTION named(b int) RETURNS SETOF appointments LANGUAGE sql AS 'SELECT {columns} FROM appointments'")
    sql("CREATE FUNCTION whole(b int) RETURNS SETOF appointments LANGUAGE sql AS 'SELECT * FROM appointments'")
    found = {each.sentence: each.level for each in migration.plan(clinic).plan.findings}
    said = " ".join(sentence for sentence, level in found.items() if level == "warning")
    assert "The trigger hist of public.appointments inserts rows as a whole" in said
    assert "named(integer) returns rows of public.appointments and lists their columns" in said
    assert "whole(integer)" not in said and "a COPY into it without a list of columns" in said


BLOCKS = {
    "public.kept.its has the type of public.appointments's rows": ("CREATE TABLE kept (its appointments[])", "DROP TABLE kept"),
    "public.booked is made of a type": (
        "CREATE TYPE booking AS (id int, user_id uuid);"
        " CREATE TABLE booked OF booking (PRIMARY KEY (id), FOREIGN KEY (user_id) REFERENCES users)",
        "ALTER TABLE booked NOT OF",
    ),
    "has a constraint appointments_user_role_present": (
        "ALTER TABLE appointments ADD CONSTRAINT appointments_user_role_present CHECK (notes <> 'x')",
        "ALTER TABLE appointments RENAME CONSTRAINT appointments_user_role_present TO noted",
    ),
}


@pytest.mark.parametrize(
    "said", [pytest.param(each, marks=pytest.mark.long) if number else each for number, each in enumerate(BLOCKS)]
)
def test_what_cannot_gain_a_column_stops_the_plan(clinic, sql, said):
    made, passed = BLOCKS[said]
    sql(made)
    with pytest.raises(PlanBlocked, match=said):
        migration.plan(clinic)
    sql(passed)
    migration.forward(clinic, last="columns")
