"""08: what is seen of the partitions is true, stays in the ledger, and fails the look where a threshold is passed."""

from __future__ import annotations

import time
from base64 import b64decode

import pytest
from click.testing import CliRunner

from runbook import additions, application, charts, finish, monitor, verify
from runbook.cli import main
from runbook.errors import OutOfOrder, PromiseBroken
from runbook.ledger import of
from tests import migration
from tests.walk import CLINIC_FILE, dump

WITH_REST = {"users_patients": ["user"], "users_doctors": ["doctor"], "users_admins": ["admin"], "users_rest": "default"}
NURSE = "INSERT INTO users (email, password, first_name, last_name, role) VALUES ('n%s@clinic.example', 'x', 'N', 'N', 'nurse')"


@pytest.fixture
def migrated(forward):
    return forward()


def seen(run) -> dict:
    monitor.look(run)
    return run.finished("monitor", "look").facts


def test_it_is_for_the_time_after_the_cutover(clinic):
    with pytest.raises(OutOfOrder, match=r"public\.users is not partitioned yet: 08_monitor is for the time after 05_cutover"):
        monitor.look(migration.plan(clinic))


def test_what_is_seen_is_what_is_there(migrated, sql, clinic):
    sql("VACUUM ANALYZE users")
    before = dump(clinic)
    facts = seen(migrated)
    assert {leaf["name"]: leaf["rows"] for leaf in facts["partitions"]} == {
        "users_patients": 949,
        "users_doctors": 50,
        "users_admins": 1,
    }
    sizes = dict(sql("SELECT relid::text, pg_total_relation_size(relid) FROM pg_partition_tree('users') WHERE isleaf"))
    assert {leaf["name"]: leaf["bytes"] for leaf in facts["partitions"]} == sizes
    assert (facts["default_rows"], facts["new_values"], facts["filled_rows"], facts["pruning_percent"]) == (0, [], 0, None)
    assert facts["log_bytes"] == sql(f"SELECT pg_total_relation_size('runbook_{migrated.migration}.changes_back')")[0][0]
    assert {index["index"] for index in facts["indexes"]} >= {"users_patients_pkey", "users_doctors_email_key"}
    assert "No threshold is passed" in monitor.check(migrated).sentence
    assert dump(clinic) == before, "it only reads"


@pytest.mark.long
def test_every_look_stays_in_the_ledger_and_is_drawn(migrated):
    for _ in range(2):
        monitor.look(migrated)
    looks = monitor.history(migrated)
    assert len(looks) == 6 and looks["id"].nunique() == 2
    data, shown = charts.over_time(looks, "rows", "Rows per partition")._repr_mimebundle_()
    assert b64decode(data["image/png"]).startswith(b"\x89PNG")
    words = "Rows per partition, the last of 2 looks: users_patients 949 rows; users_doctors 50 rows; users_admins 1 rows"
    assert shown["image/png"]["alt"] == words


@pytest.mark.long
def test_new_values_and_rows_without_a_partition_of_their_own_fail_it(forward, sql):
    run = forward(partitions=WITH_REST)
    assert seen(run)["new_values"] == []
    monitor.check(run)
    sql(NURSE % 1)
    for _ in range(2):  # it stays new until it has a partition
        assert seen(run)["new_values"] == ["nurse"]
        with pytest.raises(
            PromiseBroken, match=r"public\.users: 1 row lies in the DEFAULT partition .*New values of role .*: nurse"
        ):
            monitor.check(run)
    monitor.check(run, max_default_rows=1, max_new_values=1)


@pytest.mark.long
def test_dead_rows_a_long_log_and_old_code_pass_their_thresholds(migrated, sql):
    sql("ALTER TABLE users_patients SET (autovacuum_enabled = off)")
    for _ in range(3):
        sql("UPDATE users_patients SET phone = phone")
    sql(
        "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT (SELECT id FROM users LIMIT 1), (SELECT id FROM doctors LIMIT 1), now()"
    )
    facts = seen(migrated)
    assert facts["filled_rows"] == 1 and facts["log_bytes"] > 0
    monitor.check(migrated, max_dead_percent=100)
    with pytest.raises(PromiseBroken, match=r"More than 50 % of the rows are dead in users_patients \(2,\d+ of"):
        monitor.check(migrated)
    with pytest.raises(PromiseBroken, match=r"1 row needed the fill trigger since yesterday \(max_filled_rows is 0\)"):
        monitor.check(migrated, max_dead_percent=100, max_filled_rows=0)
    with pytest.raises(PromiseBroken, match=r"The log of the way back has \d+\.\d MiB \(max_log_mib is 0\)"):
        monitor.check(migrated, max_dead_percent=100, max_log_mib=0)


@pytest.mark.long
def test_the_share_of_calls_that_prune_is_weighed(migrated, tmp_path):
    (tmp_path / "queries.sql").write_text(
        "SELECT * FROM users WHERE role = $1;\nSELECT * FROM users WHERE id = $1;\n"
        "SELECT * FROM users WHERE email = $1;\nSELECT 1 FROM users WHERE role = 'user';\nSELECT nothing FROM users;\n"
    )
    monitor.look(migrated, str(tmp_path / "queries.sql"))
    assert migrated.finished("monitor", "look").facts["pruning_percent"] == 50
    monitor.check(migrated, min_pruning_percent=50)
    with pytest.raises(PromiseBroken, match="Only 50 % of the calls prune"):
        monitor.check(migrated, min_pruning_percent=51)
    monitor.look(migrated)  # neither statements nor pg_stat_statements
    with pytest.raises(PromiseBroken, match=r"What prunes is not known .min_pruning_percent is 51.: name a file"):
        monitor.check(migrated, min_pruning_percent=51)
    shown = monitor.partitions(migrated)
    assert list(shown["name"]) == ["users_admins", "users_doctors", "users_patients"]
    assert shown["analyzed"].str.match(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC|never").all()


def test_a_partition_of_the_plan_that_is_gone_is_named(migrated, sql):
    sql("ALTER TABLE users_admins RENAME TO users_chiefs; DELETE FROM appointments; DELETE FROM doctors;"
        " ALTER TABLE users DETACH PARTITION users_doctors; DROP TABLE users_doctors")  # fmt: skip
    seen(migrated)
    with pytest.raises(PromiseBroken, match=r"users_doctors of the plan is there no more, and such a row is refused"):
        monitor.check(migrated)


def test_what_no_partition_takes_any_more_is_named_however_it_is_divided(forward, clinic, sql):
    """And what was divided by hand, so that each value is taken still, is not."""
    run = forward(partitions={"users_all": ["user", "doctor", "admin"], "users_rest": "default"})
    sql("ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey; ALTER TABLE users DETACH PARTITION users_all;"
        " CREATE TABLE users_some PARTITION OF users FOR VALUES IN ('user'); CREATE TABLE users_more PARTITION OF users FOR VALUES IN ('doctor', 'admin')")  # fmt: skip
    assert seen(run)["missing"] == []
    assert "No threshold is passed" in monitor.check(run).sentence
    sql("ALTER TABLE users DETACH PARTITION users_rest")
    assert seen(run)["missing"] == ["users_rest"]
    sql("ALTER TABLE users DETACH PARTITION users_more")
    seen(run)
    with pytest.raises(
        PromiseBroken, match=r"users_all, users_rest of the plan are there no more, and .* attach it, or make it again\."
    ):
        monitor.check(run)


@pytest.mark.parametrize(("given", "division"), [
    ("int", {"partition_by": "hash", "modulus": 2}),
    ("date", {"partition_by": "range", "partitions": {"logs_0": ["2000-01-01", "2900-01-01"], "logs_1": ["2900-01-01", None]}}),
])  # fmt: skip
def test_a_remainder_and_the_present_are_asked_for_and_no_partition_at_all_is_a_sentence(
    database, sql, tmp_path, given, division
):
    sql(f"CREATE TABLE logs (id int PRIMARY KEY, at {given} NOT NULL)")
    run = migration.forward(database, table="logs", key="at", **division)
    sql("ALTER TABLE logs DETACH PARTITION logs_0")
    assert seen(run)["missing"] == ["logs_0"]
    with pytest.raises(PromiseBroken, match="logs_0 of the plan is there no more, and such a row is refused: attach it"):
        monitor.check(run)
    if given == "int":
        sql("CREATE TABLE logs_00 PARTITION OF logs FOR VALUES WITH (MODULUS 4, REMAINDER 0)")
        assert seen(run)["missing"] == ["logs_0"], "half of it"
        sql("CREATE TABLE logs_02 PARTITION OF logs FOR VALUES WITH (MODULUS 4, REMAINDER 2); DROP TABLE logs_1")
        assert seen(run)["missing"] == ["logs_1"]
        sql("DROP TABLE logs_00, logs_02")
    else:
        sql("DROP TABLE logs_1")
    for what in ("has no partition any more, and every row is refused: attach one", "is not partitioned any more"):
        with pytest.raises(PromiseBroken, match=rf"public\.logs {what}"):
            monitor.look(run)
        if given == "date":
            with pytest.raises(PromiseBroken, match=rf"public\.logs {what}"):
                additions.draft(run, every="year")
        sql("DROP TABLE logs; CREATE TABLE logs (id int PRIMARY KEY, at date)")


@pytest.mark.long
def test_it_goes_on_after_the_end(migrated):
    verify.check(migrated)
    migration.walk(migrated, migration.END)
    run = of(migrated.database, "users")
    assert seen(run)["log_bytes"] is None
    assert "there is no way back any more" in run.finished("monitor", "look").sentence
    monitor.check(run)


@pytest.mark.long
def test_a_threshold_that_is_passed_is_exit_code_1(forward, clinic, sql, tmp_path):
    forward(partitions=WITH_REST)
    sql(NURSE % 1)
    given = ["monitor", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path)]
    failed = CliRunner().invoke(main, given)
    assert failed.exit_code == 1
    assert "1 row lies in the DEFAULT partition" in failed.stderr


@pytest.mark.long
def test_91_waits_until_nothing_has_needed_the_trigger_for_so_long(migrated, sql):
    verify.check(migrated)
    with pytest.raises(OutOfOrder, match="Nothing has needed the fill trigger yet, but it came only"):
        finish.require(migrated, "ann")
    sql("UPDATE runbook.action SET finished_at = finished_at - interval '30 hours'")
    sql(
        "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT (SELECT id FROM users LIMIT 1), (SELECT id FROM doctors LIMIT 1), now()"
    )
    assert application.filled(migrated)["rows"].sum() == 1
    with pytest.raises(OutOfOrder, match="Old code inserted 1 row without the role column"):
        finish.require(migrated, "ann")
    sql(f"UPDATE runbook_{migrated.migration}.filled SET at = at - interval '25 hours'")
    finish.require(migrated, "ann")
    finish.drop(migrated)
    assert sql("SELECT column_default FROM information_schema.columns WHERE column_name = 'user_role'") == [
        ("'user'::character varying",)
    ]
    assert sql("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%runbook_fill%'") == [(0,)]


def test_it_looks_at_a_partition_that_was_just_added(migrated, clinic, sql):
    """Of which some were vacuumed, and one never was."""
    sql("VACUUM ANALYZE users_patients")
    until = time.monotonic() + 10  # before 15 statistics come when they come
    while sql("SELECT last_vacuum FROM pg_stat_user_tables WHERE relname = 'users_patients'") == [(None,)]:
        assert time.monotonic() < until
    sql("CREATE TABLE users_new PARTITION OF users FOR VALUES IN ('new')")
    monitor.look(migrated)
    shown = monitor.partitions(migrated)
    assert set(shown["vacuumed"].astype(str)) > {"never"}


def test_of_a_default_partition_by_range_the_rows_are_counted_wherever_it_lies(database, sql):
    """Its values may be as many as its rows."""
    sql(
        "CREATE TABLE logs (id int PRIMARY KEY, at date NOT NULL); INSERT INTO logs SELECT n, date '2000-01-01' + n FROM generate_series(0, 99) n"
    )
    run = migration.forward(
        database, table="logs", key="at", partition_by="range", partitions={"past": [None, "2000-02-01"], "rest": "default"}
    )
    sql("CREATE SCHEMA old; ALTER TABLE rest SET SCHEMA old")
    facts = seen(run)
    assert (facts["default_rows"], facts["values"], facts["new_values"]) == (69, [], [])


TODAY, FAR = "2000-01-01", ["9000-01-01", None]
TIMES = {"past": [None, TODAY], "this": [TODAY, "3000-01-01"], "next": ["3000-01-01", "3001-01-01"]}


@pytest.mark.long
@pytest.mark.parametrize(("type_", "row", "partitions", "ahead"), [
    ("date", TODAY, TIMES, 1),
    ("date", TODAY, TIMES | {"far": FAR}, 1),  # what lies beyond a gap takes none of the next rows
    ("date", TODAY, {"past": [None, TODAY], "this": [TODAY, "3000-01-01"]}, 0),
    ("timestamptz", "2000-01-01", {"past": [None, "2000-02-01"], "then": ["2000-02-01", "2000-03-01"]}, 0),  # now is beyond them
    ("date", "3000-01-01", TIMES, 0),  # a row lies in the last
    ("date", TODAY, TIMES | {"rest": "default"}, None),
    ("date", TODAY, TIMES | {"later": ["3001-01-01", None]}, None),
    ("int GENERATED BY DEFAULT AS IDENTITY", "5", {"a": [0, 10], "b": [10, 20], "c": [20, 30]}, 2),
    ("serial", "15", {"a": [0, 10], "b": [10, 20]}, 0),
    ("int", "15", {"a": [0, 10], "b": [10, 20]}, None),  # a measure, it may be, that has an end
    ("uuid DEFAULT gen_random_uuid()", "11111111-1111-1111-1111-111111111111", {"a": [None, "5" * 32], "b": ["5" * 32, "f" * 32]}, None),
])  # fmt: skip
def test_partitions_that_run_out_are_said_before_a_row_is_refused(database, sql, type_, row, partitions, ahead):
    sql(f"CREATE TABLE logs (id int PRIMARY KEY, at {type_} NOT NULL); INSERT INTO logs VALUES (1, '{row}')")
    run = migration.forward(database, table="logs", key="at", partition_by="range", partitions=partitions)
    assert seen(run)["ahead"] == ahead
    if ahead == 0:
        with pytest.raises(
            PromiseBroken, match=r"0 partitions are still to come \(min_ahead is 1\): add the next ones with 20_add"
        ):
            monitor.check(run)
    monitor.check(run, min_ahead=ahead or 0)
    if ahead:
        with pytest.raises(PromiseBroken, match="still to come"):
            monitor.check(run, min_ahead=ahead + 1)
