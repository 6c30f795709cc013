"""The auditor's page says what was promised, what was seen and who did it, and its commands ask the database again."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from nbformat.v4 import new_markdown_cell
from psycopg.conninfo import conninfo_to_dict

from runbook import certificate, ledger, verify
from runbook.archive import Run
from runbook.audit import audit
from runbook.errors import PromiseBroken
from runbook.ledger import Run as Migration
from tests import migration as actions
from tests.conftest import fresh
from tests.servers import Server, wheel
from tests.test_archive import executed

Made = tuple[str, Migration, Path]


def record(runs: Path, migration: Migration) -> Path:
    """The record of a run of 06, sealed."""
    made = Run.begin(runs, "users", {"table": "users"}, server="PostgreSQL", database_user="postgres")
    made.add(
        executed(made.start("06_verify.ipynb"), new_markdown_cell("[on](07_application.ipynb)"))
    )  # to which it does not come
    certificate.write(made, migration)
    made.seal()
    return made.folder


@pytest.fixture(scope="module")
def made(server: Server, clinic_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    for database in fresh(server, clinic_template):
        migration = actions.forward(database)
        verify.check(migration)
        yield database, migration, record(tmp_path_factory.mktemp("certificate") / "runs", migration)


def test_the_certificate_names_every_promise_with_what_was_seen_who_and_by_which_plan(made: Made) -> None:
    _, migration, folder = made
    page = html.unescape((folder / "certificate.html").read_text())
    promises = verify.seen(migration)
    assert len(promises) > 20
    for number, promise in enumerate(promises, 1):
        assert f"{number}. {promise.promise}: " in page
        assert promise.seen in page
        assert promise.sql.strip().rstrip(";") in page
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]["06_verify.ipynb"], manifest["files"]["06_verify.html"]
    for told in (migration.plan.hash, "a test", manifest["operator"], "postgres", folder.name, *files):
        assert told in page
    assert manifest["approved_by"] == "a test"
    tried = [promise for promise in promises if promise.verdict != verify.NOT_TRIED]  # on 14 no row can change its role
    assert len(promises) - len(tried) == (2 if migration.plan.server_version == 14 else 0)
    assert f"{len(tried)} promises hold, 0 are broken, {len(promises) - len(tried)} could not be tried." in page
    assert not re.search(r"<script|<link|https?://", page)
    assert set(re.findall(r'href="(.*?)"', page)) == {"../index.html", "06_verify.html"}
    assert (
        "on users_admins, users_doctors, users_patients: unique in each partition, no longer in the whole table (email)" in page
    ), "what was given up is said"


@pytest.mark.long
def test_the_plan_has_one_hash_from_the_freeze_to_the_last_page(made: Made) -> None:
    _, migration, folder = made
    assert ledger.of(migration.database, "users").plan.hash == migration.plan.hash
    evidence = evidence_of(folder)
    assert evidence["migration"]["plan_hash"] == migration.plan.hash
    text = json.dumps(evidence["migration"]["plan"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert sha256(text.encode()).hexdigest() == migration.plan.hash, "anybody can compute it from the record"


def evidence_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evidence.json").read_text()))


def asked_again(folder: Path) -> list[str]:
    """What psql answers to each of the certificate's commands; every one runs, and no verdict is another than pass."""
    commands = re.findall(r"Ask again</summary><pre>(.*?)</pre>", (folder / "certificate.html").read_text(), re.DOTALL)
    environment = {"PATH": f"{wheel(18) / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
    answers = []
    for command in commands:
        done = subprocess.run(["sh", "-c", html.unescape(command)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, command + done.stderr
        assert done.stdout.strip(), command
        if re.search(r"\|\s*(ok|same)\s*$", done.stdout.splitlines()[0]):
            assert set(re.findall(r"\| ([tf])$", done.stdout, re.MULTILINE)) == {"t"}, command + done.stdout
        answers.append(done.stdout)
    return answers


@pytest.mark.long
def test_every_command_of_the_certificate_runs_as_it_stands(made: Made) -> None:
    assert len(asked_again(made[2])) > 15


def test_the_commands_answer_as_recorded_wherever_the_server_sits_and_whatever_was_written_since(
    database: str, sql: Callable[..., Any], tmp_path: Path
) -> None:
    sql(f"""
        ALTER DATABASE {conninfo_to_dict(database)["dbname"]} SET TimeZone = 'America/New_York';
        ALTER DATABASE {conninfo_to_dict(database)["dbname"]} SET DateStyle = 'German';
        CREATE TABLE visits (id bigint PRIMARY KEY, at timestamptz NOT NULL, "no $1" timestamptz DEFAULT '2020-01-01 00:00+00',
          span interval DEFAULT '1 day 02:00', CONSTRAINT late CHECK (at > '2020-01-01 00:00+00'));
        CREATE INDEX few ON visits (at) WHERE "no $1" < '2030-01-01 00:00+00';
        INSERT INTO visits SELECT n, '2026-01-15'::timestamptz + n * interval '1 day' FROM generate_series(1, 60) n
    """)
    run = actions.plan(database, "visits", "at", partition_by="range", every="month", backup="visits_backup")
    actions.walk(run, actions.FORWARD)
    sql(
        "DELETE FROM visits WHERE id = 1; UPDATE visits SET span = '1 hour' WHERE id = 2; INSERT INTO visits VALUES (61, '2026-03-01'), (62, '2026-03-01')"
    )
    verify.check(run)
    answers = asked_again(record(tmp_path / "runs", run))
    assert len(answers) > 15
    (backup,) = (each.seen for each in verify.seen(run) if each.promise.startswith("The backup"))
    assert backup == "60 rows, as its evidence says; 4 rows differ from the result by the writes since: 2 new, 1 gone, 1 changed"
    page = (tmp_path / "runs" / next((tmp_path / "runs").glob("*-users*")) / "certificate.html").read_text()
    tried = {each.promise: each.verdict for each in verify.seen(run) if each.tried}
    assert set(tried.values()) == {"pass", "not tried"}
    assert page.count("Could not be tried</summary>") == list(tried.values()).count("not tried")


def test_that_both_tables_are_equal_can_be_asked_at_any_later_time(
    server: Server, forward: Callable[..., Migration], tmp_path: Path, sql: Callable[..., Any]
) -> None:
    migration = forward()
    verify.check(migration)
    page = (record(tmp_path / "runs", migration) / "certificate.html").read_text()
    (command,) = re.findall(r"Every row equals the retired table.*?Ask again</summary><pre>(.*?)</pre>", page, re.DOTALL)
    environment = {"PATH": f"{wheel(18) / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def answer() -> str:
        return subprocess.check_output(["sh", "-c", html.unescape(command)], env=environment, text=True).splitlines()[2][-1]

    assert answer() == "t"
    for write in (
        "INSERT INTO users (email, password, first_name, last_name) SELECT n || '@later.example', '', '', '' FROM generate_series(1, 3) n",
        "UPDATE users SET role = 'admin' WHERE email = '1@later.example'",
        "UPDATE users SET phone = '1' WHERE role = 'doctor'",
        "DELETE FROM users WHERE email = '2@later.example'",
    ):
        if server.version == 14 and "SET role" in write:
            continue  # PostgreSQL 14 refuses a changed role
        sql(write)
        assert answer() == "t", write
    sql("ALTER TABLE users_patients DISABLE TRIGGER runbook_log_back")
    sql(
        "UPDATE users SET phone = 'unseen' WHERE id = (SELECT min(id::text)::uuid FROM users_patients WHERE email NOT LIKE '%@later.example')"
    )
    assert answer() == "f"


def test_the_promises_are_there_for_machines_too(made: Made) -> None:
    _, migration, folder = made
    suite = ElementTree.parse(folder / "promises.xml").getroot()
    promises = verify.seen(migration)
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("public.users", str(len(promises)), "0")
    assert [case.get("name") for case in suite.iter("testcase")] == [each.promise for each in promises]
    lines = (folder / "promises.md").read_text().splitlines()
    assert sum(line.endswith(("| ✅ pass |", "| ➖ not tried |")) for line in lines) == len(promises)


def test_no_name_spoils_what_machines_read(made: Made) -> None:
    odd = [
        verify.Promise("a | b\x01\x1b", "SELECT 1", "<x>\n& | ]]>\x00\ufffe😀", verdict)
        for verdict in ("pass", "fail", "not tried")
    ]
    counts = Counter(each.verdict for each in odd)
    suite = ElementTree.fromstring(certificate._junit(made[1], odd, counts))
    assert {case.get("name") for case in suite} == {"a | b\ufffd\ufffd"}
    assert [(case[0].tag, case[-1].text) for case in suite] == [
        (tag, "<x>\n& | ]]>\ufffd\ufffd😀") for tag in ("system-out", "failure", "skipped")
    ]
    lines = certificate._markdown(made[1], odd, "").splitlines()[-3:]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines), "three cells each"


def test_the_evidence_of_every_action_is_in_the_record(made: Made) -> None:
    evidence = evidence_of(made[2])
    assert evidence["migration"]["plan_hash"] == made[1].plan.hash
    done = {(each["step"], each["action"]): each for each in evidence["actions"]}
    assert done["cutover", "approval"]["evidence"]["approved_by"] == "a test"
    assert done["restore", "compare"]["state"] == "done" and done["restore", "compare"]["rows"] == 1000
    assert {"started_at", "finished_at", "operator", "sentence"} <= done["backup", "make"].keys()


def test_the_certificate_is_part_of_what_the_audit_checks(made: Made) -> None:
    runs = made[2].parent
    assert audit(runs) == []
    page = made[2] / "certificate.html"
    text = page.read_text()
    page.write_text(text.replace("0 are broken", "1 are broken"))
    assert audit(runs) == [f"{made[2].name}/certificate.html was changed."]
    page.write_text(text)


@pytest.mark.long
def test_a_broken_promise_is_certified_as_broken(
    forward: Callable[..., Migration], tmp_path: Path, sql: Callable[..., Any]
) -> None:
    migration = forward()
    sql("DROP INDEX users_is_active_idx")
    with pytest.raises(PromiseBroken):
        verify.check(migration)
    folder = record(tmp_path / "runs", migration)
    assert '<span class="fail">fail</span>' in (folder / "certificate.html").read_text()
    suite = ElementTree.parse(folder / "promises.xml").getroot()
    (failed,) = suite.iter("failure")
    assert suite.get("failures") == "1" and "missing" in str(failed.get("message"))
    assert "| ❌ fail |" in (folder / "promises.md").read_text()


def test_a_run_that_verified_nothing_has_no_certificate(made: Made, tmp_path: Path) -> None:
    other = Run.begin(tmp_path / "runs", "users", {})
    other.add(executed(other.start("03_restore.ipynb")))
    certificate.write(other, made[1])
    other.seal()
    assert (other.folder / "evidence.json").is_file()
    assert not (other.folder / "certificate.html").exists()
