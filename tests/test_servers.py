"""What the tests themselves rest on: servers that start, crash, vanish, and skips that do not hide."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests import servers

ROOT = Path(__file__).parent.parent


def test_the_server_is_of_the_version_asked_for(server, database, sql):
    assert int(sql("SHOW server_version_num")[0][0]) // 10000 == server.version
    assert sql("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]


def test_the_clinic_has_a_thousand_users(clinic, sql):
    assert sql("SELECT count(*) FROM users") == [(1000,)]


def test_the_offline_script_still_fits_the_clinic(server, clinic, sql):
    before = sql("SELECT role, count(*) FROM users GROUP BY role ORDER BY role")
    script = [server.bin("psql"), "-Xq1d", clinic, "-v", "ON_ERROR_STOP=1", "-f", ROOT / "tests" / "offline.sql"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sql("SELECT role, count(*) FROM users GROUP BY role ORDER BY role") == before
    assert sql("SELECT count(*) FROM users_patients") == [(949,)]
    assert sql("SELECT count(*) FROM users_backup") == [(1000,)]
    assert sql("SELECT count(*) FROM appointments JOIN users ON (users.id, role) = (user_id, user_role)") == [(2000,)]


def test_libpq_variables_and_the_users_home_are_out_of_reach():
    assert not [name for name in os.environ if name.startswith("PG")]
    assert os.environ["RUNBOOK_HOME"].startswith("/tmp/runbook-home-")


def test_what_was_committed_survives_an_immediate_stop(server):
    with servers.start(server.version, settings={"max_connections": "20"}) as other:
        with psycopg.connect(other.conninfo(), autocommit=True) as connection:
            assert connection.execute("SHOW max_connections").fetchone() == ("20",)
            connection.execute("CREATE TABLE kept AS SELECT 1 AS row")
            other.stop("immediate")
        other.start()
        with psycopg.connect(other.conninfo("postgres")) as connection:
            assert connection.execute("SELECT * FROM kept").fetchall() == [(1,)]


@pytest.mark.long
def test_a_failing_test_leaves_no_server(server):
    with pytest.raises(ZeroDivisionError), servers.start(server.version) as other:
        1 / 0  # noqa: B018
    assert other.process.poll() is not None
    assert not other.data.exists() and not other.sockets.exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_killed_test_process_leaves_no_server():
    script = (
        "import os, signal\nfrom tests import servers\n"
        "with servers.start(18) as server:\n"
        "    print(server.process.pid, server.sockets, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid, folder = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL
    for _ in range(500):
        if not Path("/proc", pid).exists():
            break
        time.sleep(0.02)
    assert not Path("/proc", pid).exists()
    assert "database system is shut down" in Path(folder, "log").read_text()
    shutil.rmtree(folder)


@pytest.mark.node
def test_a_server_with_tls_proves_who_it_is():
    with servers.start(18, ssl=True) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE ROLE visitor LOGIN PASSWORD 'secret'")
            connection.execute("CREATE EXTENSION pg_stat_statements")
        verified = make_conninfo(host="localhost", port=server.port, dbname="postgres", user="visitor", sslmode="verify-full")
        with psycopg.connect(verified, sslrootcert=str(server.certificate), password="secret") as connection:
            assert connection.pgconn.ssl_in_use
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(verified, sslrootcert=str(server.certificate), password="wrong")


@pytest.mark.long
@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [("no time", "true", 1), ("PostgreSQL 14 has no MERGE", "true", 0), ("no time", "", 0)],
)
def test_a_skip_is_an_error_in_ci(tmp_path, reason, ci, code):
    (tmp_path / "test_skipped.py").write_text(
        f"import pytest\ndef test_a():\n    pytest.skip({reason!r})\ndef test_b():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path],
        cwd=ROOT,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("a skip is an error in CI" in done.stdout) == (code == 1)
