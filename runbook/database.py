"""How a database is reached: one connection path, shared by psycopg and SQLAlchemy, that knows no password."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from tqdm import tqdm

from runbook import embedded, postgres
from runbook.errors import BadInput, ServerUnavailable
from runbook.session import Connection, Session, Statement, first_line, noted
from runbook.statements import Value, sent, spelled, statement
from runbook.words import ended

OLDEST, NEWEST = 14, 18
REST_S = 1.0  # so long a connection waits for the next session: a cell opens several, one after the other
RESTING = 2  # at most


@dataclass
class Database:
    """A target database. `statements` records whatever ran through it; `waits` has, for each of its sessions' pids, what the
    present statement was seen to wait for."""

    name: str
    conninfo: str
    embedded: bool = False
    statements: list[Statement] = field(default_factory=list)
    waits: dict[int, dict[int, str]] = field(default_factory=dict)
    _resting: list[tuple[Connection, threading.Timer]] = field(default_factory=list, init=False, repr=False, compare=False)
    _gate: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def connect(self, purpose: str = "") -> Connection:
        """A new connection in autocommit mode; raises ServerUnavailable with the server's own reason."""
        options = {"application_name": f"runbook {purpose}".strip(), "connect_timeout": "15", "client_encoding": "UTF8"}
        try:
            with postgres.without_libpq_variables() if self.embedded else nullcontext():
                connection = Connection.connect(
                    make_conninfo(self.conninfo, **options), autocommit=True, row_factory=dict_row, prepare_threshold=None
                )
        except psycopg.OperationalError as error:
            reason = "; ".join(" ".join(line.split()) for line in str(error).splitlines() if line.strip())
            raise ServerUnavailable(
                f"{self.name} cannot be reached: {ended(reason)} Mend that, or correct database; then run this again."
            ) from None
        connection.add_notice_handler(_pass_on)
        try:
            _settle_in(connection, purpose)
        except psycopg.errors.InsufficientPrivilege as error:
            who = connection.info.user
            connection.close()
            raise BadInput(
                f"{who} works with another session_replication_role than origin on {self.name}, so that foreign keys and triggers are passed over, and may not set it"
                f" back ({error.diag.message_primary}): as a superuser ALTER ROLE {spelled((who,))} SET session_replication_role = origin; then run this again."
            ) from None
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
        connection.execute("SET TimeZone = 'UTC'")  # what is read to be shown
        return connection

    def frame(self, query: str | sql.Composed, /, **names: Value) -> pd.DataFrame:
        """The rows of a named statement as a DataFrame."""
        composed = statement(query, **names) if isinstance(query, str) else query
        label = query if isinstance(query, str) else first_line(composed.as_string(None))
        try:
            with self.engine.connect() as connection, noted(self.statements, label) as rows:
                frame = pd.read_sql(sent(composed.as_string(connection.connection.driver_connection)).as_string(None), connection)
                rows.append(len(frame))
        except (SQLAlchemyError, pd.errors.DatabaseError) as error:  # of which the latter is an OSError, as of a full disk
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, psycopg.Error):
                cause = getattr(cause, "orig", None) or cause.__cause__
            raise (cause or psycopg.OperationalError("the connection was lost")) from None
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
        if session.gave_way:
            connection.close()
        else:
            self._rest(connection)

    def _rest(self, connection: Connection) -> None:
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

    def _rested(self, purpose: str) -> Connection | None:
        while True:
            with self._gate:
                if not self._resting:
                    return None
                connection, closing = self._resting.pop()
            closing.cancel()
            try:
                _settle_in(connection, purpose)
                return connection
            except psycopg.Error:  # ended meanwhile, by the server or by somebody
                connection.close()

    def _end_rest(self, connection: Connection) -> None:
        with self._gate:
            ended = [each for each in self._resting if each[0] is connection]
            self._resting[:] = [each for each in self._resting if each[0] is not connection]
        for each, _ in ended:
            each.close()


def _settle_in(connection: Connection, purpose: str) -> None:
    """Our settings, whatever the role's are, in one round trip.

    client_connection_check_interval: without it the backend of a killed client keeps its locks until its statement ends.
    row_security off: an error is better than a silently filtered copy. An interval stays text: a month is no timedelta.
    """
    connection.adapters.register_loader("interval", TextLoader)
    settings = (
        "SET application_name = {}; SET client_connection_check_interval = '1s'; SET row_security = off; SET statement_timeout = 0; SET lock_timeout = '30s';"
        " SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; SET extra_float_digits = 1; SET DateStyle = ISO;"
        " SET IntervalStyle = iso_8601; SET bytea_output = hex; SET default_transaction_read_only = off; SET default_tablespace = '';"
        " SET default_table_access_method = heap; SET default_transaction_isolation = 'read committed';"
        " SET standard_conforming_strings = on; SET quote_all_identifiers = off; SET transform_null_equals = off; SET array_nulls = on;"
        " SET xmloption = content; " + ("SET transaction_timeout = 0; " if connection.info.server_version >= 170000 else "")
    )
    name, settled = sql.Literal(f"runbook {purpose}".strip()), statement("pace.settle", alone=statement("pace.alone"))
    cursor = connection.execute(sql.SQL(settings).format(name) + settled)
    while cursor.nextset():
        pass
    connection.pid = (cursor.fetchone() or {})["pid"]


def _pass_on(said: psycopg.errors.Diagnostic) -> None:
    """A warning of the server's own (a table that VACUUM skipped) is seen, and is in the record; its notices are not, nor what
    a function of somebody's says, which may be somebody's data."""
    if said.severity_nonlocalized == "WARNING" and not said.context:
        tqdm.write(f"the server warns: {said.message_primary}", file=sys.stdout)


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
        if connection.pid != connection.info.backend_pid:
            _refuse_shared_sessions(found, connection)
    if not OLDEST <= version <= NEWEST:
        raise BadInput(
            f"{found.name} runs PostgreSQL {version}: the runbook is tested on {OLDEST} to {NEWEST}, use one of these."
        )
    return found


def _refuse_shared_sessions(database: Database, connection: Connection) -> None:
    """Something stands between us and the server: raises BadInput when a session is ours for a transaction only, and with it
    its settings and the lock by which a second run is refused."""
    with database.connect("version") as other:
        asked = [(each.execute("SELECT pg_backend_pid() AS pid").fetchone(), each is other) for each in (connection, other) * 3]
        seen = [((row or {})["pid"], which) for row, which in asked]
    if len(set(seen)) > 2 or len({pid for pid, _ in seen}) < 2:
        raise BadInput(
            f"{database.name} is a connection pool that gives a session away after each transaction, with our settings and locks:"
            " name the server itself, or a pool that works by session (PgBouncer's pool_mode = session)."
        )
