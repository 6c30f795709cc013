"""How a database is reached: one connection path, shared by psycopg and SQLAlchemy, that knows no password."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool
from tqdm import tqdm

from runbook import embedded
from runbook.errors import BadInput, ServerUnavailable
from runbook.redaction import known_secrets, redact
from runbook.statements import Value, statement
from runbook.words import ended

OLDEST, NEWEST = 14, 18
REST_S = 1.0  # so long a connection waits for the next session: a cell opens several, one after the other
RESTING = 2  # at most


@dataclass(frozen=True)
class Statement:
    """One statement as it ran; part of the record. `error` is its SQLSTATE where it failed, else empty; `waited_for` has the
    locks that it was seen to wait for, with those who held them."""

    at: datetime
    name: str
    seconds: float
    rows: int
    error: str = ""
    waited_for: tuple[str, ...] = ()


def write_down(statements: Sequence[Statement]) -> None:
    """Adds them to the record of the notebook that this kernel runs, if it runs one: what failed later is there, too."""
    folder, notebook = os.environ.get("RUNBOOK_RECORD"), os.environ.get("JPY_SESSION_NAME")
    if folder and notebook:
        facts = [{**vars(each), "at": each.at.isoformat(), "seconds": round(each.seconds, 6)} for each in statements]
        lines = "".join(redact(json.dumps(each, ensure_ascii=False), _secrets()) + "\n" for each in facts)
        with suppress(OSError), Path(folder, f"{Path(notebook).stem}.statements.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)


@cache
def _secrets() -> frozenset[str]:
    return frozenset(known_secrets())


@dataclass
class Database:
    """A target database. `statements` records whatever ran through it; `waits` has, for each of its sessions' pids, what the
    present statement was seen to wait for."""

    name: str
    conninfo: str
    embedded: bool = False
    statements: list[Statement] = field(default_factory=list)
    waits: dict[int, dict[int, str]] = field(default_factory=dict)
    _resting: list[tuple[psycopg.Connection[dict[str, Any]], threading.Timer]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _gate: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def connect(self, purpose: str = "") -> psycopg.Connection[dict[str, Any]]:
        """A new connection in autocommit mode; raises ServerUnavailable with the server's own reason."""
        options = {"application_name": f"runbook {purpose}".strip(), "connect_timeout": "15", "client_encoding": "UTF8"}
        try:
            with embedded.without_libpq_variables() if self.embedded else nullcontext():
                connection = psycopg.connect(
                    make_conninfo(self.conninfo, **options),
                    autocommit=True,
                    row_factory=dict_row,
                    prepare_threshold=sys.maxsize,  # only what asks for it
                )
        except psycopg.OperationalError as error:
            reason = " ".join(str(error).split())
            raise ServerUnavailable(
                f"{self.name} cannot be reached: {ended(reason)} Mend that, or correct database; then run this again."
            ) from None
        connection.add_notice_handler(_pass_on)
        _settle_in(connection)
        return connection

    @cached_property
    def engine(self) -> Engine:
        """SQLAlchemy's engine over the same connections."""
        return create_engine(
            "postgresql+psycopg://",
            creator=self._plain,
            poolclass=NullPool,
            execution_options={"no_parameters": True},
        )

    def _plain(self) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] = self.connect("reader")
        connection.row_factory = psycopg.rows.tuple_row
        return connection

    def frame(self, query: str | sql.Composed, /, **names: Value) -> pd.DataFrame:
        """The rows of a named statement as a DataFrame."""
        composed = statement(query, **names) if isinstance(query, str) else query
        label = query if isinstance(query, str) else _first_line(composed.as_string(None))
        with self.engine.connect() as connection, noted(self.statements, label) as rows:
            frame = pd.read_sql(composed.as_string(connection.connection.driver_connection), connection)
            rows.append(len(frame))
        return frame

    @contextmanager
    def session(self, purpose: str = "") -> Iterator[Session]:
        """A connection with nothing left of whoever had it before; KeyboardInterrupt cancels its running statement.

        One that ended well rests for `REST_S`: the next session takes it up, and what the server knows of the catalog with it.
        """
        connection = self._rested(purpose) or self.connect(purpose)
        session = Session(connection, self.statements)
        self.waits[session.pid] = session.waits
        try:
            yield session
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                connection.cancel_safe(timeout=5)
            connection.close()
            raise
        finally:
            self.waits.pop(session.pid, None)
        self._rest(connection)

    def _rest(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        """Keep it for the next session, without its locks, its settings and what it had of temporary things; or close it."""
        with suppress(psycopg.Error):
            connection.execute("RESET ALL; DISCARD TEMP; SELECT pg_advisory_unlock_all()")
            connection.isolation_level = None
            with self._gate:
                if len(self._resting) < RESTING:
                    closing = threading.Timer(REST_S, self._end_rest, [connection])
                    closing.daemon = True
                    closing.start()
                    self._resting.append((connection, closing))
                    return
        connection.close()

    def _rested(self, purpose: str) -> psycopg.Connection[dict[str, Any]] | None:
        while True:
            with self._gate:
                if not self._resting:
                    return None
                connection, closing = self._resting.pop()
            closing.cancel()
            try:
                name = sql.Literal(f"runbook {purpose}".strip())
                connection.execute(sql.SQL("SET application_name = {}").format(name))
                _settle_in(connection)
                return connection
            except psycopg.Error:  # ended meanwhile, by the server or by somebody
                connection.close()

    def _end_rest(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        with self._gate:
            ended = [each for each in self._resting if each[0] is connection]
            self._resting[:] = [each for each in self._resting if each[0] is not connection]
        for each, _ in ended:
            each.close()


@dataclass
class Session:
    """One connection that runs named statements and keeps a record of each."""

    connection: psycopg.Connection[dict[str, Any]]
    statements: list[Statement]
    locked_s: float = 0.0  # for how long, in all, it kept everybody else from what it locked
    waits: dict[int, str] = field(default_factory=dict)  # the locks that the present statement waits for, by who holds them

    @cached_property
    def pid(self) -> int:
        """The server's process; asked for, because whatever stands in between may give the connection a number of its own."""
        return _pid(self.connection)

    @property
    def alone(self) -> bool:
        """Whether nobody but the runbook is at work on the server. If somebody is, one process of ours is enough: with a second
        one on two processors the slowest hundredth of the application's writes took twice as long."""
        return _alone(self.connection)

    def run(self, query: str | sql.Composed, prepare: bool = False, /, **names: Value) -> psycopg.Cursor[dict[str, Any]]:
        """Run `group.name`, or a composed statement; the cursor has its rows. `prepare` keeps its plan for the next time."""
        composed = statement(query, **names) if isinstance(query, str) else query
        label = query if isinstance(query, str) else _first_line(composed.as_string(None))
        with noted(self.statements, label, self.waits) as rows:
            cursor = self.connection.execute(composed, prepare=prepare)
            rows.append(cursor.rowcount)
        return cursor

    def at_once(self, statements: Iterable[sql.Composable]) -> None:
        """Run them in one round trip: under locks everybody would wait for each one's way. Each is in the record, with its time by
        the server's clock; when one fails, all of them as one."""
        texts, began = [each.as_string(None) for each in statements], datetime.now(UTC)
        clock = "SELECT clock_timestamp() AS runbook_clock"
        label = f"{len(texts)} statements in one round trip, the first: {_first_line(texts[0])}"
        with noted(self.statements, label, self.waits, parts := list[Statement]()):
            cursor = self.connection.execute(sql.SQL("\n;\n".join([clock, *(f"{each}\n;\n{clock}" for each in texts)])))
            times, rows = [], list[int]()
            while True:
                if cursor.description and cursor.description[0].name == "runbook_clock":
                    times.append((cursor.fetchone() or {})["runbook_clock"])
                    rows.append(-1)
                else:
                    rows[-1] = cursor.rowcount
                if not cursor.nextset():
                    break
            for text, number, start, end in zip(texts, rows, times, times[1:], strict=False):
                parts.append(Statement(began + (start - times[0]), _first_line(text), (end - start).total_seconds(), number))

    def rows(self, query: str | sql.Composed, /, **names: Value) -> list[dict[str, Any]]:
        """All rows."""
        return self.run(query, **names).fetchall()

    def row(self, query: str | sql.Composed, /, **names: Value) -> dict[str, Any]:
        """The only row; KeyError-free code may rely on its being there."""
        found = self.run(query, **names).fetchone()
        if found is None:
            raise LookupError(f"{query!r} found no row")
        return found

    def value(self, query: str | sql.Composed, prepare: bool = False, /, **names: Value) -> Any:
        """The first column of the first row, None where there is none."""
        found = self.run(query, prepare, **names).fetchone()
        return next(iter(found.values())) if found else None

    @contextmanager
    def qualified(self) -> Iterator[None]:
        """While it lasts, every name that the server renders is qualified, and every time is in UTC, wherever the operator
        sits. An error leaves that to the rollback."""
        setting = "SELECT set_config('search_path', %s, false), set_config('TimeZone', %s, false)"
        asked = "SELECT current_setting('search_path') AS path, current_setting('TimeZone') AS zone"
        before = self.connection.execute(asked).fetchone() or {}
        self.connection.execute(setting, ["pg_catalog", "UTC"])
        yield
        self.connection.execute(setting, [before["path"], before["zone"]])

    @contextmanager
    def transaction(self, isolation: str = "READ COMMITTED", **settings: str | int) -> Iterator[None]:
        """A transaction whose isolation never depends on an inherited default; settings are SET LOCAL."""
        self.connection.isolation_level = psycopg.IsolationLevel[isolation.replace(" ", "_")]
        with self.connection.transaction():
            for name, setting in settings.items():
                self.connection.execute(
                    sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(*name.split("__")), sql.Literal(str(setting)))
                )
            yield
        if self.connection.closed:  # psycopg leaves the block as if all were well when the connection broke after the last answer
            raise psycopg.OperationalError("The connection was lost before the commit was acknowledged.")


def _settle_in(connection: psycopg.Connection[dict[str, Any]]) -> None:
    """Our settings, whatever the role's are.

    client_connection_check_interval: without it the backend of a killed client keeps its locks until its statement ends.
    row_security off: an error is better than a silently filtered copy.
    """
    connection.execute(
        "SET client_connection_check_interval = '1s'; SET row_security = off; SET statement_timeout = 0; SET lock_timeout = '30s';"
        " SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; SET extra_float_digits = 1; SET DateStyle = ISO;"
        " SET IntervalStyle = iso_8601; SET bytea_output = hex; SET default_transaction_read_only = off; SET default_tablespace = '';"
        " SET default_table_access_method = heap; SET default_transaction_isolation = 'read committed'"
    )
    if connection.info.server_version >= 170000:
        connection.execute("SET transaction_timeout = 0")
    if not _alone(connection):
        connection.execute(statement("pace.one_process"))


def _alone(connection: psycopg.Connection[dict[str, Any]]) -> bool:
    found = connection.execute(statement("pace.alone")).fetchone()  # not for the record: it is asked all the time
    return bool(found and found["alone"])


def _pass_on(said: psycopg.errors.Diagnostic) -> None:
    """A warning of the server's own (a table that VACUUM skipped) is seen, and is in the record; its notices are not, nor what
    a function of somebody's says, which may be somebody's data."""
    if said.severity_nonlocalized == "WARNING" and not said.context:
        tqdm.write(f"the server warns: {said.message_primary}", file=sys.stdout)


@contextmanager
def noted(
    statements: list[Statement], name: str, waits: dict[int, str] | None = None, parts: Sequence[Statement] = ()
) -> Iterator[list[int]]:
    """Notes the statement that runs inside, also when it fails; whoever runs it appends its number of rows. When it was several
    that went well, its `parts`."""
    at, started, rows, error = datetime.now(UTC), time.perf_counter(), list[int](), ""
    try:
        yield rows
    except BaseException as failed:
        error = getattr(failed, "sqlstate", None) or type(failed).__name__
        raise
    finally:
        seconds, waited = time.perf_counter() - started, tuple((waits or {}).values())
        whole = Statement(at, name, seconds, rows[0] if rows else -1, error, waited)
        new = list(parts) if parts and not error else [whole]
        statements.extend(new)
        if waits:
            waits.clear()
        write_down(new)


def target(database: str, users: int | None = None) -> Database:
    """The database that a parameter names: "embedded", a URL without a password, "service=…", or "environment".

    Raises BadInput for a password in the text, for a pool of transactions and for versions outside 14 to 18,
    ServerUnavailable when nothing answers.
    """
    if database == "embedded":
        return Database("embedded", embedded.start(users), embedded=True)
    try:
        parts = {} if database == "environment" else conninfo_to_dict(database)
        if not parts and database != "environment":  # empty, as of a variable that is not set: libpq would take any server
            raise psycopg.ProgrammingError
    except psycopg.ProgrammingError:  # its text may repeat a password
        raise BadInput(
            'database cannot be read: give "embedded", "environment" (PG* variables), postgresql://user@host/db or service=name.'
        ) from None
    if any("password" in name for name in parts):
        raise BadInput(
            "database holds a password, and it would be stored in the record: take it out and put it into PGPASSWORD,"
            " PGPASSFILE or the service file."
        )
    found = Database("environment" if database == "environment" else database, make_conninfo("", **parts))
    with found.connect("version") as connection:
        version = connection.info.server_version // 10000
        if _pid(connection) != connection.info.backend_pid:
            _refuse_shared_sessions(found, connection)
    if not OLDEST <= version <= NEWEST:
        raise BadInput(
            f"{found.name} runs PostgreSQL {version}: the runbook is tested on {OLDEST} to {NEWEST}, use one of these."
        )
    return found


def _pid(connection: psycopg.Connection[dict[str, Any]]) -> int:
    row = connection.execute("SELECT pg_backend_pid() AS pid").fetchone() or {}
    return int(row["pid"])


def _refuse_shared_sessions(database: Database, connection: psycopg.Connection[dict[str, Any]]) -> None:
    """Something stands between us and the server: raises BadInput when a session is ours for a transaction only, and with it
    its settings and the lock by which a second run is refused."""
    with database.connect("version") as other:
        seen = [(_pid(each), each is other) for each in (connection, other) * 3]
    if len(set(seen)) > 2 or len({pid for pid, _ in seen}) < 2:
        raise BadInput(
            f"{database.name} is a connection pool that gives a session away after each transaction, with our settings and locks:"
            " name the server itself, or a pool that works by session (PgBouncer's pool_mode = session)."
        )


def _first_line(text: str) -> str:
    """A statement as the record names it: without the comments over it, in one line."""
    line = " ".join(" ".join(line for line in text.splitlines() if not line.startswith("--")).split())
    return line if len(line) <= 120 else f"{line[:119]}…"
