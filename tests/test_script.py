"""`runbook sql`: one script, which ends on a quiet copy where the notebooks end."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Timer

import psycopg
import pytest
from click.testing import CliRunner

from runbook import cli, ledger
from runbook.database import target
from tests import migration
from tests.conftest import fresh
from tests.servers import Server
from tests.walk import CLINIC_FILE, FORWARD, client, dump, walk


@pytest.fixture
def copy(server: Server, clinic_template: str) -> Iterator[str]:
    """A second copy of the clinic."""
    yield from fresh(server, clinic_template)


def printed(database: str, *options: str) -> str:
    """What `runbook sql` prints for the clinic's file."""
    shown = CliRunner().invoke(cli.main, ["sql", "-f", CLINIC_FILE, "--database", database, *options])
    assert shown.exit_code == 0, shown.output
    return shown.output


@pytest.mark.parametrize("legacy", ["fill", "strict"])
def test_the_script_ends_where_the_notebooks_end(clinic: str, copy: str, legacy: str) -> None:
    for each in (copy, clinic):
        client("psql", "--quiet", each, text="CREATE MATERIALIZED VIEW roles AS SELECT role, count(*) FROM users GROUP BY role;"
               " CREATE UNIQUE INDEX ON roles (role); CREATE STATISTICS names ON first_name, last_name FROM users")  # fmt: skip
    script = printed(copy, "-p", "legacy_inserts", legacy)
    client("psql", "--no-psqlrc", "--quiet", copy, text=script)
    walk(clinic, *FORWARD[:-1], legacy_inserts=legacy)
    assert dump(copy) == dump(clinic)


@pytest.mark.long
def test_after_the_script_the_runbook_goes_on(clinic: str, database: str) -> None:
    """In a copy, restored from a dump: 06 verifies, 90 leads back, and what is planned anew comes to its end."""
    client("psql", "--no-psqlrc", "--quiet", database, text=client("pg_dump", f"--dbname={clinic}"))
    before, script = dump(database, "--exclude-schema=runbook"), printed(clinic)
    client("psql", "--no-psqlrc", "--quiet", database, text=script)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("INSERT INTO users (email, password, first_name, last_name, role) VALUES ('n@x', '', '', '', 'admin')")
        assert "05_cutover (check done)" in CliRunner().invoke(cli.main, ["status", "--database", database]).output
        walk(database, *FORWARD[:-1], "90_rollback")
        connection.execute("DELETE FROM users WHERE email = 'n@x'")
    assert dump(database, "--exclude-schema=runbook") == before
    walk(database, *FORWARD[:-1])
    walk(database, "91_finish", approved_by="ann", force_strict=True)


@pytest.mark.long
def test_the_script_stops_at_the_first_error(clinic: str) -> None:
    script = printed(clinic)
    with psycopg.connect(clinic, autocommit=True) as connection:
        connection.execute("CREATE TABLE users_backup ()")
    with pytest.raises(AssertionError, match='relation "users_backup" already exists'):
        client("psql", "--no-psqlrc", "--quiet", clinic, text=script)
    with psycopg.connect(clinic) as connection:
        assert connection.execute("SELECT to_regclass('users_doctors')").fetchone() == (None,)


def test_a_script_that_stopped_half_way_is_taken_back_whole(clinic: str) -> None:
    """Between the backup and its note, as of a psql that was killed; and where somebody reads a referencing table."""
    before, script = dump(clinic, "--exclude-schema=runbook"), printed(clinic)
    client("psql", "--no-psqlrc", "--quiet", clinic, text=script[: script.rindex("INSERT", 0, script.index("'make'"))])
    migration.back(ledger.of(target(clinic), "users"))
    assert dump(clinic, "--exclude-schema=runbook") == before
    with psycopg.connect(clinic) as reader:
        reader.execute("TABLE appointments")
        with pytest.raises(AssertionError, match="lock timeout"):
            client("psql", "--no-psqlrc", "--quiet", clinic, text=f"SET lock_timeout = '50ms';\n{printed(clinic)}")
    migration.back(ledger.of(target(clinic), "users"))
    assert dump(clinic, "--exclude-schema=runbook") == before


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("UPDATE users SET first_name = 'late' WHERE role = 'admin'", "\nBEGIN;\n"),
        pytest.param("UPDATE appointments SET notes = 'late'", "\nBEGIN;\nSET LOCAL", marks=pytest.mark.long),
    ],
)
def test_what_somebody_writes_while_the_script_runs_stops_it_before_the_swap(clinic: str, written: str, place: str) -> None:
    """Before its last transaction, or before a referencing table is filled in."""
    script = printed(clinic)
    at = script.rindex(place, 0, script.rindex("\nBEGIN;\n") + 8)
    with pytest.raises(AssertionError, match=rf"ERROR:  public.{written.split()[1]} was written to while the script ran"):
        client("psql", "--no-psqlrc", "--quiet", clinic, text=f"{script[:at]}\n{written};\n{script[at:]}")
    assert f"{written.split()[1]}_retired" not in (there := dump(clinic))
    assert there.count("late") > 0
    migration.back(ledger.of(target(clinic), "users"))
    assert "late" in dump(clinic)


def test_printing_the_script_changes_nothing(clinic: str) -> None:
    before = dump(clinic)
    printed(clinic)
    assert dump(clinic) == before


@pytest.mark.long
def test_whom_it_waits_for_is_no_part_of_the_script(clinic: str) -> None:
    with psycopg.connect(clinic) as other:
        other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        Timer(4, other.close).start()
        shown = CliRunner().invoke(cli.main, ["sql", "-f", CLINIC_FILE, "--database", clinic])
    assert shown.exit_code == 0
    assert "waiting for" in shown.stderr
    assert shown.stdout.startswith("-- Plan ") and "waiting for" not in shown.stdout


def test_no_script_is_printed_for_a_plan_with_blockers(clinic: str) -> None:
    shown = CliRunner().invoke(cli.main, ["sql", "-f", CLINIC_FILE, "--database", clinic, "-p", "partitions", '{"a": ["user"]}'])
    assert shown.exit_code == 1
    assert "public.users has 51 rows whose role fits no partition: 'doctor' (50), 'admin' (1)." in shown.stderr
    assert shown.stdout == ""
