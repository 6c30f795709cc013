"""Any sequence of steps, writes and crashes ends where it should: a property, walked at random and compared with a model."""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from psycopg import sql as composed

from runbook import verify
from runbook.errors import RunbookError
from tests import migration, servers

KINDS = ["a", "b", "c"]
kinds, identities = st.sampled_from(KINDS), st.integers(1, 12)
numbers = itertools.count(1)
FORWARD = list(migration.FORWARD)


def histories(server: servers.Server) -> type[RuleBasedStateMachine]:
    """The machine, on databases of this server."""

    class History(RuleBasedStateMachine):
        """A table of a dozen items and a table that refers to it."""

        def __init__(self) -> None:
            super().__init__()
            self.name = f"history_{next(numbers)}"
            self.on_server("CREATE DATABASE {}")
            self.url = server.url(self.name)
            self.items: dict[int, tuple[str, str]] = {}
            self.uses: dict[int, int] = {}
            self.run: migration.Run | None = None
            self.next = 0
            self.going_back = self.over = False
            self.serial = itertools.count(1)
            self.sql(
                "CREATE TABLE items (id integer PRIMARY KEY, kind text NOT NULL, body text UNIQUE);"
                " CREATE TABLE uses (id integer PRIMARY KEY, item integer NOT NULL REFERENCES items ON DELETE CASCADE);"
                " CREATE INDEX ON uses (item)"
            )

        def on_server(self, statement: str) -> None:
            with psycopg.connect(server.conninfo(), autocommit=True) as connection:
                connection.execute(composed.SQL(statement).format(composed.Identifier(self.name)))  # type: ignore[arg-type]

        def sql(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
            with psycopg.connect(self.url, autocommit=True) as connection:
                cursor = connection.execute(statement, values)  # type: ignore[arg-type]
                return cursor.fetchall() if cursor.description else []

        def teardown(self) -> None:
            try:
                self.rows_are_what_was_acknowledged()
                if self.going_back:
                    self.back()
                if self.run is not None and not self.over:
                    self.back()
                    assert self.sql("SELECT relkind::text FROM pg_class WHERE oid = 'items'::regclass") == [("r",)]
                    self.rows_are_what_was_acknowledged()
            finally:
                self.on_server("DROP DATABASE {} WITH (FORCE)")

        # The application

        @rule(identity=identities, kind=kinds)
        def insert(self, identity: int, kind: str) -> None:
            if identity not in self.items:
                body = f"body {next(self.serial)}"
                self.sql("INSERT INTO items VALUES (%s, %s, %s)", (identity, kind, body))
                self.items[identity] = (kind, body)

        @rule(identity=identities)
        def insert_into_a_leaf(self, identity: int) -> None:
            if identity not in self.items and self.sql("SELECT relkind::text FROM pg_class WHERE oid = 'items'::regclass") == [
                ("p",)
            ]:
                body = f"leaf {next(self.serial)}"
                self.sql("INSERT INTO items_a VALUES (%s, 'a', %s)", (identity, body))
                self.items[identity] = ("a", body)

        @rule(identity=identities, kind=kinds)
        def change_kind(self, identity: int, kind: str) -> None:
            if identity in self.items:
                try:
                    self.sql("UPDATE items SET kind = %s WHERE id = %s", (kind, identity))
                except psycopg.errors.FeatureNotSupported:
                    assert server.version == 14
                    return
                self.items[identity] = (kind, self.items[identity][1])

        @rule(one=identities, other=identities)
        def exchange_bodies(self, one: int, other: int) -> None:
            """What is unique wanders from row to row."""
            if one in self.items and other in self.items and one != other:
                (kind, mine), (its_kind, its) = self.items[one], self.items[other]
                self.sql(
                    f"BEGIN; UPDATE items SET body = 'parked' WHERE id = {one}; UPDATE items SET body = '{mine}' WHERE id = "
                    f"{other};"
                    f" UPDATE items SET body = '{its}' WHERE id = {one}; COMMIT"
                )
                self.items[one], self.items[other] = (kind, its), (its_kind, mine)

        @rule(identity=identities)
        def delete(self, identity: int) -> None:
            self.sql("DELETE FROM items WHERE id = %s", (identity,))
            self.items.pop(identity, None)
            self.uses = {use: item for use, item in self.uses.items() if item != identity}

        @rule()
        def truncate(self) -> None:
            self.sql("TRUNCATE items CASCADE")
            self.items, self.uses = {}, {}

        @rule(identity=identities)
        def use(self, identity: int) -> None:
            if identity in self.items:
                number = next(self.serial)
                if self.over:  # old code has no help any more
                    kind = self.items[identity][0]
                    self.sql("INSERT INTO uses (id, item, item_kind) VALUES (%s, %s, %s)", (number, identity, kind))
                else:
                    self.sql("INSERT INTO uses (id, item) VALUES (%s, %s)", (number, identity))
                self.uses[number] = identity

        # The operator

        def action(self) -> migration.Action:
            return migration.FORWARD[FORWARD[self.next]]

        @precondition(lambda self: not self.going_back and not self.over)
        @rule(steps=st.integers(1, 8))
        def forward(self, steps: int) -> None:
            if self.run is None:
                partitions = {f"items_{kind}": [kind] for kind in KINDS}
                self.run = migration.plan(self.url, "items", "kind", partitions=partitions, unique="per_partition")
                self.next = 0
            for _ in range(min(steps, len(FORWARD) - self.next)):
                try:
                    migration.walk(self.run, {"": self.action()})
                except RunbookError as refusal:
                    # A TRUNCATE: the copy begins again, and everything after it.
                    assert "03_restore" in str(refusal), refusal
                    self.next = FORWARD.index("copy")
                    continue
                self.next += 1

        @precondition(lambda self: self.run is not None and not self.going_back and not self.over and self.next < len(FORWARD))
        @rule(delay_ms=st.integers(0, 60))
        def crash_forward(self, delay_ms: int) -> None:
            self.crash([self.action()], delay_ms)

        @precondition(lambda self: self.run is not None and not self.over)
        @rule(delay_ms=st.integers(0, 90))
        def crash_back(self, delay_ms: int) -> None:
            self.going_back = True
            self.crash(list(migration.BACK.values()), delay_ms)

        def crash(self, actions: list[migration.Action], delay_ms: int) -> None:
            """Every backend of the runbook is terminated while it works; what came of it is for the ledger to say."""
            run = self.run
            assert run is not None

            def work() -> None:
                with suppress(RunbookError, psycopg.Error):
                    for action in actions:
                        action(run)

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(delay_ms / 1000)
            self.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'runbook%' AND datname = "
                "current_database()"
            )
            thread.join(60)
            assert not thread.is_alive()

        @precondition(lambda self: self.run is not None and not self.over)
        @rule()
        def back(self) -> None:
            assert self.run is not None
            migration.back(self.run)
            self.run, self.next, self.going_back = None, 0, False

        @precondition(lambda self: self.run is not None and self.next == len(FORWARD) and not self.going_back and not self.over)
        @rule()
        def finish(self) -> None:
            assert self.run is not None
            self.sql(
                "INSERT INTO runbook.action (migration, step, action, state, operator, finished_at)"
                " VALUES (%s, 'verify', 'check', 'done', 'a test', now())", [self.run.migration],
            )  # fmt: skip
            migration.walk(self.run, migration.END)
            self.over = True

        @invariant()
        def rows_are_what_was_acknowledged(self) -> None:
            assert {row[0]: (row[1], row[2]) for row in self.sql("SELECT id, kind, body FROM items")} == self.items
            assert dict(self.sql("SELECT id, item FROM uses")) == self.uses

        @invariant()
        def the_ledger_agrees_with_the_table(self) -> None:
            if self.run is not None and not self.over:
                swapped = self.sql("SELECT relkind::text FROM pg_class WHERE oid = 'items'::regclass") == [("p",)]
                assert (self.run.finished("cutover", "swap") is not None) == swapped

    return History


@pytest.mark.long
def test_any_sequence_of_steps_writes_and_crashes_ends_where_it_should(server):
    chosen = settings(
        max_examples=int(os.environ.get("EXAMPLES", "12")), stateful_step_count=40, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate], print_blob=True,
    )  # fmt: skip
    run_state_machine_as_test(histories(server), settings=chosen)


def test_after_the_end_another_table_of_the_name_is_another_table(database, sql):
    for _ in range(2):
        sql("CREATE TABLE things (id int PRIMARY KEY, kind text NOT NULL)")
        sql("INSERT INTO things SELECT n, (ARRAY['x', 'y'])[1 + n % 2] FROM generate_series(1, 40) n")
        run = migration.forward(database, table="things", key="kind", unique="per_partition")
        verify.check(run)
        migration.walk(run, migration.END)
        sql("DROP TABLE things, things_backup")


@pytest.mark.long
@pytest.mark.parametrize("last", ["swap", "cutover check"])
def test_a_referencing_table_that_goes_after_the_cut_over_closes_nothing(clinic, sql, last):
    run = migration.forward(clinic, last=last)
    if last == "cutover check":
        verify.check(run)
    sql("DROP TABLE appointments")
    if last == "swap":
        migration.walk(run, migration.FORWARD, first="validate")
        migration.back(run)
    else:
        migration.walk(run, migration.END)
