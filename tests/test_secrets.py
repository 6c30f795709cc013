"""No secret and nobody's row gets into the record, the ledger or the logs, wherever it comes in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook

from runbook import cli
from runbook.archive import Run
from runbook.database import target
from runbook.engine import execute
from runbook.locks import Blocker, blockers
from runbook.redaction import redact, valueless
from tests.walk import CLINIC_FILE, FORWARD

WORD = "Tr0ub4dor&3"  # with a character that URLs, HTML and shells write differently


def planted(name: str) -> str:
    return f"{WORD}-{name}"


@pytest.fixture
def hidden(tmp_path: Path) -> dict[str, str]:
    """An environment that holds a secret in every place from which libpq, or a careless program, takes one."""
    (tmp_path / "pass").write_text(f"*:*:*:*:{planted('passfile')}\n")
    (tmp_path / "pass").chmod(0o600)
    (tmp_path / "service").write_text(f"[shop]\nhost=db\npassword={planted('service')}\n")
    return {
        "PGPASSWORD": planted("pgpassword"), "PGPASSFILE": str(tmp_path / "pass"), "PGSERVICEFILE": str(tmp_path / "service"),
        "DATABASE_URL": f"postgresql://ann:{planted('url').replace('&', '%26')}@db/shop", "DEPLOY_TOKEN": planted("token"),
    }  # fmt: skip


def leaks(text: str) -> list[str]:
    forms = (WORD, "Tr0ub4dor&amp;3", "Tr0ub4dor%263", "Tr0ub4dor\\u00263")
    return [text[max(0, text.find(form) - 60) : text.find(form) + 60] for form in forms if form in text]


def search(folder: Path) -> list[str]:
    """Where any file below holds a planted secret."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [f"{file.name}: {leak}" for file in files for leak in leaks(file.read_bytes().decode("utf-8", "replace"))]


def runbook(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`runbook …` in a process of its own, with the planted environment."""
    program = shutil.which("runbook", path=Path(sys.executable).parent) or "runbook"
    return subprocess.run([program, *words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


def ledger(url: str) -> str:
    """Everything in the schema `runbook`, as text."""
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'runbook'").fetchall()
        rows = [connection.execute(f'SELECT t::text FROM runbook."{name}" t'.encode()).fetchall() for (name,) in tables]
        return "\n".join(text for table in rows for (text,) in table)


@pytest.mark.long
@pytest.mark.parametrize(
    "database", [f"postgresql://ann:{WORD}@db/shop", f"host=db password={WORD}", f"postgresql://ann@db/shop?password={WORD}"]
)
def test_a_password_on_the_command_line_is_refused_and_repeated_nowhere(database: str, tmp_path: Path) -> None:
    words = ["run", "--database", database, "-p", "table", "users", "-p", "key", "role", "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 1
    assert not leaks(done.output)
    assert search(tmp_path / "runs") == []


@pytest.mark.long
def test_a_whole_run_keeps_no_secret_and_nobodys_row(
    clinic: str, tmp_path: Path, hidden: dict[str, str], sql: Callable[..., Any]
) -> None:
    """Secrets lie all around it. Counts and the key's values are in the record; ids, addresses and password hashes are not."""
    done = runbook("run", "-f", CLINIC_FILE, "--database", clinic, "-p", "approved_by", "ann", cwd=tmp_path, **hidden)
    assert done.returncode == 0, done.stderr
    assert not leaks(done.stdout + done.stderr)
    assert search(tmp_path / "runs") == []
    assert not leaks(ledger(clinic))
    (folder,) = (entry for entry in (tmp_path / "runs").iterdir() if entry.is_dir())
    assert {f"{name}.ipynb" for name in FORWARD} <= {file.name for file in folder.iterdir()}
    texts = [file.read_text() for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    told = "\n".join([*texts, done.stdout, done.stderr, ledger(clinic)])
    people = sql("SELECT id::text, email, password, phone FROM users")
    assert len(people) == 1000
    words = set(re.findall(r"[\w.@+$/-]+", told))  # each of 4,000 values sought in all texts took half a minute
    assert {value for row in people for value in row if value and not words.isdisjoint({value, *value.split()})} == set()


def test_a_row_that_the_server_refuses_is_not_repeated(clinic: str, tmp_path: Path, sql: Callable[..., Any]) -> None:
    """PostgreSQL's own words repeat the whole row; neither notebook, page, manifest nor what is printed does."""
    sql("ALTER TABLE users ALTER role SET NOT NULL")
    insert = "INSERT INTO users (email, password, first_name, last_name, role)"
    insert += " SELECT 'ann' || '@example.org', 's3cret' || '-hash', 'A', 'B', NULL"
    code = f"import psycopg, runbook\nwith psycopg.connect({clinic!r}) as connection:\n    connection.execute({insert!r})"
    cells = [new_code_cell(code)]
    spec = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "a.ipynb")
    run = Run.begin(tmp_path / "runs", "users", {})
    result = execute(tmp_path / "a.ipynb", run.start("a.ipynb"), {})
    run.add(result)
    run.seal(result=result.error)
    assert result.error_name == "NotNullViolation"
    assert result.error.startswith("The server refused it (23502): null value in column")
    for text in (result.error, *(file.read_text() for file in run.folder.iterdir())):
        assert "ann@example.org" not in text and "s3cret-hash" not in text
    assert "Failing row contains (***)" in (run.folder / "a.html").read_text()


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("UPDATE users SET phone = '555 zoe' WHERE email = 'zoe@b.org'", "UPDATE users SET phone = '...' WHERE email = '...'"),
        ("/* it's zoe */ UPDATE users SET phone = 'zoe' -- for 'zoe'", "UPDATE users SET phone = '...'"),
        ("SELECT /* a /* zoe */ zoe */ 1", "SELECT"),
        ("/* zoe */ SELECT 1 /* zoe", "SELECT ..."),
        ("UPDATE users SET phone = $$zoe$$, email = $a$zoe $$ zoe$a$ WHERE id = $1", "UPDATE users SET phone = '...', email = '...' WHERE id = $1"),
        (r"UPDATE users SET phone = E'x\'zoe' WHERE role = 'user'", "UPDATE users SET phone = E'...'"),
        ("SELECT 4111111111, 1.5e3, u2.a1 FROM \"it's 1\" u2 WHERE role = 'user' LIMIT 10", "SELECT ..., ..., u2.a1 FROM \"it's 1\" u2 WHERE role = 'user' LIMIT ..."),
        ("UPDATE users SET email = 'zoe", "UPDATE users SET email = '...'"),
        ("UPDATE users\n SET email = 'o''zoe'", "UPDATE users SET email = '...'"),
    ],
)  # fmt: skip
def test_of_somebodys_statement_no_value_is_shown_but_those_that_are_known_anyway(query: str, shown: str) -> None:
    if "'user'" in shown:
        assert valueless(query, ["user"]) == shown
    else:
        assert valueless(query) == shown


def test_of_a_blockers_query_nobodys_data_is_shown(clinic: str) -> None:
    held, waiting = psycopg.connect(clinic), psycopg.connect(clinic)
    with held, waiting:
        held.execute("UPDATE users SET phone = $$555 s3cret$$ WHERE email = 'user1@example.org'")
        waiter = threading.Thread(target=waiting.execute, args=["LOCK users"])
        waiter.start()
        found = list[Blocker]()
        while not found:
            with target(clinic).connect() as third:
                found = blockers(third, waiting.info.backend_pid)
        held.rollback()
        waiter.join()
    assert "\"UPDATE users SET phone = '...' WHERE email = '...'\"" in str(found[0])


def test_what_a_function_of_the_application_raises_is_not_repeated(clinic: str, tmp_path: Path, sql: Callable[..., Any]) -> None:
    sql("CREATE FUNCTION frozen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the row of % is frozen', OLD.email; END $$;"
        " CREATE TRIGGER frozen BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION frozen()")  # fmt: skip
    code = f"import psycopg, runbook\nwith psycopg.connect({clinic!r}) as connection:\n    connection.execute('UPDATE users SET phone = NULL')"
    spec = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": spec}), tmp_path / "a.ipynb")
    run = Run.begin(tmp_path / "runs", "users", {})
    result = execute(tmp_path / "a.ipynb", run.start("a.ipynb"), {})
    assert result.error.startswith(
        "The server refused it (P0001): frozen() raised an error, whose text may repeat somebody's data"
    )
    for text in (result.error, *(file.read_text() for file in run.folder.iterdir())):
        assert "@example.org" not in text


@pytest.mark.parametrize(
    "message",
    [
        "DETAIL:  Failing row contains (1, ann@example.org,\n Ann (the first), null).\nCONTEXT:  SQL function",
        json.dumps({"error": "Failing row contains (1, ann@example.org, null)."}),
        "Failing row contains (1, ann@example.org, x).",
    ],
)
def test_a_failing_row_is_hidden_wherever_it_is_quoted(message: str) -> None:
    clean = redact(message)
    assert "ann@" not in clean and "Failing row contains (***)" in clean
    assert ("CONTEXT" in clean) == ("CONTEXT" in message)


@pytest.mark.parametrize(
    "end",
    [
        "already exists.",
        "is duplicated.",
        'is not present in table "users".',
        "conflicts with existing key (email)=(ann@b.org (b)).",
    ],
)
def test_a_key_of_a_row_is_hidden_wherever_it_is_quoted(end: str) -> None:
    clean = redact(f"DETAIL:  Key (email, lower(name::text))=(ann@example.org, a (x)) {end}\nCONTEXT:  SQL function")
    assert "ann@" not in clean and clean.startswith("DETAIL:  Key (email, lower(name::text))=(***) ") and "CONTEXT" in clean


@pytest.mark.long
def test_an_error_is_a_sentence_with_a_way_out_and_its_traceback_is_folded(tmp_path: Path) -> None:
    code = "from runbook.errors import NotEqual\nimport runbook\nraise NotEqual('users differs in 3 rows: run 03_restore again.')"
    spec = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": spec}), tmp_path / "a.ipynb")
    run = Run.begin(tmp_path / "runs", "users", {})
    run.add(execute(tmp_path / "a.ipynb", run.start("04_foreign_keys.ipynb"), {}))
    page = (run.folder / "04_foreign_keys.html").read_text()
    assert run.manifest["steps"][0]["error"] == "users differs in 3 rows: run 03_restore again."
    assert '<a href="03_restore.html">03_restore</a>' in page
    shown, _, folded = page.partition("<details><summary>Traceback</summary>")
    assert "NotEqual: users differs in 3 rows" in shown and "Traceback" not in shown.split("<body")[1]
    assert "Traceback (most recent call last)" in folded
    code = code.replace("users differs in 3 rows: run 03_restore again.", "role is no column of users: it has id, email.")
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": spec}), tmp_path / "a.ipynb")
    run.add(execute(tmp_path / "a.ipynb", run.start("00_plan.ipynb"), {}))
    other = (run.folder / "00_plan.html").read_text()
    assert "Put that right, then run this notebook again: what is done is not done again." in other, "a way out in any case"
    run.seal()
    assert '<a href="03_restore.html">' not in (run.folder / "04_foreign_keys.html").read_text(), "there is no such page here"
