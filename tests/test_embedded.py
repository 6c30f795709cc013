"""The embedded server's promises, each tried with processes of its own, as root and as an ordinary user."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from runbook import embedded, postgres
from runbook.errors import BadInput, ServerUnavailable
from runbook.statements import statement

FORK = multiprocessing.get_context("fork")
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
statement("clinic.lock")  # read now: an ordinary user may not get to this folder


class Child:
    """A process of its own that calls `action` as the site's account; its process group is its own too."""

    def __init__(self, site: Site, action: Callable[[], Any], environment: dict[str, str]) -> None:
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.outcome, outcome = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._live, args=(site, action, environment, outcome))
        self.process.start()
        outcome.close()

    def _live(self, site: Site, action: Callable[[], Any], environment: dict[str, str], outcome: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, 0)
        os.dup2(self.stderr.fileno(), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update({"RUNBOOK_HOME": str(site.home)} | environment)
        if ROOT and site.uid != 0:
            sys.path.insert(0, str(site.packages))
            os.setgroups([])
            os.setgid(site.uid)
            os.setuid(site.uid)
        try:
            outcome.send((True, action()))
        except Exception as error:
            outcome.send((False, error))

    def result(self) -> Any:
        done, value = self.outcome.recv()
        self.process.join()
        if not done:
            raise value
        return value

    def said(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass(frozen=True)
class Site:
    """A RUNBOOK_HOME of its own, and the account that uses it."""

    home: Path
    uid: int
    packages: Path  # the binaries where an ordinary user gets to them
    children: list[Child] = field(default_factory=list)

    def child(self, action: Callable[[], Any], **environment: str) -> Child:
        self.children.append(Child(self, action, environment))
        return self.children[-1]

    def call(self, action: Callable[[], Any], **environment: str) -> Any:
        return self.child(action, **environment).result()

    def start(self, users: int | None = None) -> str:
        return str(self.call(lambda: embedded.start(users)))

    def stop(self) -> bool:
        return bool(self.call(embedded.stop))

    @property
    def data(self) -> Path:
        return (self.home / "place" if (self.home / "place").is_symlink() else self.home) / "data"

    def postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def starts(self) -> int:
        """How often the server has started, says its log."""
        return sum(log.read_text().count("ready to accept connections") for log in self.data.glob("log/*.log"))

    def write(self, name: str, text: str) -> None:
        """Write a file in the data folder, as the server's account."""
        (self.data / name).write_text(text)
        os.chown(self.data / name, self.data.stat().st_uid, self.data.stat().st_gid)


@contextmanager
def made(account: str, packages: Path, path: str = "a hôme") -> Iterator[Site]:
    """A site in a folder that any user may enter; nothing is left of it afterwards."""
    # Not tmp_path: pytest closes it to all but the user that runs the tests.
    folder = Path(tempfile.mkdtemp(prefix="runbook-embedded-", dir="/tmp"))
    folder.chmod(0o755)
    uid = os.geteuid() if account != "ordinary" or not ROOT else pwd.getpwnam("nobody").pw_uid
    os.chown(folder, uid, -1)
    site = Site(folder / path, uid, packages)
    try:
        yield site
    finally:
        for child in site.children:
            child.kill()
        with suppress(ServerUnavailable):
            site.stop()
        elsewhere = site.home / "place"
        if elsewhere.is_symlink():
            shutil.rmtree(elsewhere.readlink())
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    package = postgres.binaries("postgres").parents[2]
    if not ROOT:
        yield package.parent
        return
    with tempfile.TemporaryDirectory(prefix="runbook-embedded-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        for folder in (package, package.with_name(f"{package.name}.libs")):
            if folder.is_dir():
                shutil.copytree(folder, Path(name, folder.name), ignore=shutil.ignore_patterns("pginstall", "include"))
        yield Path(name)


@pytest.fixture(scope="module", params=["root", pytest.param("ordinary", marks=pytest.mark.long)] if ROOT else ["ordinary"])
def account(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def example(account: str, packages: Path) -> Iterator[Site]:
    """A server with a clinic of two users; a test leaves it with one."""
    with made(account, packages) as site:
        site.start(users=2)
        yield site


@pytest.fixture
def stopped(example: Site) -> Site:
    """The same server, not running."""
    example.stop()
    return example


def rows(conninfo: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        time.sleep(0.02)


def running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_one_call_brings_a_server_and_the_clinic_of_two(example: Site) -> None:
    clinic = example.start()
    assert rows(clinic, "SELECT current_setting('server_version_num')::int / 10000")[0] == (18,)
    assert rows(clinic, "SELECT role, count(*) FROM users GROUP BY role") == [("user", 2)]
    assert rows(clinic, "SELECT count(*), count(DISTINCT user_id) FROM appointments") == [(4, 2)]
    assert rows(clinic, "SELECT current_setting('fsync'), pg_encoding_to_char(6)") == [("on", "UTF8")]


def test_only_its_account_reaches_the_server(example: Site) -> None:
    clinic = example.start()
    folder = Path(conninfo_to_dict(clinic)["host"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == example.data.stat().st_uid
    assert example.data.stat().st_mode & 0o777 == 0o700
    assert rows(clinic, "SHOW listen_addresses") == [("",)]


def test_a_new_clinic_is_as_its_application_made_it(example: Site) -> None:
    clinic = example.start()
    assert rows(clinic, "SELECT column_default, is_nullable FROM information_schema.columns"
                " WHERE table_name = 'users' AND column_name = 'role'") == [("'user'::character varying", "YES")]  # fmt: skip
    assert rows(clinic, "SELECT indexname FROM pg_indexes WHERE tablename = 'users' ORDER BY 1") == [
        *(("users_created_at_idx",), ("users_email_key",), ("users_is_active_idx",), ("users_pkey",))
    ]
    with psycopg.connect(clinic) as connection:
        connection.execute("SET ROLE clinic_app")
        assert len(connection.execute("SELECT FROM active_users").fetchmany(3)) == 2
        kept = connection.execute("UPDATE users SET phone = NULL RETURNING updated_at = now()").fetchall()
        assert kept == [(True,), (True,)]
        connection.rollback()


@pytest.mark.parametrize(
    ("users", "roles"),
    [(0, []), (1, [("user", 1)]), (1000, [("admin", 1), ("doctor", 50), ("user", 949)])],
)
def test_a_clinic_of_any_size_has_its_roles(example: Site, users: int, roles: list[tuple[str, int]]) -> None:
    server = example.start()
    with psycopg.connect(server, dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE clinic_{users}")
    clinic = server.replace("dbname=clinic", f"dbname=clinic_{users}")
    embedded.load_clinic(clinic, users)
    assert rows(clinic, "SELECT role, count(*) FROM users GROUP BY role ORDER BY role") == roles
    assert rows(clinic, "SELECT count(*) FROM appointments") == [(2 * users,)]


def test_a_clinic_of_another_size_is_not_taken_for_the_one_asked_for(example: Site) -> None:
    with pytest.raises(BadInput, match="loaded with 2 users, not 3: add --reset"):
        example.start(users=3)
    with pytest.raises(BadInput, match="0 or more"):
        example.start(users=-1)
    assert rows(example.start(users=2), "SELECT count(*) FROM users") == [(2,)]


def test_reset_makes_the_clinic_anew_and_nothing_else(example: Site) -> None:
    server = example.start()
    with psycopg.connect(server, dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE neighbour")
    example.call(embedded.reset)
    assert rows(example.start(users=3), "SELECT count(*) FROM users") == [(3,)]
    assert rows(server, "SELECT count(*) FROM pg_database WHERE datname = 'neighbour'") == [(1,)]
    example.call(embedded.reset)
    assert rows(example.start(users=2), "SELECT count(*) FROM users") == [(2,)]


def test_reset_refuses_a_server_whose_data_are_not_ours(example: Site, account: str, packages: Path) -> None:
    theirs = Path(conninfo_to_dict(example.start())["host"])
    with made(account, packages) as ours:
        ours.call(lambda: (ours.home / "socket").mkdir(parents=True))
        # A second name of the other server's socket, where our own would be.
        os.link(theirs / postgres.SOCKET, ours.home / "socket" / postgres.SOCKET)
        with pytest.raises(ServerUnavailable, match=f"another one, whose data are in {example.data}"):
            ours.call(embedded.reset)
    assert rows(example.start(), "SELECT count(*) FROM users") == [(2,)]


@pytest.mark.long
def test_an_interrupted_load_is_done_again(example: Site) -> None:
    clinic = example.start()
    example.call(embedded.reset)
    loader = example.child(lambda: embedded.start(10_000_000))
    loading = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%INSERT INTO users%' AND pid <> pg_backend_pid()"
    until(lambda: bool(rows(clinic, loading)))
    loader.kill()
    assert rows(example.start(users=2), "SELECT count(*) FROM users") == [(2,)]


def test_a_killed_kernel_does_not_stop_the_server(stopped: Site) -> None:
    kernel = stopped.child(lambda: embedded.start() and time.sleep(60))
    until(lambda: (stopped.data / "postmaster.pid").exists())
    clinic = stopped.start()
    starts = stopped.starts()
    kernel.kill()
    assert stopped.start() == clinic
    assert stopped.starts() == starts
    assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]


def test_ctrl_c_in_a_shell_does_not_stop_the_server(stopped: Site) -> None:
    shell = stopped.child(lambda: (embedded.start(), print("up", file=sys.stderr), time.sleep(60)))
    until(lambda: "up" in shell.said())
    starts = stopped.starts()
    os.killpg(shell.process.pid, signal.SIGINT)
    shell.process.join()
    clinic = stopped.start()
    assert stopped.starts() == starts
    assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]


def test_processes_that_start_it_at_once_share_one_server(stopped: Site) -> None:
    earlier = stopped.starts()
    children = [stopped.child(embedded.start) for _ in range(4)]
    (clinic,) = {child.result() for child in children}
    assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]
    assert stopped.starts() == earlier + 1


@pytest.mark.long
def test_a_server_that_lost_its_socket_is_started_again(stopped: Site) -> None:
    """As when the folder was deleted and made anew while a server ran: that one takes the new one's socket along."""
    clinic = stopped.start()
    for each in Path(conninfo_to_dict(clinic)["host"]).glob(".s.PGSQL.*"):
        each.unlink()
    assert stopped.start() == clinic
    assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]


def test_stop_stops_it_and_its_sessions(stopped: Site) -> None:
    session = psycopg.connect(stopped.start())
    postmaster = stopped.postmaster()
    assert stopped.stop()
    until(lambda: not running(postmaster))
    with pytest.raises(psycopg.OperationalError):
        session.execute("SELECT 1")
    session.close()
    assert not stopped.stop()


def test_stop_makes_nothing_where_there_is_nothing(account: str, packages: Path) -> None:
    with made(account, packages) as empty:
        assert not empty.stop()
        assert not empty.home.exists()


@pytest.mark.long
def test_a_stranger_with_the_servers_old_process_id_is_not_the_server(stopped: Site) -> None:
    stopped.start()
    postmaster = stopped.postmaster()
    os.kill(postmaster, signal.SIGKILL)
    until(lambda: not running(postmaster))
    owner = stopped.data.stat()
    as_server = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if ROOT else {}
    stranger: Any = subprocess.Popen(["sleep", "60"], **as_server)  # the very account that PostgreSQL would trust
    try:
        lines = (stopped.data / "postmaster.pid").read_text().splitlines(keepends=True)
        (stopped.data / "postmaster.pid").write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        until(lambda: not stopped.stop())  # the killed server's backends may live a moment longer
        assert rows(stopped.start(), "SELECT count(*) FROM users") == [(2,)]
        assert stopped.stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.long
def test_a_recovery_is_waited_for_and_said(stopped: Site, account: str) -> None:
    go = stopped.home.parent / "go"
    stopped.write("recovery.signal", "")
    hold = f'while ! test -e "{go}"; do sleep 0.1; done; false'
    stopped.write("postgresql.auto.conf", f"restore_command = '{hold}'\nhot_standby = off\n")
    starting = stopped.child(embedded.start)
    # Once longer than the ten seconds after which others give up.
    seconds = r"1\d" if account == "ordinary" else r"\d"
    until(lambda: re.search(f"Waiting for the embedded server, {seconds} s", starting.said()) is not None)
    assert "LOG:" in starting.said()  # the server's own words
    go.touch()
    assert rows(starting.result(), "SELECT count(*) FROM users") == [(2,)]


def test_a_server_that_cannot_start_says_why(stopped: Site) -> None:
    stopped.write("postgresql.auto.conf", "shared_bufers = '1GB'\n")
    with pytest.raises(ServerUnavailable, match=r'log ends: .*parameter "shared_bufers"'):
        stopped.start()
    stopped.write("postgresql.auto.conf", "")
    assert rows(stopped.start(), "SELECT count(*) FROM users") == [(2,)]


def test_variables_of_libpq_lead_nowhere_else(stopped: Site) -> None:
    swaying = {
        "PGHOSTADDR": "127.0.0.1",
        "PGHOST": "localhost",
        "PGPORT": "1",
        "PGUSER": "nobody",
        "PGDATABASE": "elsewhere",
        "PGDATA": "/nowhere",
        "PGSERVICE": "nowhere",
        "PGOPTIONS": "-c nonsense=1",
        "PGREQUIREAUTH": "scram-sha-256",
    }
    clinic, kept = stopped.call(lambda: (embedded.start(), {name: os.environ[name] for name in swaying}), **swaying)
    assert kept == swaying
    assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]
    reached = stopped.call(lambda: rows(clinic, "SHOW port"), PGHOSTADDR="127.0.0.1", PGHOST="localhost")
    assert reached == [("5432",)]
    assert not any(name.startswith("PG") for name in stopped.call(postgres.environment, **swaying))


@pytest.mark.long
def test_a_home_too_deep_for_a_socket_has_it_elsewhere(account: str, packages: Path) -> None:
    with made(account, packages, "a path with 'quotes', a comma and é" * 4) as deep:
        clinic = deep.start(users=2)
        folder = Path(conninfo_to_dict(clinic)["host"])
        try:
            assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]
            assert folder.parent == Path("/tmp")
            assert folder.stat().st_mode & 0o777 == 0o700
            assert folder.stat().st_uid == deep.data.stat().st_uid
            assert deep.start() == clinic
            deep.stop()
            folder.rmdir()
            folder.symlink_to(deep.home)  # somebody else's trap
            with pytest.raises(ServerUnavailable, match=f"{folder} is not a folder of its account"):
                deep.start()
        finally:
            folder.unlink(missing_ok=True) if folder.is_symlink() else shutil.rmtree(folder)


def test_an_absent_program_is_named() -> None:
    with pytest.raises(ServerUnavailable, match="brings no pg_nothing of PostgreSQL 18"):
        postgres.binaries("pg_nothing")


@needs_root
def test_root_opens_no_folder_to_the_servers_account(packages: Path) -> None:
    with made("root", packages, "closed/home") as closed:
        parent = closed.home.parent
        parent.mkdir(mode=0o700)
        mask = os.umask(0o077)
        try:
            clinic = closed.start(users=2)
        finally:
            os.umask(mask)
        assert rows(clinic, "SELECT count(*) FROM users") == [(2,)]
        assert parent.stat().st_mode & 0o777 == 0o700
        assert (closed.home / "place").readlink().parent == Path("/var/lib")
        assert closed.data.stat().st_uid != 0
        assert Path(f"/proc/{closed.postmaster()}").stat().st_uid == closed.data.stat().st_uid
        assert closed.start() == clinic
        assert closed.stop()


@needs_root
def test_root_does_not_use_another_accounts_home(packages: Path) -> None:
    with made("root", packages) as theirs:
        theirs.home.mkdir()
        os.chown(theirs.home, pwd.getpwnam("nobody").pw_uid, -1)
        with pytest.raises(ServerUnavailable, match=r"belongs to another account.*RUNBOOK_HOME"):
            theirs.start()
        assert list(theirs.home.iterdir()) == []
