"""Under an application that nobody tuned: no acknowledged write is lost, no refused one is there, in either direction."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter

import psycopg
import pytest

from runbook.errors import NotEqual
from tests import migration, traffic


def test_no_acknowledged_write_is_lost_from_the_first_step_to_the_rollback(server, clinic, sql):
    before = sql("SELECT count(*) FROM users")[0][0]
    with traffic.pool(clinic, server.version) as pool:
        pool.go_on()
        run = migration.plan(clinic)
        for name in migration.FORWARD:
            migration.walk(run, migration.FORWARD, first=name, last=name)
            pool.go_on(5)
        pool.go_on(100)
        migration.walk(run, migration.BACK, last="swap back")
        pool.go_on(100)
        migration.walk(run, migration.BACK, first="clean")
        pool.go_on(20)
    written = sum(len(writer.model.users) for writer in pool.writers)
    assert sql("SELECT count(*) FROM users")[0][0] == before + written
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]


@pytest.mark.long
def test_the_comparison_is_exact_under_full_load(server, clinic):
    with traffic.pool(clinic, server.version, pause_s=0) as pool:
        pool.go_on()
        run = migration.forward(clinic, last="index")
        for _ in range(10):
            migration.walk(run, migration.FORWARD, first="replay", last="compare")
        assert pool.commits > 100


def test_a_row_that_slipped_past_the_log_is_named(forward, sql):
    """What the comparison is for: the same promise, broken on purpose."""
    run = forward("replay")
    sql("SET session_replication_role = replica; ALTER TABLE users DISABLE TRIGGER USER; UPDATE users SET phone = 'slipped' "
        "WHERE role = 'admin';"
        " ALTER TABLE users ENABLE TRIGGER USER")  # fmt: skip
    with pytest.raises(NotEqual, match=r"users_admins: 1 against 1 row.*different"):
        migration.walk(run, {"": migration.FORWARD["compare"]})


def test_a_column_that_is_computed_otherwise_since_is_the_reason_that_is_given(database, sql):
    made = "CREATE OR REPLACE FUNCTION twice(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 * {}'"
    sql(made.format(2))
    sql("CREATE TABLE thing (id int PRIMARY KEY, kind text NOT NULL, g int GENERATED ALWAYS AS (twice(id)) STORED);"
        " INSERT INTO thing SELECT n, 'a' FROM generate_series(1, 600) n")  # fmt: skip
    run = migration.plan(database, "thing", "kind")
    sql(made.format(3))
    reason = r"600 rows of public.thing hold another g .* UPDATE public.thing SET id = id WHERE g::text"
    with pytest.raises(NotEqual, match=reason) as refused:
        migration.walk(run, migration.FORWARD, last="compare")
    migration.back(run)
    sql(str(refused.value).partition(" then ")[2].partition(";")[0])
    migration.plan(database, "thing", "kind")


@pytest.mark.parametrize("way", ["there", pytest.param("back", marks=pytest.mark.long)])
def test_who_waits_for_the_swap_finds_the_rows_written_just_before(forward, clinic, sql, way):
    """Each row is changed by the transaction after the one that made it, as the swap comes in between. With READ COMMITTED: a snapshot of
    a whole transaction may be older than the swap's last rows, and README.md names that among the limits."""
    run = forward("approval" if way == "there" else "cutover check")
    stop, missed, changed = threading.Event(), list[uuid.UUID](), Counter[str]()
    both = (
        "WITH made AS (INSERT INTO users (email, password, first_name, last_name, role) VALUES (%s, 'x', 'n', 'y', 'user'))"
        " UPDATE users SET first_name = 'new' WHERE id = %s"
    )

    def work() -> None:
        with psycopg.connect(clinic, autocommit=True) as own:
            while not stop.is_set():
                row = uuid.uuid4()
                own.execute(
                    "INSERT INTO users (id, email, password, first_name, last_name) VALUES (%s, %s, 'x', 'o', 'y')",
                    [row, f"{row}@o"],
                )
                found = own.execute(both, [f"{row}@n", row]).rowcount
                kind = own.execute("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass").fetchone()
                changed[kind[0] if kind else ""] += 1
                missed.extend([] if found else [row])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    step = "swap" if way == "there" else "swap back"
    migration.walk(run, {step: {**migration.FORWARD, **migration.BACK}[step]})
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert missed == [] and set(changed) == {"r", "p"}, "before and after"


@pytest.mark.long
def test_six_writers_again_and_again(server, clinic, sql):
    with traffic.pool(clinic, server.version, writers=6, pause_s=0.001) as pool:
        pool.go_on(100)
        for _ in range(2):
            run = migration.forward(clinic)
            pool.go_on(100)
            migration.back(run)
            pool.go_on(50)
    print(pool.errors)
