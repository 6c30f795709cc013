"""Every wait is bounded, whoever is in the way is named, and nobody queues behind us for long."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psycopg
import pytest

from runbook import changes, cutover, locks, partition, restore, rollback
from runbook.database import target
from runbook.errors import LockNotGranted, PlanBlocked, PlanOutdated, told
from runbook.statements import rendered
from tests import migration, servers, traffic

STILL_PLAIN = ("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass", [("r",)])


VERIFIED = (
    "INSERT INTO runbook.action (migration, step, action, state, operator, finished_at) VALUES (%s, 'verify', 'check', 'done',"
    " 'a test', now())"
)


def ready(url: str) -> migration.Run:
    """Everything before the swap."""
    return migration.forward(url, last="approval")


@contextmanager
def transaction(url: str, *statements: str, name: str = "a clerk") -> Iterator[psycopg.Connection]:
    """A session that has run these and sits there."""
    with psycopg.connect(url, application_name=name) as connection:
        for each in statements:
            connection.execute(each)  # type: ignore[arg-type]
        yield connection
        connection.rollback()


def assert_as_before(sql) -> None:
    assert sql(STILL_PLAIN[0]) == STILL_PLAIN[1]
    assert sql("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'users'::regclass") == [(0,)]


def test_an_idle_transaction_makes_the_cutover_give_up_and_is_named(clinic, sql, capsys):
    run = ready(clinic)
    with transaction(clinic, "SELECT count(*) FROM users") as clerk:
        pid = clerk.info.backend_pid
        with pytest.raises(
            LockNotGranted,
            match=rf"within 2 s.*pid {pid} \(postgres, a clerk, idle in transaction.*SELECT count.*Nothing was changed",
        ):
            cutover.swap(run, lock_timeout_ms=100, budget_s=2)
        assert_as_before(sql)
    assert f"waiting for pid {pid}" in capsys.readouterr().out
    assert cutover.swap(run).facts["locked_s"] < 5


def test_whoever_keeps_any_statement_waiting_is_named_and_kept_in_the_record(clinic, capsys, tmp_path, monkeypatch):
    run = migration.forward(clinic, last="partition check")
    monkeypatch.setenv("RUNBOOK_RECORD", str(tmp_path))
    monkeypatch.setenv("JPY_SESSION_NAME", "03_restore.ipynb")
    with transaction(clinic, "LOCK users IN ACCESS EXCLUSIVE MODE") as clerk, ThreadPoolExecutor(1) as pool:
        pid, copying = clerk.info.backend_pid, pool.submit(restore.copy, run)
        said = ""
        while f"waiting for pid {pid} (postgres, a clerk, idle in transaction" not in said:
            assert not copying.done()
            time.sleep(0.1)
            said += capsys.readouterr().out
        assert not copying.done()
        clerk.rollback()
        assert copying.result(timeout=30).rows == 1000
    kept = [json.loads(line) for line in (tmp_path / "03_restore.statements.jsonl").read_text().splitlines()]
    assert {"at", "name", "seconds", "rows", "error", "waited_for", "text"} == kept[0].keys()
    (waited,) = (each for each in kept if each["waited_for"])
    assert waited["name"] == "catalog.definition" and waited["seconds"] > 1
    assert waited["waited_for"][0].startswith(f"AccessShareLock on users: pid {pid} (postgres, a clerk")
    assert run.statements()["waited_for"].str.contains("a clerk").sum() == 1


def test_statements_of_one_round_trip_are_each_in_the_record(database):
    found = target(database)
    with found.session("a test") as session:
        session.at_once(
            [rendered("CREATE TABLE t (n int)"), rendered("INSERT INTO t VALUES (1), (2)"), rendered("SELECT pg_sleep(0.1)")]
        )
        one, two, three = found.statements[-3:]
        assert [each.name for each in (one, two, three)] == [
            "CREATE TABLE t (n int)",
            "INSERT INTO t VALUES (1), (2)",
            "SELECT pg_sleep(0.1)",
        ]
        assert (two.rows, three.rows) == (2, 1)
        assert three.seconds >= 0.1 and one.seconds > 0
        assert one.at < two.at < three.at
        with pytest.raises(psycopg.errors.UndefinedTable), session.transaction():
            session.at_once([rendered("DELETE FROM t"), rendered("DELETE FROM nowhere"), rendered("SELECT 1")])
        assert (found.statements[-1].error, found.statements[-2]) == ("42P01", three)
        assert found.statements[-1].name == "3 statements in one round trip, the first: DELETE FROM t"
        assert session.value(rendered("SELECT count(*) FROM t")) == 2


def test_a_connection_that_breaks_before_the_commit_is_no_commit(database, sql):
    """psycopg leaves the block of a transaction silently when the connection broke after the last statement's answer."""
    with pytest.raises(psycopg.OperationalError), target(database).session("a test") as session, session.transaction():
        session.run(rendered("CREATE TABLE lost (n int)"))
        sql("SELECT pg_terminate_backend(%s, 5000)", [session.pid])
        while not session.connection.closed:
            with suppress(psycopg.Error):
                session.connection.pgconn.consume_input()
    assert sql("SELECT to_regclass('lost')") == [(None,)]


def test_what_blocks_the_log_is_named_too(clinic, sql):
    run = migration.forward(clinic, last="shadow")
    with (
        transaction(clinic, "UPDATE users SET phone = phone WHERE role = 'admin'") as clerk,
        pytest.raises(LockNotGranted, match=f"pid {clerk.info.backend_pid} .postgres, a clerk"),
    ):
        partition.start_log(run, lock_timeout_ms=100, budget_s=3)
    assert sql("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'runbook%'") == [(0,)]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", pytest.param("SERIALIZABLE", marks=pytest.mark.long)])
def test_a_snapshot_older_than_the_copy_is_waited_for_and_named(clinic, sql, isolation):
    with transaction(clinic, f"SET TRANSACTION ISOLATION LEVEL {isolation}", "SELECT 1") as reader:
        run = ready(clinic)
        with pytest.raises(
            LockNotGranted, match=f"snapshot older than the last replay.*pid {reader.info.backend_pid} .postgres, a clerk"
        ):
            cutover.swap(run, budget_s=1)
        assert_as_before(sql)
        assert reader.execute("SELECT count(*) FROM users").fetchone() == (1000,)
    cutover.swap(run)


def test_a_snapshot_that_is_handed_on_is_waited_for_too(database):
    """A transaction that begins now can read by it; and whoever has it, is no session of ours for a name that begins alike."""
    snapshot = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
    with (
        transaction(database, snapshot, name="runbooks") as first, transaction(database, snapshot) as second,
        target(database).session("a replay") as session, ThreadPoolExecutor(1) as pool,
    ):  # fmt: skip
        (exported,) = first.execute("SELECT pg_export_snapshot()").fetchone()
        with session.transaction():
            horizon = str(session.value("locks.horizon"))
        patience = locks.Patience(30)
        waiting = pool.submit(locks.wait_for_snapshots, session, horizon, patience)
        try:
            while first.info.backend_pid not in patience.blockers:
                assert not waiting.done()
            second.execute(f"SET TRANSACTION SNAPSHOT '{exported}'")
            first.rollback()
            while second.info.backend_pid not in patience.blockers:
                assert not waiting.done()
        finally:
            first.rollback()
            second.rollback()
        waiting.result(timeout=30)


@pytest.mark.long
def test_a_passing_snapshot_is_not_blamed_for_a_budget_that_others_used_up(clinic):
    from runbook import locks

    run = ready(clinic)
    with run.database.session("a replay") as session:
        spent = locks.Patience(1, started=time.monotonic() - 5)
        with transaction(clinic, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1") as reader:
            with session.transaction():
                horizon = str(session.value("locks.horizon"))
            threading.Timer(0.3, reader.rollback).start()
            locks.wait_for_snapshots(session, horizon, spent)
            assert reader.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_snapshot_that_would_miss_the_last_rows_is_waited_for(clinic, sql):
    """Younger than the last replay, older than the swap: to it, rows that are replayed under the locks would be missing."""
    run = ready(clinic)
    with run.database.session("a replay") as session:
        from runbook import locks

        patience = locks.Patience(1)
        sql("UPDATE users SET first_name = 'late' WHERE role = 'admin'")
        with (
            transaction(clinic, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1"),
            session.transaction(),
            pytest.raises(locks.NotYet, match="a clerk"),
        ):
            locks.refuse_late_snapshots(session, patience)
        with session.transaction():
            locks.refuse_late_snapshots(session, patience)


def test_a_snapshot_that_is_taken_while_the_last_rows_are_replayed_is_waited_for_too(forward, clinic, sql, monkeypatch):
    run = forward("approval")
    wait, record, late = locks.wait_for_snapshots, cutover._record, list[psycopg.Connection]()

    def waited(*given):
        if late:  # the second attempt
            assert late[0].execute("SELECT count(*) FROM users WHERE first_name = 'late'").fetchone() == (1,)
            late[0].rollback()
        else:
            sql("UPDATE users SET first_name = 'late' WHERE email = (SELECT min(email) FROM users)")
        wait(*given)

    def recorded(*given):
        if not late:
            late.append(psycopg.connect(clinic, autocommit=False))
            late[0].execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            late[0].execute("SELECT 1")
        return record(*given)

    monkeypatch.setattr(locks, "wait_for_snapshots", waited)
    monkeypatch.setattr(cutover, "_record", recorded)
    try:
        assert len(cutover.swap(run).facts["attempts"]) == 2
    finally:
        late[0].close()


@pytest.mark.long
def test_an_old_writer_elsewhere_does_not_hold_everybody_up(server, clinic, sql):
    """It keeps the xmin of every new snapshot low; these are not old for that."""
    sql("CREATE TABLE elsewhere (n integer)")
    with transaction(clinic, "INSERT INTO elsewhere VALUES (1)", name="a batch job"):
        run = ready(clinic)
        with traffic.pool(clinic, server.version, writers=2) as pool:
            pool.go_on(10)
            assert cutover.swap(run, budget_s=20).facts["locked_s"] < 5


@pytest.mark.long
def test_a_prepared_transaction_is_waited_for_and_named(clinic, sql):
    run = ready(clinic)
    with psycopg.connect(clinic, autocommit=True) as other:
        other.execute("BEGIN; UPDATE users SET phone = phone WHERE role = 'admin'; PREPARE TRANSACTION 'order 17'")
        other.execute("BEGIN; CREATE TABLE unrelated (n int); PREPARE TRANSACTION 'another matter'")
        try:
            with pytest.raises(
                LockNotGranted, match=r"the prepared transaction 'order 17' \(COMMIT PREPARED or ROLLBACK PREPARED ends it\)\."
            ):
                cutover.swap(run, lock_timeout_ms=100, budget_s=3)
            assert_as_before(sql)
        finally:
            other.execute("ROLLBACK PREPARED 'order 17'")
            other.execute("ROLLBACK PREPARED 'another matter'")
    cutover.swap(run)


@pytest.mark.long
def test_a_running_autovacuum_is_got_past(clinic, sql):
    sql("ALTER TABLE users SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0)")
    run = ready(clinic)
    sql("UPDATE users SET phone = phone")
    run = run.__class__(run.database, run.migration, run.plan)
    with vacuum_that_takes_long(clinic, sql) as pid:
        swapped = cutover.swap(run, budget_s=30)
        assert swapped.facts["locked_s"] < 5
        assert sql(
            "SELECT count(*) FROM pg_stat_progress_vacuum WHERE pid = %s AND relid = 'users_retired'::regclass", [pid]
        ) == [(0,)]


EAGER_AND_SLOW = (
    "{0}autovacuum_vacuum_threshold = 1, {0}autovacuum_vacuum_scale_factor = 0, {0}autovacuum_vacuum_cost_delay = 100,"
    " {0}autovacuum_vacuum_cost_limit = 1"
)


@pytest.mark.long
@pytest.mark.parametrize("step", ["swap", "swap back", "drop"])
def test_autovacuum_of_what_only_we_use_keeps_nobody_waiting(forward, clinic, sql, step):
    """It yields after deadlock_timeout: an attempt that waits 300 ms for it, while the application waits, is always in vain."""
    run = forward(last="approval" if step == "swap" else "cutover check")
    table = f"{run.staging}.users_patients" if step == "swap" else "public.users_retired"
    sql(f"ALTER TABLE {table} SET ({EAGER_AND_SLOW.format('')})")
    sql("UPDATE users SET phone = 'new' WHERE email IN (SELECT email FROM users WHERE role = 'user' ORDER BY email LIMIT 100)")
    with run.database.session("a replay") as session:
        changes.replay(run, session, changes.FORWARD if step == "swap" else changes.BACK)
    if step == "drop":
        sql(VERIFIED, [run.migration])
        migration.END["approval"](run)
    with vacuum_that_takes_long(clinic, sql, table=table) as pid:
        before = len(run.database.statements)
        act = {**migration.FORWARD, **migration.BACK, **migration.END}[step]
        said = act(run)
        assert sql("SELECT count(*) FROM pg_stat_progress_vacuum WHERE pid = %s AND relid = to_regclass(%s)", [pid, table]) == [
            (0,)
        ]
    assert not [each.name for each in run.database.statements[before:] if each.error], "each attempt kept everybody waiting"
    if step == "swap":
        assert len(said.facts["attempts"]) == 1


@pytest.mark.long
def test_a_reader_of_the_retired_table_is_named_and_keeps_nobody_waiting(forward, clinic):
    run = forward()
    with (
        transaction(clinic, "SELECT count(*) FROM users_retired", name="an auditor") as auditor,
        pytest.raises(LockNotGranted, match=f"pid {auditor.info.backend_pid} .postgres, an auditor"),
    ):
        rollback.swap_back(run, budget_s=1)
    failed = {each.name for each in run.database.statements if each.error}
    assert failed == {"locks.lock_ours"}, "before the application is kept out"
    rollback.swap_back(run)


@pytest.mark.long
@pytest.mark.parametrize("step", ["swap back", "drop"])
def test_autovacuum_of_what_is_stored_apart_keeps_nobody_waiting(database, sql, step):
    """TOAST has an autovacuum of its own, and is dropped with its table."""
    sql(f"{ORDERED}; ALTER TABLE orders ADD note text; ALTER TABLE orders ALTER note SET STORAGE EXTERNAL")
    sql("UPDATE orders SET note = repeat('x', 20000) WHERE id % 10 = 0")
    run = migration.plan(database, "orders", "region", unique="per_partition")
    migration.walk(run, migration.FORWARD)
    table = "orders_retired"
    if step == "swap back":
        table = sql("SELECT relid::regclass::text FROM pg_partition_tree('orders') WHERE isleaf ORDER BY 1")[0][0]
    sql(f"ALTER TABLE {table} SET ({EAGER_AND_SLOW.format('toast.')})")
    sql("UPDATE orders SET note = repeat('y', 20000) WHERE note IS NOT NULL")
    if step == "drop":
        with run.database.session("a replay") as session:
            changes.replay(run, session, changes.BACK)
        sql(VERIFIED, [run.migration])
        migration.END["approval"](run)
    toast = sql("SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = %s::regclass", [table])[0][0]
    with vacuum_that_takes_long(database, sql, table=toast):
        before = len(run.database.statements)
        {**migration.BACK, **migration.END}[step](run)
    assert not [each.name for each in run.database.statements[before:] if each.error], "each attempt kept everybody waiting"


@pytest.mark.long
def test_a_vacuum_against_wraparound_is_waited_for_and_named(clinic, sql):
    sql("ALTER TABLE users SET (autovacuum_freeze_max_age = 100000)")
    run = ready(clinic)
    sql("DO $$BEGIN FOR n IN 1..100001 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END$$")
    with vacuum_that_takes_long(clinic, sql, "(to prevent wraparound)") as pid:  # which yields to nobody
        with pytest.raises(LockNotGranted, match=rf"pid {pid} .*to prevent wraparound"):
            cutover.swap(run, budget_s=1)
        assert_as_before(sql)
        sql("SELECT pg_terminate_backend(%s)", [pid])
    cutover.swap(run, budget_s=60)
    cutover.validate_foreign_keys(run)
    cutover.check(run)


@contextmanager
def vacuum_that_takes_long(url: str, sql, why: str = "", table: str = "") -> Iterator[int]:
    """A real autovacuum worker, slowed down, on users; or on another table, whose own options slow it down."""
    name = sql("SELECT current_database()")[0][0]
    slow = {} if table else {"autovacuum_vacuum_cost_delay": "100ms", "autovacuum_vacuum_cost_limit": "1"}
    settings = {"autovacuum_naptime": "1s", **slow}
    with psycopg.connect(url, dbname="postgres", autocommit=True) as admin:
        for setting, value in settings.items():
            admin.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
        admin.execute("SELECT pg_reload_conf()")
        try:
            end = time.monotonic() + 60
            query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND datname = %s AND query LIKE %s"
            while not (found := admin.execute(query, [name, f"%{table or 'public.users'}%{why}%"]).fetchone()):
                assert time.monotonic() < end, "autovacuum does not come"
                time.sleep(0.05)
            yield found[0]
        finally:
            for setting in settings:
                admin.execute(f"ALTER SYSTEM RESET {setting}")
            admin.execute("SELECT pg_reload_conf()")


ORDERED = """
CREATE TABLE orders (id bigserial PRIMARY KEY, region text NOT NULL);
INSERT INTO orders (region) SELECT (ARRAY['north', 'south'])[n % 2 + 1] FROM generate_series(1, 500) n
"""


@pytest.mark.long
def test_whoever_takes_a_number_before_the_table_starves_nobody(database, sql):
    """As Hibernate does: the number's lock is kept to the end of the transaction that then comes to the table."""
    sql(ORDERED)
    run = migration.plan(database, "orders", "region", unique="per_partition")
    migration.walk(run, migration.FORWARD, last="approval")
    stop, waits, written, failures = threading.Event(), [], [], []

    def work() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    with connection.transaction():
                        number = connection.execute("SELECT nextval('orders_id_seq')").fetchone()
                        time.sleep(random.uniform(0.02, 0.06))  # it thinks
                        connection.execute("INSERT INTO orders VALUES (%s, 'north')", number)
                    written.append(number)
                except psycopg.Error as error:
                    failures.append(error)
                waits.append(time.monotonic() - begun)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        swapped = cutover.swap(run, budget_s=15)
        assert sql("SELECT pg_get_serial_sequence('orders', 'id')") == [("public.orders_id_seq",)]
        rollback.swap_back(run, budget_s=15)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert sql("SELECT id FROM orders WHERE id > 500 ORDER BY id") == sorted(written)
    assert sql("SELECT pg_get_serial_sequence('orders', 'id')") == [("public.orders_id_seq",)]
    assert len(swapped.facts["attempts"]) < 8
    assert max(waits) < 0.06 + 2 * 0.3 + 1.0


ORDERS = {
    "users first": (
        "UPDATE users SET phone = phone WHERE id = {user}",
        "UPDATE appointments SET notes = notes WHERE id = {visit}",
    ),
    "appointments first": (
        "UPDATE appointments SET notes = notes WHERE id = {visit}",
        "UPDATE users SET phone = phone WHERE id = {user}",
    ),
    "read, then write": (
        "SELECT count(*) FROM active_users WHERE id = {user}",
        "UPDATE users SET phone = phone WHERE id = {user}",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "orders", [list(ORDERS), *(pytest.param([each] * 2, marks=pytest.mark.long) for each in list(ORDERS)[:2])]
)
def test_an_application_starves_nobody_whatever_it_touches_first(clinic, sql, orders):
    run = ready(clinic)
    stop, waits, failures = threading.Event(), [], []

    def work(order: str, number: int) -> None:
        with psycopg.connect(clinic, autocommit=True) as connection:
            row = connection.execute(
                "SELECT user_id, id FROM appointments ORDER BY id OFFSET %s LIMIT 1", [number * 7]
            ).fetchone()
            assert row is not None
            while not stop.wait(random.uniform(0, 0.1)):
                try:
                    with connection.transaction():
                        for each in ORDERS[order]:
                            begun = time.monotonic()
                            connection.execute(each.format(user=f"'{row[0]}'", visit=f"'{row[1]}'"))  # type: ignore[arg-type]
                            waits.append(time.monotonic() - begun)
                            time.sleep(0.02)  # it thinks
                except psycopg.Error as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(order, number)) for number, order in enumerate(orders)]
    for thread in threads:
        thread.start()
    try:
        swapped = cutover.swap(run, lock_timeout_ms=300, budget_s=60)
        time.sleep(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not [error for error in failures if error.sqlstate != "40001"]
    # Relative to what is promised: the timeout, the swap itself, and a machine with little to spare.
    assert max(waits) < 0.3 + 3 * swapped.facts["locked_s"] + 1.0
    assert "no session waited" in swapped.sentence


def test_nobody_queues_longer_than_the_timeout(clinic, sql):
    """A reader that comes while an attempt waits for somebody else's transaction."""
    run = ready(clinic)
    longest = []

    def read() -> None:
        with psycopg.connect(clinic, autocommit=True) as connection:
            while not stop.is_set():
                begun = time.monotonic()
                connection.execute("SELECT count(*) FROM users WHERE role = 'admin'")
                longest.append(time.monotonic() - begun)
                time.sleep(0.01)

    stop = threading.Event()
    readers = [threading.Thread(target=read) for _ in range(2)]
    with transaction(clinic, "SELECT count(*) FROM appointments", "SELECT count(*) FROM doctors"):
        for reader in readers:
            reader.start()
        with suppress(LockNotGranted):
            cutover.swap(run, lock_timeout_ms=200, budget_s=3)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert max(longest) < 0.2 * 4, "the timeout bounds the whole of the lock, not each table"


@pytest.mark.long
def test_a_replica_that_lags_pauses_the_copy(tmp_path):
    """A real streaming replica that replays late."""
    import subprocess

    from runbook import embedded, restore

    folder = servers.temporary_folder()
    with servers.start(18, settings={"max_wal_senders": "5"}) as primary:
        with psycopg.connect(primary.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE clinic")
        embedded.load_clinic(primary.conninfo("clinic"), users=20_000)
        copied = folder / "replica"
        command = [
            primary.bin("pg_basebackup"),
            "-h",
            primary.sockets,
            "-p",
            str(primary.port),
            "-U",
            "postgres",
            "-D",
            copied,
            "-R",
            "-X",
            "stream",
            "-c",
            "fast",
        ]
        subprocess.run(command, check=True, **servers.service())
        sockets = folder / "sockets"
        sockets.mkdir()
        servers.hand_over(folder)
        with (copied / "postgresql.auto.conf").open("a") as file:
            file.write(
                f"unix_socket_directories = '{sockets}'\nrecovery_min_apply_delay = '4s'\nhot_standby = "
                f"on\nwal_receiver_status_interval = 1\n"
            )
        replica = servers.Server(18, primary.programs, copied, sockets, primary.port)
        replica.start()
        try:
            run = migration.forward(primary.url("clinic"), last="partition check")
            time.sleep(1)
            import contextlib
            import io

            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                restore.copy(run, workers=1, range_mib=1, max_replica_lag_s=1)
            assert "paused: a replica is" in said.getvalue()
            assert "goes on" in said.getvalue()
            migration.walk(run, migration.FORWARD, first="settle")
            with pytest.raises(PlanBlocked, match=r"this server is a standby\. Name the primary"):
                migration.plan(replica.url("clinic"), table="doctors", key="name", partitions={"named": "default"})
        finally:
            replica.stop("immediate")


@pytest.mark.long
def test_many_active_sessions_pause_the_copy_and_it_says_so(clinic, sql, capsys):
    from runbook import restore

    run = migration.forward(clinic, last="partition check")
    with psycopg.connect(clinic, autocommit=True, application_name="a report") as report:
        thread = threading.Thread(target=lambda: report.execute("SELECT pg_sleep(1.5), 1 FROM generate_series(1, 1)"))
        second = psycopg.connect(clinic, autocommit=True)
        other = threading.Thread(target=lambda: second.execute("SELECT pg_sleep(1.5)"))
        for each in (thread, other):
            each.start()
        time.sleep(0.2)
        restore.copy(run, max_active_sessions=1)
        for each in (thread, other):
            each.join()
        second.close()
    out = capsys.readouterr().out
    assert "paused: 2 sessions are active (limit 1)" in out
    assert "goes on" in out


def read_whole(session, sql):
    """How often one of the clinic's tables was read from its beginning to its end, so far: a session that has ended says it last."""
    servers.flush_statistics(session.connection)
    tables = "('users', 'users_patients', 'appointments')"
    query, seen = f"SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname IN {tables}", None
    while seen != (seen := sql(query)[0][0]):
        time.sleep(0.2)
    return seen


def test_a_log_that_was_long_makes_no_later_replay_read_the_whole_table(forward, clinic, sql):
    """It did, and under writers so many changes came meanwhile that no replay was the last one."""
    run = forward("keys check")
    with run.database.session() as session, transaction(clinic, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM doctors"):
        # What is replayed cannot be cleaned away: somebody has an old snapshot.
        sql("INSERT INTO users (email, password, first_name, last_name) SELECT n, '', '', '' FROM generate_series(1, 30000) n")
        assert changes.replay(run, session)[0] == 30_000
        sql("UPDATE users SET phone = '2' WHERE id IN (SELECT id FROM users LIMIT 20)")
        before = read_whole(session, sql)
        assert changes.replay(run, session)[0] == 20
        assert read_whole(session, sql) == before


def test_few_changes_are_looked_up_where_the_planner_would_read_the_tables_whole(forward, clinic, sql):
    run = forward("keys check")
    with run.database.session() as session:
        changes.replay(run, session)
        sql("UPDATE users SET role = 'doctor' WHERE id IN (SELECT id FROM users WHERE role = 'user' LIMIT 30)")
        before = read_whole(session, sql)
        assert changes.replay(run, session)[0] == 30
        assert read_whole(session, sql) == before
        sql("UPDATE users SET phone = '2'")
        assert changes.replay(run, session)[0] == 1000, "and of many it is not so"
        assert read_whole(session, sql) > before


def test_changes_that_come_faster_than_they_are_replayed_are_the_reason_that_is_given(forward, clinic, sql, monkeypatch):
    run = forward("approval")
    for name in ("SHORT_TAIL", "UNDER_LOCKS"):
        monkeypatch.setattr(changes, name, 0)
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(clinic, autocommit=True) as connection:
            while not stop.is_set():
                connection.execute("UPDATE users SET phone = '1' WHERE id IN (SELECT id FROM users LIMIT 1)")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(
            LockNotGranted, match=r"because of [\d,]+ changes that came while .* faster than that\. Nothing was changed"
        ):
            cutover.swap(run, budget_s=1)
    finally:
        stop.set()
        writer.join(30)
    assert_as_before(sql)


@pytest.mark.long
def test_many_rows_that_refer_to_one_are_not_corrected_under_the_locks(forward, clinic, sql, monkeypatch):
    run = forward("approval")
    user = sql("SELECT id FROM users WHERE role = 'user' LIMIT 1")[0][0]
    sql("INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT %s, d.id, now() FROM (SELECT id FROM doctors LIMIT 1) d, "
        "generate_series(1, 20000)", [user])  # fmt: skip
    late = []

    def waited(*args, **given):
        snapshots(*args, **given)
        if not late:
            late.append(sql("UPDATE users SET role = 'doctor' WHERE id = %s", [user]))

    snapshots = cutover.locks.wait_for_snapshots
    monkeypatch.setattr(cutover.locks, "wait_for_snapshots", waited)
    swapped = cutover.swap(run)
    assert len(swapped.facts["attempts"]) > 1
    with run.database.session() as session:
        corrected = session.rows("ledger.history", migration=run.migration)
    assert corrected
    assert sql("SELECT DISTINCT user_role FROM appointments WHERE user_id = %s", [user]) == [("doctor",)]


@pytest.mark.long
def test_whoever_asks_an_identity_for_a_number_by_name_gets_one_that_nobody_else_gets(database, sql):
    """Its sequence becomes another one at the swap, and whoever waits for it there still gets a number of the first."""
    sql(ORDERED.replace("bigserial", "bigint GENERATED BY DEFAULT AS IDENTITY"))
    run = migration.plan(database, "orders", "region", unique="per_partition")
    migration.walk(run, migration.FORWARD, last="approval")
    stop, taken = threading.Event(), []

    def ask() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                taken.append(connection.execute("SELECT nextval('orders_id_seq')").fetchone()[0])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        cutover.swap(run, budget_s=30)
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert len(taken) == len(set(taken)) > 0
    sql("INSERT INTO orders (region) SELECT 'north' FROM generate_series(1, 2000)")
    assert sql("SELECT min(id) > %s FROM orders WHERE id > 500", [max(taken)]) == [(True,)]


@pytest.mark.long
def test_whoever_falls_silent_under_the_locks_loses_them(clinic, forward, sql):
    """A machine that sleeps, a network that swallows: nothing tells the server, and its check of connections is for statements."""
    run = forward("approval")
    with transaction(clinic) as reader, ThreadPoolExecutor(1) as pool, pytest.raises(psycopg.Error) as caught:
        patience = locks.Patience(60, 300)
        with run.database.session("swap") as session, locks.exclusive(session, patience, [run.names["source"]]):
            reading = pool.submit(reader.execute, "SET statement_timeout = '20s'; SELECT count(*) FROM users")
            reading.result(30)
            session.run("locks.now")
    assert "fell silent while others waited" in told(caught.value)
    migration.walk(run, migration.FORWARD, first="swap")


@pytest.mark.parametrize(
    ("done", "undone", "said"),
    [
        pytest.param("GRANT SELECT ON users TO PUBLIC", "REVOKE SELECT ON users FROM PUBLIC", "PUBLIC", marks=pytest.mark.long),
        ("ALTER TABLE users ADD CONSTRAINT named CHECK (email <> '')", "ALTER TABLE users DROP CONSTRAINT named", "named"),
    ],
)
def test_what_was_changed_since_the_plan_is_named_and_taking_it_back_is_enough(clinic, forward, sql, done, undone, said):
    run = forward("keys check")
    sql(done)
    with pytest.raises(
        PlanOutdated, match=rf"was altered since the plan \w+ was made \([^)]*{said}[^)]*\): take that back and go on"
    ):
        migration.walk(run, migration.FORWARD, first="approval", last="swap")
    sql(undone)
    migration.walk(run, migration.FORWARD, first="approval")


MEANWHILE = {  # what 00 stops for, or the swap would lose, made after the plan
    "CREATE TABLE kids (extra int) INHERITS (users)": ("DROP TABLE kids", "inheritance of public.kids"),
    "CREATE TABLE base (id uuid NOT NULL); ALTER TABLE users INHERIT base": ("ALTER TABLE users NO INHERIT base", "inheritance of public.base"),
    "CREATE TABLE history (u users)": ("DROP TABLE history", "its rows in column u of public.history"),
    "CREATE SUBSCRIPTION feed CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false); "
    "INSERT INTO pg_subscription_rel SELECT oid, 'users'::regclass, 'r', NULL FROM pg_subscription": (
        "DELETE FROM pg_subscription_rel; ALTER SUBSCRIPTION feed SET (slot_name = NONE); DROP SUBSCRIPTION feed", "subscription feed"),
    "ALTER TABLE appointments ALTER user_id DROP NOT NULL": ("ALTER TABLE appointments ALTER user_id SET NOT NULL", "constraint appointments_user_id_fkey of public.appointments"),
}  # fmt: skip


def test_what_stops_the_plan_stops_the_swap_when_it_came_meanwhile(forward, sql):
    run = forward("keys check")
    for done, (undone, said) in MEANWHILE.items():
        for statement in done.split("; "):
            sql(statement)
        with pytest.raises(PlanOutdated, match=re.escape(said)):
            migration.walk(run, migration.FORWARD, first="approval", last="swap")
        for statement in undone.split("; "):
            sql(statement)
    migration.walk(run, migration.FORWARD, first="approval", last="swap")


def test_a_value_of_the_key_that_was_renamed_meanwhile_is_named_before_the_swap(database, sql):
    sql(
        "CREATE TYPE state AS ENUM ('new', 'done'); CREATE TABLE jobs (id int PRIMARY KEY, state state NOT NULL); INSERT INTO jobs VALUES (1, 'new'), (2, 'done')"
    )
    run = migration.plan(database, "jobs", "state")
    migration.walk(run, migration.FORWARD, last="keys check")
    sql("ALTER TYPE state ADD VALUE 'late'; ALTER TYPE state RENAME VALUE 'done' TO 'finished'")
    with pytest.raises(PlanOutdated, match=r"public\.state has no 'done' any more, .* give the value its name back"):
        migration.walk(run, migration.FORWARD, first="approval", last="swap")
    sql("ALTER TYPE state RENAME VALUE 'finished' TO 'done'")
    migration.walk(run, migration.FORWARD, first="approval", last="swap")
