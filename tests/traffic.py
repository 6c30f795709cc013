"""An application that nobody tuned to the migration: writers that remember what was acknowledged, and look again."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors

ROLES = ["user"] * 6 + ["doctor"] * 3 + ["admin"]
# What partitioning, or a role column, may bring to an application that had no such error before.
EXPECTED = {
    "40001": "a row has just moved to another partition, or a snapshot lost a race",
    "0A000": "a prepared SELECT * on a table that gained a column",
    "23503": "an id changed while appointments refer to it, which only the composite key allows",
}
NO_ARBITER = errors.InvalidColumnReference  # ON CONFLICT (id) after the cut-over, (id, role) before it
GONE = (psycopg.OperationalError,)

Users = dict[uuid.UUID, tuple[str, str, str]]  # email, role, first name
Appointments = dict[uuid.UUID, tuple[uuid.UUID, str]]  # user, notes


class Lost(AssertionError):
    """What the database shows is not what it acknowledged."""


@dataclass
class Model:
    """The rows of one writer, as the database acknowledged them."""

    users: Users = field(default_factory=dict)
    appointments: Appointments = field(default_factory=dict)

    def copy(self) -> Model:
        return Model(dict(self.users), dict(self.appointments))

    def remove(self, user: uuid.UUID) -> None:
        del self.users[user]
        for each in [each for each, (owner, _) in self.appointments.items() if owner == user]:
            del self.appointments[each]


class Writer:
    """One connection and the rows that only it writes; every statement's effect is applied to a copy of the model,
    which takes the model's place when the commit is acknowledged."""

    def __init__(self, url: str, seed: int, version: int, crashes: bool = False) -> None:
        self.url, self.name, self.version, self.crashes = url, f"writer{seed}", version, crashes
        self.random = random.Random(seed)
        self.model = Model()
        self.errors: Counter[str] = Counter()
        self.slow: list[float] = []
        self.commits = 0
        self.serial = 0
        self.connection: psycopg.Connection[Any] | None = None
        self.failure: BaseException | None = None
        self.doctor: uuid.UUID | None = None
        self.table: int | None = None
        kinds = [self.insert] * 3 + [self.rename] * 3 + [self.change_role] * 3 + [self.appoint] * 3 + [self.move_appointment] * 2
        kinds += [self.delete, self.change_id, self.upsert, self.copy_in, self.swap_emails, self.again_elsewhere, self.bulk]
        kinds += [self.renote, self.cancel, self.cte] + ([self.merge, self.merge_role] if version >= 15 else [])
        self.kinds: list[Callable[[Model], None]] = kinds

    def run(self, stop: threading.Event, pause_s: float) -> None:
        try:
            while not stop.is_set():
                try:
                    self.turn()
                except GONE as error:
                    if error.sqlstate and not error.sqlstate.startswith(("57P", "08", "25")):
                        raise
                    self.errors["connection"] += 1
                    self.reconnect(stop)
                time.sleep(self.random.uniform(0, 2 * pause_s))
        except BaseException as error:
            self.failure = error

    def reconnect(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self.connect()
                return
            except GONE:
                time.sleep(0.05)

    def connect(self) -> psycopg.Connection[Any]:
        if self.connection is None or self.connection.closed:
            self.connection = psycopg.connect(self.url, application_name=self.name, autocommit=True)
            with self.connection.cursor() as cursor:
                row = cursor.execute("SELECT id FROM doctors LIMIT 1").fetchone()
                self.doctor = row[0] if row else None
        return self.connection

    def turn(self) -> None:
        """A transaction of one or of many statements; sometimes rolled back; then, sometimes, a look."""
        connection = self.connect()
        begun = time.monotonic()
        model = self.model.copy()
        many = self.random.random() < 0.4
        rolled_back = many and self.random.random() < 0.2
        committing = False
        repeatable = many and self.random.random() < 0.15
        try:
            if repeatable:
                self.note_table()
            if many:
                with connection.transaction(force_rollback=rolled_back):
                    if repeatable:
                        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    for _ in range(self.random.randint(2, 5)):
                        self.one(model)
                    committing = not rolled_back
            elif self.crashes:  # a statement that commits by itself may have done so, and its answer is lost with what it made
                with connection.transaction():
                    self.random.choice(self.kinds)(model)
                    committing = True
            else:
                self.random.choice(self.kinds)(model)
            if connection.closed:  # broken after the last answer: psycopg leaves the block as if it had committed
                raise psycopg.OperationalError("the connection was lost before the commit")
            if not rolled_back:
                self.model = model
            self.commits += 1
        except errors.Error as error:
            if connection.closed:
                self.connection = None
                if committing and self.settle_doubt(model):
                    self.model = model
                return
            if not (repeatable and isinstance(error, errors.UniqueViolation) and self.swapped()):
                self.judge(error)
        except Lost:
            if not (repeatable and self.swapped()):
                raise
        finally:
            self.slow.append(time.monotonic() - begun)
        if self.random.random() < 0.15:
            self.look()

    def one(self, model: Model) -> None:
        """One operation of a transaction; now and then within a savepoint that is given up."""
        assert self.connection is not None
        if self.random.random() < 0.25:
            trial = model.copy()
            given_up = self.random.random() < 0.5
            with self.connection.transaction(force_rollback=given_up):
                self.random.choice(self.kinds)(trial)
            if not given_up:
                model.users, model.appointments = trial.users, trial.appointments
        else:
            self.random.choice(self.kinds)(model)

    def note_table(self) -> None:
        assert self.connection is not None
        row = self.connection.execute("SELECT 'users'::regclass::oid").fetchone()
        self.table = row[0] if row else None

    def swapped(self) -> bool:
        """Whether the table was swapped under a transaction of one snapshot. Taken in the swap's last milliseconds, that
        snapshot is older than the rows that the swap itself brought; README.md names this among the limits."""
        before = self.table
        self.note_table()
        self.errors["late snapshot"] += before != self.table
        return before != self.table

    def judge(self, error: errors.Error) -> None:
        if error.sqlstate not in EXPECTED:
            raise error
        if error.sqlstate == "0A000" and not any(known in str(error) for known in ("cached plan", "PostgreSQL 14")):
            raise error
        self.errors[error.sqlstate] += 1

    def settle_doubt(self, after: Model) -> bool:
        """A connection lost during a commit: which of the two states is it? Neither is a lost write."""
        patience = time.monotonic() + 60
        while True:
            try:
                self.connect()
                seen = self.seen()
                break
            except GONE:
                self.connection = None
                if time.monotonic() > patience:
                    raise
                time.sleep(0.05)
        if seen == after:
            return True
        if seen != self.model:
            raise Lost(
                f"{self.name}: after a lost connection neither the state before nor the one after:{difference(self.model, seen)}"
            )
        return False

    # What is written

    def execute(self, query: str, parameters: Any = None) -> psycopg.Cursor[Any]:
        assert self.connection is not None
        return self.connection.execute(query, parameters)  # type: ignore[arg-type]

    def fresh(self) -> tuple[str, str, str]:
        self.serial += 1
        return f"{self.name}.{self.serial}@traffic.example", self.random.choice(ROLES), f"first {self.serial}"

    def some(self, model: Model, most: int = 1) -> list[uuid.UUID]:
        there = list(model.users)
        return self.random.sample(there, min(len(there), self.random.randint(1, most)))

    def insert(self, model: Model) -> None:
        for _ in range(self.random.randint(1, 3)):
            email, role, first = self.fresh()
            row = self.execute(
                "INSERT INTO users (email, password, first_name, last_name, role) VALUES (%s, 'x', %s, 'y', %s) RETURNING id",
                (email, first, role),
            ).fetchone()
            assert row is not None
            model.users[row[0]] = (email, role, first)

    def copy_in(self, model: Model) -> None:
        assert self.connection is not None
        rows = {uuid.uuid4(): self.fresh() for _ in range(self.random.randint(1, 20))}
        with self.connection.cursor().copy("COPY users (id, email, role, first_name, password, last_name) FROM STDIN") as copy:
            for identity, (email, role, first) in rows.items():
                copy.write_row((identity, email, role, first, "x", "y"))
        model.users |= rows

    def expect(self, cursor: psycopg.Cursor[Any], rows: int, what: str) -> None:
        if cursor.rowcount != rows:
            raise Lost(f"{self.name}: {what} found {cursor.rowcount} rows instead of {rows}")

    def update(self, model: Model, column: str, identity: uuid.UUID, value: str) -> None:
        self.expect(
            self.execute(f"UPDATE users SET {column} = %s WHERE id = %s", (value, identity)),
            1,
            f"UPDATE of {column} of {identity}",
        )
        email, role, first = model.users[identity]
        model.users[identity] = (email, value, first) if column == "role" else (email, role, value)

    def rename(self, model: Model) -> None:
        for each in self.some(model):
            self.update(model, "first_name", each, self.fresh()[2])

    def change_role(self, model: Model) -> None:
        for each in self.some(model):
            self.update(model, "role", each, self.random.choice(ROLES))

    def delete(self, model: Model) -> None:
        for each in self.some(model):
            self.expect(self.execute("DELETE FROM users WHERE id = %s", (each,)), 1, f"DELETE of {each}")
            model.remove(each)

    def change_id(self, model: Model) -> None:
        for old in self.some(model):
            new = uuid.uuid4()
            self.expect(self.execute("UPDATE users SET id = %s WHERE id = %s", (new, old)), 1, f"UPDATE of the id {old}")
            model.users[new] = model.users.pop(old)
            for each, (owner, notes) in model.appointments.items():
                if owner == old:
                    model.appointments[each] = (new, notes)

    def upsert(self, model: Model) -> None:
        """As an application does that was changed for the new key and still runs on the old one."""
        assert self.connection is not None
        identity = self.some(model)[0] if model.users and self.random.random() < 0.6 else uuid.uuid4()
        email, role, first = self.fresh()
        if identity in model.users:
            email, role, _ = model.users[identity]
        text = (
            "INSERT INTO users (id, email, password, first_name, last_name, role) VALUES (%s, %s, 'x', %s, 'y', %s)"
            " ON CONFLICT ({}) DO UPDATE SET first_name = excluded.first_name"
        )
        for target in ("id, role", "id"):
            try:
                with self.connection.transaction():
                    self.execute(text.format(target), (identity, email, first, role))
                break
            except NO_ARBITER:
                continue
        else:
            with self.connection.transaction():  # the swap came in between
                self.execute(text.format("id, role"), (identity, email, first, role))
        model.users[identity] = (email, role, first)

    def merge(self, model: Model) -> None:
        known = self.some(model, 3)
        rows = {each: (model.users[each][0], model.users[each][1], self.fresh()[2]) for each in known} | {
            uuid.uuid4(): self.fresh()
        }
        values = ", ".join(["(%s::uuid, %s::text, %s::text, %s::text)"] * len(rows))
        self.expect(
            self.execute(
                f"MERGE INTO users u USING (VALUES {values}) v (id, email, role, first) ON u.id = v.id"
                " WHEN MATCHED THEN UPDATE SET first_name = v.first"
                " WHEN NOT MATCHED THEN INSERT (id, email, password, first_name, last_name, role) VALUES (v.id, v.email, 'x', "
                "v.first, 'y', v.role)",
                [value for identity, row in rows.items() for value in (identity, *row)],
            ),
            len(rows),
            "MERGE",
        )
        model.users |= rows

    def merge_role(self, model: Model) -> None:
        """A MERGE whose only action moves rows: the one that statement triggers on a partitioned table do not see."""
        for each in self.some(model):
            role = self.random.choice(ROLES)
            query = (
                "MERGE INTO users u USING (VALUES (%s::uuid, %s::text)) v (id, role) ON u.id = v.id"
                " WHEN MATCHED THEN UPDATE SET role = v.role"
            )
            self.expect(self.execute(query, (each, role)), 1, "MERGE of a role")
            email, _, first = model.users[each]
            model.users[each] = (email, role, first)

    def swap_emails(self, model: Model) -> None:
        """An address that wanders from one user to another."""
        assert self.connection is not None
        if len(model.users) < 2:
            return
        a, b = self.random.sample(list(model.users), 2)
        with self.connection.transaction():
            for identity, email in ((a, f"{self.name}@wandering"), (b, model.users[a][0]), (a, model.users[b][0])):
                self.expect(self.execute("UPDATE users SET email = %s WHERE id = %s", (email, identity)), 1, "UPDATE of email")
        (mine, *one), (its, *other) = model.users[a], model.users[b]
        model.users[a], model.users[b] = (its, one[0], one[1]), (mine, other[0], other[1])

    def again_elsewhere(self, model: Model) -> None:
        """Deleted and inserted again under the same id, often for another partition, in one transaction."""
        assert self.connection is not None
        for each in self.some(model):
            email, _, first = model.users[each]
            role = self.random.choice(ROLES)
            with self.connection.transaction():
                self.expect(self.execute("DELETE FROM users WHERE id = %s", (each,)), 1, "DELETE")
                self.execute("INSERT INTO users (id, email, password, first_name, last_name, role) VALUES (%s, %s, 'x', %s, "
                             "'y', %s)",
                             (each, email, first, role))  # fmt: skip
            model.remove(each)
            model.users[each] = (email, role, first)

    def bulk(self, model: Model) -> None:
        chosen = self.some(model, 20)
        if chosen:
            first = self.fresh()[2]
            self.expect(
                self.execute("UPDATE users SET first_name = %s WHERE id = ANY(%s)", (first, chosen)),
                len(chosen),
                "UPDATE in bulk",
            )
            model.users |= {each: (*model.users[each][:2], first) for each in chosen}

    def cte(self, model: Model) -> None:
        email, role, first = self.fresh()
        query = (
            "WITH made AS (INSERT INTO users (email, password, first_name, last_name, role) VALUES (%s, 'x', %s, 'y', %s) "
            "RETURNING id),"
            " renamed AS (UPDATE users SET first_name = %s WHERE id = ANY(%s) RETURNING id) SELECT id, (SELECT count(*) FROM renamed) FROM made"
        )
        others = self.some(model, 2)
        row = self.execute(query, (email, first, role, first, others)).fetchone()
        assert row is not None
        if row[1] != len(others):
            raise Lost(f"{self.name}: UPDATE beside an INSERT found {row[1]} rows instead of {len(others)}")
        model.users |= {each: (*model.users[each][:2], first) for each in others}
        model.users[row[0]] = (email, role, first)

    def appoint(self, model: Model) -> None:
        for each in self.some(model):
            row = self.execute(
                "INSERT INTO appointments (user_id, doc_id, scheduled_at, notes) VALUES (%s, %s, now(), %s) RETURNING id",
                (each, self.doctor, self.name),
            ).fetchone()
            assert row is not None
            model.appointments[row[0]] = (each, self.name)

    def move_appointment(self, model: Model) -> None:
        if model.appointments and model.users:
            each, owner = self.random.choice(list(model.appointments)), self.some(model)[0]
            self.expect(
                self.execute("UPDATE appointments SET user_id = %s WHERE id = %s", (owner, each)),
                1,
                "UPDATE of an appointment's user",
            )
            model.appointments[each] = (owner, model.appointments[each][1])

    def renote(self, model: Model) -> None:
        if model.appointments:
            each, notes = self.random.choice(list(model.appointments)), self.fresh()[2]
            self.expect(
                self.execute("UPDATE appointments SET notes = %s WHERE id = %s", (notes, each)), 1, "UPDATE of an appointment"
            )
            model.appointments[each] = (model.appointments[each][0], notes)

    def cancel(self, model: Model) -> None:
        if model.appointments:
            each = self.random.choice(list(model.appointments))
            self.expect(self.execute("DELETE FROM appointments WHERE id = %s", (each,)), 1, "DELETE of an appointment")
            del model.appointments[each]

    # What is read

    def seen(self) -> Model:
        pattern = f"{self.name}.%"
        rows = self.execute("SELECT id, email, role, first_name FROM users WHERE email LIKE %s", (pattern,)).fetchall()
        visits = self.execute(
            "SELECT a.id, a.user_id, a.notes FROM appointments a JOIN users u ON u.id = a.user_id WHERE u.email LIKE %s",
            (pattern,),
        ).fetchall()
        if len({row[0] for row in rows}) != len(rows):
            raise Lost(f"{self.name}: a user stands twice")
        return Model({row[0]: (row[1], row[2], row[3]) for row in rows}, {row[0]: (row[1], row[2]) for row in visits})

    def look(self) -> None:
        """Every user that this writer wrote is there, as written: at once, or in a snapshot taken a little before."""
        assert self.connection is not None
        repeatable = self.random.random() < 0.3
        try:
            self.note_table()
            with self.connection.transaction():
                if repeatable:
                    self.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    self.execute("SELECT count(*) FROM doctors")
                    time.sleep(self.random.uniform(0, 0.02))
                seen = self.seen()
        except errors.Error as error:
            if self.connection.closed:
                raise
            self.judge(error)
            return
        if seen != self.model and not (repeatable and self.swapped()):
            raise Lost(f"{self.name} does not see what was acknowledged (repeatable {repeatable}):{difference(self.model, seen)}")


def difference(expected: Model, seen: Model) -> str:
    lines = []
    for kind, left, right in (("user", expected.users, seen.users), ("appointment", expected.appointments, seen.appointments)):
        for each in left.keys() | right.keys():
            if left.get(each) != right.get(each):
                lines.append(f"\n  {kind} {each}: acknowledged {left.get(each)}, seen {right.get(each)}")
    return "".join(lines[:20])


@dataclass
class Pool:
    """The writers at work."""

    writers: list[Writer]
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def commits(self) -> int:
        return sum(writer.commits for writer in self.writers)

    @property
    def errors(self) -> Counter[str]:
        return sum((writer.errors for writer in self.writers), Counter())

    def go_on(self, commits: int = 40, within_s: float = 60) -> None:
        """Returns when the application has written so much more; fails when it cannot."""
        goal, end = self.commits + commits, time.monotonic() + within_s
        while self.commits < goal:
            self.raise_failures()
            assert time.monotonic() < end, "the application does not go on"
            time.sleep(0.02)

    def raise_failures(self) -> None:
        for writer in self.writers:
            if writer.failure is not None:
                raise writer.failure

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        self.raise_failures()

    def verify(self) -> None:
        """Every acknowledged write is there, and nothing that was refused or rolled back."""
        for writer in self.writers:
            writer.connect()
            seen = writer.seen()
            if seen != writer.model:
                raise Lost(f"{writer.name}: not what was acknowledged:{difference(writer.model, seen)}")


@contextmanager
def pool(
    url: str, version: int, writers: int = 3, seed: int | None = None, pause_s: float = 0.002, crashes: bool = False
) -> Iterator[Pool]:
    """Writers at work while the block runs; at its end every one has looked at all that it wrote.

    Where the server `crashes`, they use transactions only, so that each knows what its commit would have made.
    """
    chosen = random.randrange(10**6) if seed is None else seed
    print(f"traffic's seed is {chosen}")
    at_work = Pool([Writer(url, chosen * 100 + number, version, crashes) for number in range(writers)])
    for writer in at_work.writers:
        at_work.threads.append(threading.Thread(target=writer.run, args=(at_work.stop, pause_s), daemon=True))
    for thread in at_work.threads:
        thread.start()
    try:
        yield at_work
        at_work.end()
        at_work.verify()
    finally:
        at_work.stop.set()
        for thread in at_work.threads:
            thread.join(60)
        for writer in at_work.writers:
            if writer.connection is not None:
                writer.connection.close()


COUNTING = """
    CREATE TABLE counted (n integer);
    INSERT INTO counted VALUES (0);
    CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE counted SET n = n + 1; RETURN NULL; END $$;
    CREATE TRIGGER counts AFTER UPDATE ON appointments FOR EACH STATEMENT EXECUTE FUNCTION count_it()
"""


@contextmanager
def counting_elsewhere(database: str, appointment: Any) -> Iterator[None]:
    """An application that holds `counted` and then asks for the appointment, again and again; raises the deadlock that it had."""
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        with psycopg.connect(database, options="-c deadlock_timeout=500ms") as application:
            while not ended.is_set():
                application.execute("UPDATE counted SET n = n + 1")
                begun.set()
                time.sleep(0.4)
                application.execute("UPDATE appointments SET notes = 'seen' WHERE id = %s", [appointment])
                application.commit()
                time.sleep(0.4)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            assert begun.wait(10)
            yield
        finally:
            ended.set()
        working.result()
