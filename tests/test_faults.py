"""Whatever dies, and whenever: the application goes on, the same step again finishes, nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
import pytest

import runbook
from runbook import charts, correction, cutover, forecast, foreign_keys, indexes, ledger, partition, restore, rollback, verify
from runbook.changes import Rewritten
from runbook.database import target
from runbook.errors import AlreadyRunning, LockNotGranted, PlanOutdated, PromiseBroken, RunbookError
from tests import dumps, migration, servers, traffic
from tests.walk import dump


def long(*values: str) -> list[Any]:
    """Parameters that are tried in the long run only."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


STEPS = list(migration.FORWARD) + list(migration.BACK)
FAULTS = ["the kernel is killed", "an interrupt", "the connections are lost", "a backend is killed", "the server stops at once"]
# A lock that a step needs, held by us: there it stops for a moment, and can be struck.
LOCKED = {
    "copy": "LOCK TABLE {staging}.users_doctors IN SHARE MODE",
    "settle": "LOCK TABLE {staging}.users_doctors IN SHARE MODE",
    "index": "LOCK TABLE {staging}.users_admins IN SHARE UPDATE EXCLUSIVE MODE",
    "replay": "LOCK TABLE {staging}.changes IN ACCESS EXCLUSIVE MODE",
    "fill": "LOCK TABLE {staging}.references_1 IN ACCESS EXCLUSIVE MODE",
}


def step(name: str) -> migration.Action:
    return {**migration.FORWARD, **migration.BACK}[name]


@pytest.fixture
def prepare(forward: Callable[..., migration.Run], sql: Callable[..., Any]) -> Callable[[str], migration.Run]:
    """Everything before the named step."""

    def before(name: str) -> migration.Run:
        run = forward(["plan", *STEPS][STEPS.index(name)])
        sql("CHECKPOINT")  # a copied sequence logs its next value only after one: a crash would set it back
        return run

    return before


def rest(run: migration.Run, name: str) -> None:
    """The named step again, and everything after it."""
    for each in STEPS[STEPS.index(name) :]:
        migration.walk(run, {each: step(each)})


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.migration"])  # a process for each step, but what they all import is loaded once


def act(url: str, name: str, begins: Connection, said: Path) -> None:
    """The named step, by the last plan; what is printed goes to a file."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    run = ledger.open_last(url, "users")
    begins.send(True)
    step(name)(run)


class Child:
    """One step in a process of its own, as a kernel runs it."""

    def __init__(self, url: str, name: str, folder: Path) -> None:
        here, there = FORKS.Pipe()
        self.said = folder / f"{name}.txt"
        self.process = FORKS.Process(target=act, args=(url, name, there, self.said))
        self.process.start()
        there.close()
        assert here.recv(), self.said.read_text()

    def kill(self, how: int = signal.SIGKILL) -> str:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it was faster
            os.kill(self.process.pid, how)
        self.process.join(60)
        assert self.process.exitcode is not None, "it lives on"
        return self.said.read_text()


class Holder:
    """Holds a lock, so that the step stops in the middle; wait() returns when somebody waits for it."""

    def __init__(self, url: str, statement: str) -> None:
        self.connection = psycopg.connect(url, application_name="holder")
        self.connection.execute(statement)  # type: ignore[arg-type]
        self.url = url

    def wait(self, within_s: float = 20) -> list[int]:
        end = time.monotonic() + within_s
        query = "SELECT pid FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid)) AND application_name LIKE 'runbook%%'"
        with psycopg.connect(self.url, autocommit=True) as other:
            while time.monotonic() < end:
                if pids := [row[0] for row in other.execute(query, [self.connection.info.backend_pid])]:
                    return pids
                time.sleep(0.02)
        raise AssertionError("nobody came to wait")

    def release(self) -> None:
        with suppress(psycopg.Error):
            self.connection.rollback()
        self.connection.close()


def again(run: migration.Run, name: str, within_s: float = 15) -> None:
    """The same step again: refused by name while the dead one's last statement still ends, then it goes through."""
    end = time.monotonic() + within_s
    while True:
        try:
            rest(run, name)
            return
        except AlreadyRunning:
            assert time.monotonic() < end
            time.sleep(0.2)


def assert_nothing_left(sql) -> None:
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]
    assert sql("SELECT to_regclass('users_backup'), to_regclass('users_retired')") == [(None, None)]


@pytest.mark.parametrize("name", ["copy", *long("settle", "index", "replay", "fill")])
def test_a_killed_kernel_costs_nothing(prepare, server, clinic, sql, name, tmp_path):
    run = prepare(name)
    with traffic.pool(clinic, server.version, writers=1) as pool:
        pool.go_on(10)
        holder = Holder(clinic, LOCKED[name].format(staging=run.staging))
        child = Child(clinic, name, tmp_path)
        holder.wait()
        child.kill()
        holder.release()
        pool.go_on(10)
        again(run, name)
    assert_nothing_left(sql)


@pytest.mark.parametrize("name", ["index", *long("copy", "fill", "replay")])
def test_a_terminated_backend_costs_nothing(prepare, server, clinic, sql, name):
    run = prepare(name)
    with traffic.pool(clinic, server.version, writers=1, crashes=True) as pool:
        pool.go_on(10)
        holder = Holder(clinic, LOCKED[name].format(staging=run.staging))
        thread, failed = struck(run, name)
        for pid in holder.wait():
            sql("SELECT pg_terminate_backend(%s)", [pid])
        holder.release()
        thread.join(30)
        assert failed, "the step went on without its backend"
        assert isinstance(failed[0], RunbookError | psycopg.Error)
        pool.go_on(10)
        again(run, name)
    assert_nothing_left(sql)


def struck(run: migration.Run, name: str) -> tuple[threading.Thread, list[BaseException]]:
    """The step at work in a thread, to be struck; what it ended with."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            migration.walk(run, {name: step(name)})
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, failed


@pytest.mark.parametrize("name", ["fill", *long("copy", "index", "replay")])
def test_an_interrupt_cancels_what_every_worker_runs(prepare, clinic, sql, name, tmp_path):
    run = prepare(name)
    holder = Holder(clinic, LOCKED[name].format(staging=run.staging))
    child = Child(clinic, name, tmp_path)
    holder.wait()
    assert "KeyboardInterrupt" in child.kill(signal.SIGINT)
    assert sql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'runbook%' AND state = 'active'") == [(0,)]
    holder.release()
    again(run, name)
    assert_nothing_left(sql)


def strike(
    fault: str, run: migration.Run, name: str, server: servers.Server, clinic: str, sql: Callable[..., Any], tmp_path: Path
) -> None:
    """The step begins, and this happens to it at whatever moment; returns when nothing of it works any more."""
    moment = random.uniform(0, 0.15)
    if fault in ("the kernel is killed", "an interrupt"):
        child = Child(clinic, name, tmp_path)
        time.sleep(moment)
        child.kill(signal.SIGKILL if fault == "the kernel is killed" else signal.SIGINT)
    else:
        thread, _ = struck(run, name)
        time.sleep(moment)
        if fault == "the connections are lost":
            sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'runbook%'")
        elif fault == "a backend is killed":  # the server ends every session and recovers
            with suppress(psycopg.Error, ProcessLookupError):
                at_work = "application_name LIKE 'writer%' OR application_name LIKE 'runbook%'"
                ((pid,), *_) = sql(f"SELECT pid FROM pg_stat_activity WHERE {at_work} ORDER BY random()") or [(0,)]
                assert pid, "there is nobody whose backend could be killed"
                os.kill(pid, signal.SIGKILL)
        else:
            server.stop("immediate")
            server.start()
        thread.join(60)
        assert not thread.is_alive()
    end = time.monotonic() + 15
    while time.monotonic() < end:  # what a dead process asked for goes on for a second
        with suppress(psycopg.Error):
            if sql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'runbook%'") == [(0,)]:
                return
        time.sleep(0.1)
    raise AssertionError("something still works for a step that died")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in STEPS if "check" not in name and name != "approval"])
def test_every_step_survives_every_fault(prepare, server, clinic, sql, name, tmp_path):
    """One after the other, the step begun again after each; the same step once more finishes."""
    run = prepare(name)
    with traffic.pool(clinic, server.version, writers=2, crashes=True) as pool:
        for fault in FAULTS:
            pool.go_on(10)
            strike(fault, run, name, server, clinic, sql, tmp_path)
        pool.go_on(10)
        again(run, name)
    assert_nothing_left(sql)


@pytest.mark.parametrize("name", ["swap", *long("copy", "swap back")])
def test_a_server_that_stops_at_once_and_starts_again_lost_nothing(prepare, server, clinic, sql, name):
    run = prepare(name)
    with traffic.pool(clinic, server.version, writers=1, crashes=True) as pool:
        pool.go_on(20)
        thread, _ = struck(run, name)
        time.sleep(0.02)
        server.stop("immediate")
        server.start()
        thread.join(60)
        pool.go_on(20)
        again(run, name)
    assert_nothing_left(sql)


@pytest.mark.long
@pytest.mark.parametrize("name", ["swap", *long("swap back")])
def test_the_ledger_and_the_swap_never_disagree(prepare, sql, name):
    """The connection is lost at whatever moment of the step: the table and the ledger tell the same."""
    run = prepare(name)
    done = name == "swap back"
    for delay in (0.0, 0.01, 0.03, 0.05, 0.08, 0.12):
        thread, _ = struck(run, name)
        time.sleep(delay)
        sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'runbook cutover%' OR "
            "application_name LIKE 'runbook rollback%'"
        )
        thread.join(30)
        swapped = sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("p",)]
        assert (run.finished("cutover", "swap") is not None) == swapped
        if swapped != done:
            break
    again(run, name)
    assert_nothing_left(sql)


@pytest.mark.long
def test_a_second_run_is_refused_by_name_while_the_first_lives_and_not_after(prepare, clinic, sql, tmp_path):
    run = prepare("copy")
    holder = Holder(clinic, LOCKED["copy"].format(staging=run.staging))
    child = Child(clinic, "copy", tmp_path)
    holder.wait()
    with pytest.raises(AlreadyRunning, match=r"runbook restore\.copy of postgres"):
        restore.copy(run)
    child.kill()
    holder.release()
    again(run, "copy")


@pytest.mark.long
def test_a_crash_between_building_an_index_and_adopting_it_is_made_good(prepare, sql):
    run = prepare("index")
    with run.database.session("a run that died") as session:
        session.run(indexes.builds(run)[0].statements[0])
    rest(run, "index")
    assert_nothing_left(sql)


@pytest.mark.long
def test_a_full_disk_stops_the_step_and_not_the_application(database, sql):
    """A quota that needs no root: sorting for an index and hashing for a comparison take temporary files."""
    from runbook import embedded

    embedded.load_clinic(database, users=20_000)
    name = sql("SELECT current_database()")[0][0]
    run = migration.forward(database, last="settle")
    sql(f'ALTER DATABASE "{name}" SET temp_file_limit = 0')
    sql(f"ALTER DATABASE \"{name}\" SET maintenance_work_mem = '1MB'")
    run = ledger.of(target(database), "users")  # whose connections have that
    with pytest.raises((psycopg.errors.ConfigurationLimitExceeded, RunbookError)):
        restore.build_indexes(run)
    sql("UPDATE users SET first_name = 'goes on' WHERE email LIKE '%sample7@%'")
    sql(f'ALTER DATABASE "{name}" RESET ALL')
    rest(run, "index")
    assert sql("SELECT count(*) FROM users WHERE first_name = 'goes on'") == [(1,)]
    assert_nothing_left(sql)


@pytest.mark.long
@pytest.mark.parametrize("name", ["backup", "copy", "replay"])
def test_a_full_tablespace_stops_the_step_and_not_the_application(prepare, clinic, sql, name):
    if os.geteuid() != 0:
        pytest.skip("PostgreSQL needs root here: only root may mount a small tmpfs")
    folder = servers.temporary_folder()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"PostgreSQL needs a mount that is not allowed here: {mounted.stderr.strip()}")
    try:
        home = folder / "space"
        home.mkdir()
        servers.hand_over(folder)
        space = f"small_{os.getpid()}_{name}"
        sql(f"CREATE TABLESPACE {space} LOCATION '{home}'")
        run = prepare(name)
        database = sql("SELECT quote_ident(current_database())")[0][0]
        if name == "backup":  # goes there
            sql(f"ALTER DATABASE {database} SET default_tablespace = {space}")
            run = ledger.of(target(clinic), "users")  # whose connections have that
        else:
            for leaf in migration.PARTITIONS:
                sql(f"ALTER TABLE {run.staging}.{leaf} SET TABLESPACE {space}")
        sql("UPDATE users SET phone = 'more than fits'")
        filler = folder / "filler"
        filler.write_bytes(b"x" * (6 << 20))
        with suppress(OSError), filler.open("ab", buffering=0) as rest_of_it:
            while True:
                rest_of_it.write(b"x" * 4096)
        with pytest.raises((psycopg.errors.DiskFull, RunbookError), match="No space left on device"):
            migration.walk(run, {name: step(name)})
        sql("UPDATE users SET first_name = 'goes on' WHERE email LIKE '%sample7@%'")
        filler.unlink()
        sql(f"ALTER DATABASE {database} RESET default_tablespace")
        rest(run, name)
        assert_nothing_left(sql)
        sql(f"DROP TABLESPACE {space}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def valid_or_not(url: str) -> dict[tuple[str, str], str]:
    """The schema, whether its foreign keys are validated or not, which takes no lock that anybody waits for."""
    return {entry: text.replace(" NOT VALID", "") for entry, text in dumps.schema(url).items()}


GIVES_UP = {
    "log": partition.start_log,
    "columns": foreign_keys.add_columns,
    "swap": cutover.swap,
    "swap back": rollback.swap_back,
    "clean": rollback.clean,
}


@pytest.mark.long
@pytest.mark.parametrize("name", GIVES_UP)
def test_a_lock_that_is_not_had_leaves_everything_as_it_was(prepare, server, clinic, sql, name):
    """Every step that keeps others out gives up after its budget, names who is in the way, and goes on when it is begun again."""
    run = prepare(name)
    with traffic.pool(clinic, server.version, writers=2) as pool:
        pool.go_on(10)
        with psycopg.connect(clinic, application_name="a clerk") as clerk:
            clerk.execute("UPDATE users SET phone = phone WHERE false; DELETE FROM appointments WHERE false")
            before = valid_or_not(clinic)
            with pytest.raises(LockNotGranted, match=f"pid {clerk.info.backend_pid} .postgres, a clerk"):
                GIVES_UP[name](run, lock_timeout_ms=100, budget_s=2)
            assert valid_or_not(clinic) == before
            pool.go_on(10)
        again(run, name)
    assert_nothing_left(sql)


# What somebody else does meanwhile


@pytest.mark.long
def test_an_altered_source_is_found_before_the_swap(prepare, clinic, sql):
    run = prepare("swap")
    sql("ALTER TABLE users ADD COLUMN nickname text")
    with pytest.raises(PlanOutdated, match="column nickname added"):
        cutover.swap(run)
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]
    migration.back(run)
    migration.forward(clinic)


@pytest.mark.long
@pytest.mark.parametrize(
    "change", ["CREATE INDEX later ON users (phone)", "CREATE TABLE later (u uuid REFERENCES users)", "DROP TABLE appointments"]
)
def test_what_somebody_else_makes_or_drops_is_found_and_named(prepare, sql, change):
    run = prepare("swap")
    sql(change)
    with pytest.raises(PlanOutdated, match=r"later|appointments"):
        cutover.swap(run)
    migration.back(run)
    assert sql("SELECT count(*) FROM users") == [(1000,)]


@pytest.mark.long
def test_triggers_that_were_off_for_a_while_are_noticed(prepare, sql):
    run = prepare("swap")
    sql("ALTER TABLE users DISABLE TRIGGER ALL")
    sql("UPDATE users SET first_name = 'unlogged' WHERE email LIKE '%sample7@%'")
    sql("ALTER TABLE users ENABLE TRIGGER ALL")
    with pytest.raises(PlanOutdated, match="went unseen"):
        cutover.swap(run)
    migration.back(run)
    assert sql("SELECT count(*) FROM users WHERE first_name = 'unlogged'") == [(1,)]


@pytest.mark.long
@pytest.mark.parametrize("name", ["swap", *long("copy", "settle", "index", "replay")])
@pytest.mark.parametrize("change", ["TRUNCATE users CASCADE", *long("VACUUM FULL users")])
def test_a_rewrite_sends_the_copy_back_to_its_beginning(prepare, sql, name, change):
    run = prepare(name)
    if name == "copy":  # a part of it is there already
        sql(f"INSERT INTO runbook.copied_range VALUES ({run.migration}, 0, 1, 0)")
    sql(change)
    sql("INSERT INTO users (email, password, first_name, last_name, role) VALUES ('after@x', 'p', 'A', 'A', 'doctor')")
    rows = sql("SELECT count(*) FROM users")
    if name not in ("copy", "index"):
        with pytest.raises(Rewritten, match="03_restore again"):
            migration.walk(run, {name: step(name)})
    if name == "index":
        migration.walk(run, {name: step(name)})
        with pytest.raises(Rewritten, match="03_restore again"):
            restore.replay(run)
    migration.walk(run, migration.FORWARD, first="copy")
    assert sql("SELECT count(*) FROM users") == rows
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("p",)]


def test_an_unknown_key_disturbs_nobody_and_stops_the_cutover(prepare, sql):
    run = prepare("swap")
    sql("UPDATE users SET role = 'nurse' WHERE email LIKE '%sample7@%'")
    with pytest.raises(PromiseBroken, match=r"'nurse' \(1\)"):
        cutover.swap(run)
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]
    sql("UPDATE users SET role = 'user' WHERE role = 'nurse'")
    rest(run, "swap")
    assert_nothing_left(sql)


@pytest.mark.long
def test_a_role_that_changed_and_changed_back_is_followed_by_its_appointments(prepare, sql):
    """Corrected in between, from what was then the truth: only a comparison with the rows themselves finds it."""
    run = prepare("swap")
    sql("UPDATE users SET role = 'doctor' WHERE email LIKE '%sample7@%'")
    sql("UPDATE appointments SET notes = 'touched' WHERE user_id = (SELECT id FROM users WHERE email LIKE '%sample7@%')")
    with run.database.session("a correction") as session:
        for reference in foreign_keys.added(run):
            correction.drain(run, session, reference)
    sql("UPDATE users SET role = 'user' WHERE email LIKE '%sample7@%'")
    migration.walk(run, migration.FORWARD, first="swap")
    assert sql("SELECT count(*) FROM appointments a JOIN users u ON u.id = a.user_id WHERE a.user_role <> u.role") == [(0,)]


@pytest.mark.long
def test_a_referencing_table_that_was_made_anew_is_noticed_before_the_cut_over(prepare, sql):
    run = prepare("swap")
    sql(
        "CREATE TABLE fresh (LIKE appointments INCLUDING ALL); INSERT INTO fresh SELECT * FROM appointments; DROP TABLE appointments;"
        " ALTER TABLE fresh RENAME TO appointments; ALTER TABLE appointments ADD CONSTRAINT appointments_user_id_fkey"
        " FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE"
    )
    sql("INSERT INTO appointments (user_id, doc_id, scheduled_at)"
        " SELECT u.id, d.id, now() FROM users u, (SELECT id FROM doctors LIMIT 1) d WHERE u.role = 'admin'")  # fmt: skip
    with pytest.raises((PromiseBroken, PlanOutdated), match="appointments"):
        cutover.swap(run)
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]


def test_a_swap_whose_answer_was_lost_does_not_say_what_nobody_measured(forward, clinic, monkeypatch):
    run, record = forward("approval"), cutover._record

    def lost(action: Any, patience: Any, replayed: int, locked: float | None, waits: Any) -> Any:
        if locked is not None:  # committed already
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return record(action, patience, replayed, locked, waits)

    monkeypatch.setattr(cutover, "_record", lost)
    with pytest.raises(psycopg.OperationalError):
        cutover.swap(run)
    monkeypatch.undo()
    again = runbook.open(clinic, "users")
    assert again.swapped
    swapped = cutover.swap(again)
    assert "users is partitioned. The answer of its commit was lost, and with it for how long" in swapped.sentence
    migration.walk(again, migration.FORWARD, first="validate")
    assert charts.lock_timeline(swapped).words.startswith("The swap")
    assert "Undo now" in again.next() and "the last time" not in again.next()
    assert len(forecast.beside(again)) == 0
    verify.check(again)


ORDERS = (
    "CREATE TYPE st AS ENUM ('new', 'open', 'done');"
    " CREATE TABLE orders (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, state st NOT NULL DEFAULT 'new', email text UNIQUE, note text);"
    " CREATE TABLE items (order_id bigint NOT NULL REFERENCES orders ON DELETE CASCADE); CREATE TABLE pays (order_id bigint REFERENCES orders);"
    " INSERT INTO orders (state, email) SELECT (ARRAY['new', 'new', 'open', 'done'])[1 + n % 4]::st, n || '@x' FROM generate_series(1, 40) n;"
    " INSERT INTO items SELECT id FROM orders; INSERT INTO pays SELECT id FROM orders"
)


@pytest.mark.parametrize(
    ("last", "change"),
    [
        ("approval", "DROP SCHEMA runbook_1 CASCADE"),
        pytest.param("columns", "DROP TABLE runbook_1.references_1 CASCADE", marks=pytest.mark.long),
    ],
)
def test_logs_that_somebody_dropped_leave_nothing_on_referencing_tables(database: str, sql: Any, last: str, change: str) -> None:
    sql(ORDERS)
    before = dump(database, "--exclude-schema=runbook")
    run = migration.plan(database, "orders", "state", unique="global")
    migration.walk(run, migration.FORWARD, last=last)
    sql(change)
    following = cutover.swap if last == "approval" else foreign_keys.fill
    with pytest.raises(PromiseBroken, match=r"references_1.* there no more: .*90_rollback"):
        following(run)
    migration.back(run)
    assert dump(database, "--exclude-schema=runbook") == before


def test_a_column_that_was_there_before_04_is_the_applications_own(database: str, sql: Any) -> None:
    sql(ORDERS)
    run = migration.plan(database, "orders", "state", unique="global")
    migration.walk(run, migration.FORWARD, last="restore check")
    sql("ALTER TABLE pays ADD order_state st DEFAULT 'done'")
    with pytest.raises(PromiseBroken, match=r"refused 04_foreign_keys of public\.orders \(42701: .*order_state.*90_rollback"):
        foreign_keys.add_columns(run)
    sql("DROP SCHEMA runbook_1 CASCADE; ALTER TABLE items DROP order_state")
    migration.back(run)
    assert sql("SELECT count(*) FROM pays WHERE order_state = 'done'") == [(40,)]


def test_a_table_that_inherits_from_a_referencing_one_is_named_and_does_not_lead_round(database: str, sql: Any) -> None:
    sql(ORDERS)
    run = migration.plan(database, "orders", "state", unique="global")
    for first, last, following in (("backup", "restore check", foreign_keys.add_columns), ("columns", "approval", cutover.swap)):
        migration.walk(run, migration.FORWARD, first=first, last=last)
        sql("CREATE TABLE heir () INHERITS (items)")
        with pytest.raises(PromiseBroken, match=r"public\.heir inherits from public\.items since the plan: .* NO INHERIT"):
            following(run)
        sql("ALTER TABLE heir NO INHERIT items; DROP TABLE heir")
    migration.walk(run, migration.FORWARD, first="swap")
    assert sql("SELECT count(*) FROM items JOIN orders ON (id, state) = (order_id, order_state)") == [(40,)]


def test_names_that_are_taken_or_gone_are_told_before_the_locks(database: str, sql: Any) -> None:
    sql(ORDERS)
    run = migration.plan(database, "orders", "state", unique="global")
    migration.walk(run, migration.FORWARD, last="columns")
    sql("ALTER TABLE items RENAME order_state TO other")
    with pytest.raises(
        PromiseBroken, match=r"public\.items\.order_state, which 04_foreign_keys added, is there no more: rename it back"
    ):
        foreign_keys.fill(run)
    sql("ALTER TABLE items RENAME other TO order_state")
    migration.walk(run, migration.FORWARD, first="fill", last="approval")
    for change, name, back in (
        ("CREATE TABLE orders_retired ()", "orders_retired", "DROP TABLE orders_retired"),
        ("CREATE TABLE orders_new ()", "orders_new", "DROP TABLE orders_new"),
        ("CREATE INDEX orders_pkey_retired ON pays (order_id)", "orders_pkey_retired", "DROP INDEX orders_pkey_retired"),
        ("CREATE SEQUENCE orders_id_seq_retired", "orders_id_seq_retired", "DROP SEQUENCE orders_id_seq_retired"),
    ):
        sql(change)
        with pytest.raises(
            PromiseBroken, match=rf"needs a name that is taken by now: public\.{name}\. Rename .* run 05_cutover again"
        ):
            cutover.swap(run)
        sql(back)
    sql("ALTER TABLE pays DROP order_state")
    with pytest.raises(PromiseBroken, match=r"public\.pays\.order_state.*add a column of that name and roll back"):
        cutover.swap(run)
    sql("ALTER TABLE pays ADD order_state st")
    migration.back(run)


@pytest.mark.long
def test_what_the_server_refuses_because_of_others_is_a_sentence_with_a_way_out(database: str, sql: Any) -> None:
    sql(ORDERS)
    name = sql("SELECT current_database()")[0][0]
    sql(
        f"CREATE ROLE mere_{name} LOGIN; GRANT CREATE ON DATABASE {name} TO mere_{name}; GRANT ALL ON SCHEMA public TO mere_{name}"
    )
    for table in ("orders", "items", "pays"):
        sql(f"ALTER TABLE {table} OWNER TO mere_{name}")
    run = migration.plan(database.replace("postgres@", f"mere_{name}@"), "orders", "state", unique="global")
    migration.walk(run, migration.FORWARD, last="restore check")
    changes = [
        ("ALTER TABLE items OWNER TO postgres", f"ALTER TABLE items OWNER TO mere_{name}"),
        ("ALTER TABLE items ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
         "ALTER TABLE items DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY"),
    ]  # fmt: skip
    for do, undo in changes:
        sql(do)
        with pytest.raises(PromiseBroken, match=r"refused 04_foreign_keys of public\.orders \(42501: .*90_rollback"):
            migration.walk(run, migration.FORWARD, first="columns", last="keys check")
        sql(undo)
    migration.walk(run, migration.FORWARD, first="columns", last="approval")
    for do, undo in changes:
        sql(do)
        with pytest.raises(PromiseBroken, match=r"refused 05_cutover of public\.orders \(42501: .*90_rollback"):
            cutover.swap(run)
        if "OWNER" in do:
            with pytest.raises(
                PromiseBroken, match=r"refused 90_rollback of public\.orders \(42501: .* then run 90_rollback again\.$"
            ):
                rollback.clean(run)
        sql(undo)
    migration.walk(run, migration.FORWARD, first="swap")
    verify.check(run)
    migration.walk(run, migration.END, last="approval")
    sql("ALTER TYPE st RENAME VALUE 'new' TO 'fresh'")
    with pytest.raises(PromiseBroken, match=r"refused 91_finish of public\.orders \(22P02: "):
        migration.END["drop"](run)
    sql("ALTER TYPE st RENAME VALUE 'fresh' TO 'new'")
    migration.END["drop"](run)
    sql(f"DROP OWNED BY mere_{name} CASCADE; DROP ROLE mere_{name}")
