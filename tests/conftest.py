"""Fixtures: one server a session and version, a fresh database a test, nothing of the user's own touched."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql as composed
from psycopg.conninfo import conninfo_to_dict

from runbook import embedded, imports, ledger
from runbook.database import target
from tests import migration, servers, walk

NEEDED = {"node": "npm", "browser": "chromium", "pooler": "pgbouncer"}  # mark: the program without which a test is skipped
VERSION_LIMIT = re.compile(r"(Skipped: )?PostgreSQL \d+ ")  # the only reason for a skip that CI accepts
numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pg", default="18", help="versions of PostgreSQL to test with, for example 14,15,18")
    parser.addoption("--pictures", type=Path, help="where the browser's tests put the README's pictures: notebooks/pictures")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with Ctrl-C ignored, and the tests' own processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    imports.keep()
    isolation = ExitStack()
    isolation.enter_context(servers.own_home())
    config.add_cleanup(isolation.close)


def versions(config: pytest.Config) -> list[int]:
    known = {str(version): version for version in servers.RELEASES}
    chosen = config.getoption("--pg").split(",")
    if unknown := ", ".join(version for version in chosen if version not in known):
        raise pytest.UsageError(f"--pg {unknown}: the versions known here are {', '.join(known)}.")
    return [known[version] for version in chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        chosen = versions(metafunc.config)
        metafunc.parametrize("server", chosen, indirect=True, scope="session", ids=[f"pg{v}" for v in chosen])


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark, program in NEEDED.items():
        if item.get_closest_marker(mark) and shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")


def pytest_xdist_auto_num_workers() -> int:
    """Three at least: many tests only wait, for a lock, a limit or a server."""
    return max(3, os.cpu_count() or 1)


def refused_skips(config: pytest.Config) -> list[str]:
    """In CI, the skips that hide something: all but those for what a version of PostgreSQL cannot do."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return []
    reasons = {report.nodeid: str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])}
    return [f"{test}: {reason}" for test, reason in reasons.items() if not VERSION_LIMIT.match(reason)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if refused_skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for skip in refused_skips(config):
        terminalreporter.write_line(f"ERROR a skip is an error in CI: {skip}", red=True)


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest) -> Path | None:
    """Where pictures for the README go; None for none."""
    folder: Path | None = request.config.getoption("--pictures")
    return folder


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """The session's server of one version; whoever stops it must start it again."""
    with servers.start(request.param) as running:
        yield running


@pytest.fixture(scope="session")
def clinic_template(server: servers.Server) -> str:
    """A database with the clinic of 1,000 users, to which nobody connects any more."""
    execute(server, "CREATE DATABASE clinic_template")
    embedded.load_clinic(server.conninfo("clinic_template"), users=1000)
    execute(server, "ALTER DATABASE clinic_template ALLOW_CONNECTIONS false")
    return "clinic_template"


@pytest.fixture
def database(server: servers.Server) -> Iterator[str]:
    """The URL of a fresh, empty database."""
    yield from fresh(server, "template1")


@pytest.fixture
def clinic(server: servers.Server, clinic_template: str) -> Iterator[str]:
    """The URL of a fresh database with the clinic of 1,000 users."""
    yield from fresh(server, clinic_template)


class Stages:
    """Databases to copy: clinics on which something was done, each made once, from the one that had come nearest to it."""

    def __init__(self, server: servers.Server, clinic: str) -> None:
        self.server = server
        self.made: dict[tuple[str, ...], str] = {(): clinic}

    def template(self, done: dict[str, Callable[[str], Any]]) -> str:
        """The name of the database at whose URL all this was done."""
        names = tuple(done)
        if names not in self.made:
            nearest = max((each for each in self.made if each == names[: len(each)]), key=len)
            copied, database = self.made[nearest], f"stage_{len(self.made)}"
            copy(self.server, copied, database)
            for name in names[len(nearest) :]:
                done[name](self.server.url(database))
            self.made[names] = database
        return self.made[names]


@pytest.fixture(scope="session")
def stages(server: servers.Server, clinic_template: str) -> Stages:
    return Stages(server, clinic_template)


@pytest.fixture
def bring(server: servers.Server, stages: Stages, clinic: str) -> Callable[[dict[str, Callable[[str], Any]]], None]:
    """Replaces the test's clinic by a copy of one on which all this was done."""

    def replace(done: dict[str, Callable[[str], Any]]) -> None:
        template, database = stages.template(done), str(conninfo_to_dict(clinic)["dbname"])
        drop(server, database)
        copy(server, template, database)

    return replace


@pytest.fixture
def forward(bring: Callable[..., None], clinic: str) -> Callable[..., ledger.Run]:
    """As `migration.forward` of the test's clinic, also as far as `plan` and on the way back, but by a copy: for a test whose
    subject is what comes after."""

    def opened(last: str = "cutover check", **given: Any) -> ledger.Run:
        steps = {**migration.FORWARD, **migration.BACK}

        def act(url: str, name: str) -> None:
            migration.walk(ledger.of(target(url), "users"), {name: steps[name]})

        done: dict[str, Callable[[str], Any]] = {f"plan {given}": lambda url: migration.plan(url, **given)}
        names = list(steps)[: list(steps).index(last) + 1] if last != "plan" else []
        bring(done | {name: partial(act, name=name) for name in names})
        return ledger.of(target(clinic), "users")

    return opened


@pytest.fixture
def walked(bring: Callable[..., None], clinic: str) -> Callable[..., None]:
    """As `walk` of these notebooks on the test's clinic, by a copy: for a test whose subject is what comes after."""
    return lambda *names: bring({name: partial(lambda url, name: walk.walk(url, name), name=name) for name in names})


@pytest.fixture
def sql(request: pytest.FixtureRequest, server: servers.Server) -> Callable[..., list[tuple[Any, ...]]]:
    """Runs one query in the test's `clinic`, or else its `database`; commits; returns the rows."""
    url = request.getfixturevalue("clinic" if "clinic" in request.fixturenames else "database")

    def run(query: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        # A connection a query: a test may stop the server in between.
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    return run


def execute(server: servers.Server, statement: LiteralString | composed.Composed) -> None:
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(statement)


def copy(server: servers.Server, template: str, database: str) -> None:
    """A copy of a database with which nobody works any more; connections that rest there would hinder it."""
    resting = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {} AND application_name LIKE 'runbook%'"
    execute(server, composed.SQL(resting).format(composed.Literal(template)))
    names = {"name": composed.Identifier(database), "template": composed.Identifier(template)}
    execute(server, composed.SQL("CREATE DATABASE {name} TEMPLATE {template}").format(**names))


def drop(server: servers.Server, database: str) -> None:
    execute(server, composed.SQL("DROP DATABASE {} WITH (FORCE)").format(composed.Identifier(database)))


def fresh(server: servers.Server, template: str) -> Iterator[str]:
    name = f"test_{next(numbers)}"
    copy(server, template, name)
    yield server.url(name)
    drop(server, name)
