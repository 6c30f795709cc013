"""Every notebook, executed: in order, headless and by plain Papermill; twice; with parameters that cannot be meant."""

from __future__ import annotations

import getpass
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest
import yaml
from click.testing import CliRunner, Result
from papermill.inspection import inspect_notebook

from runbook import cli, embedded
from runbook.database import target
from runbook.ledger import STEPS, of
from runbook.parameters import Parameters
from runbook.provenance import LIBRARIES, checkout
from tests import migration
from tests.walk import CLINIC_FILE, EVERY, FORWARD, cells, dump, notebook, walk

Walked = Callable[..., None]


def command(*arguments: str) -> Result:
    """`runbook …` in this process."""
    return CliRunner().invoke(cli.main, list(arguments))


def papermill(name: str, out: Path, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`papermill NOTEBOOK OUT …` with Papermill's own engine, as a user would call it."""
    words = [sys.executable, "-m", "papermill", str(notebook(name)), str(out), "--no-progress-bar", *options]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


def query(database: str, text: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database) as connection:
        return connection.execute(text.encode()).fetchall()


def all_notebooks_in_order_end_in_the_partitioned_clinic(database: str, runs: Path, result: Result) -> None:
    assert result.exit_code == 0, result.output
    assert query(database, "SELECT tableoid::regclass::text, count(*) FROM users GROUP BY 1 ORDER BY 2 DESC") == [
        ("users_patients", 949),
        ("users_doctors", 50),
        ("users_admins", 1),
    ]
    assert query(database, "SELECT count(*) FROM users_backup") == [(1000,)]
    keys = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s AND conparentid = 0 AND convalidated"
    assert query(database, keys.replace("%s", "'users_pkey'")) == [("PRIMARY KEY (id, role)",)]
    assert query(database, keys.replace("%s", "'appointments_user_id_fkey'")) == [
        ("FOREIGN KEY (user_id, user_role) REFERENCES users(id, role) ON UPDATE CASCADE ON DELETE CASCADE",)
    ]
    assert query(database, "SELECT count(*) FROM appointments a JOIN users u ON u.id = user_id WHERE role <> user_role") == [(0,)]


def its_record_is_complete(database: str, runs: Path, result: Result) -> None:
    """Who, by whose leave, with what, by which plan, every statement, every step's evidence, every warning."""
    (folder,) = (entry for entry in runs.iterdir() if entry.is_dir())
    said, evidence = (json.loads((folder / name).read_text()) for name in ("manifest.json", "evidence.json"))
    run = of(target(database), "users")
    assert (said["operator"], said["host"]) == (getpass.getuser(), socket.gethostname())
    assert (said["database_user"], said["approved_by"], said["plan_hash"]) == ("postgres", "ann", run.plan.hash)
    assert said["server"].startswith("PostgreSQL ")
    assert all(said["versions"][name] for name in ("python", "partition-runbook", *LIBRARIES))
    assert said["git"]["runbook"] == checkout(Path(cli.__file__)), "as long as nobody commits while this runs"
    assert said["parameters"]["table"] == "users" and said["parameters"]["partitions"]["users_admins"] == ["admin"]
    assert evidence["migration"]["plan_hash"] == run.plan.hash
    warnings = [each["sentence"] for each in evidence["migration"]["plan"]["findings"]]
    assert warnings == [each.sentence for each in run.plan.findings] and warnings
    assert {each["step"] for each in evidence["actions"]} >= set(STEPS)
    for each in evidence["actions"]:
        assert each["state"] == "done" and each["started_at"] <= each["finished_at"] and each["operator"] and each["sentence"]
    ran = {}
    for name in FORWARD:
        assert f"{name}.statements.jsonl" in said["files"]
        kept = [json.loads(line) for line in (folder / f"{name}.statements.jsonl").read_text().splitlines()]
        if name == "05_cutover":  # whole, however long: an auditor asks which SQL it was
            texts = [each["text"] for each in kept]
            assert 'ALTER TABLE "public"."users" RENAME TO "users_retired"' in texts
            assert any(len(text) > 120 and "CREATE OR REPLACE VIEW" in text and "…" not in text for text in texts)
        for each in kept:
            assert {"at", "name", "seconds", "rows", "error", "waited_for", "text"} == each.keys()
            assert datetime.fromisoformat(each["at"]).tzinfo and each["seconds"] >= 0
        ran[name] = {each["name"] for each in kept}
    assert {"restore.copy_range", "changes.take_changed"} <= ran["03_restore"]
    assert any(name.startswith('ALTER TABLE "public"."users" RENAME TO "users_retired"') for name in ran["05_cutover"])


def each_step_prints_a_line_and_the_last_line_is_the_records_head(database: str, runs: Path, result: Result) -> None:
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[: len(FORWARD)]] == [[name, "done"] for name in FORWARD]
    assert "1,000 rows" in lines[1], "the backup's rows"
    assert "1,000 rows" in lines[3], "the restored rows"
    assert "102 rows" in lines[4], "the rows that were filled in"
    assert re.search(r"^Plan [0-9a-f]{12}: \d+ warnings? and \d+ notes?, in 00_plan\.html\.$", result.stdout, re.MULTILINE)
    head = lines[-1].removeprefix("Head:   ")
    assert (runs / "HEAD").read_text().startswith(head)
    assert query(database, "SELECT head FROM runbook.record ORDER BY id DESC LIMIT 1") == [(head,)]
    assert "Traceback" not in result.output


def the_record_holds_every_executed_notebook_with_its_page(database: str, runs: Path, result: Result) -> None:
    (folder,) = (entry for entry in runs.iterdir() if entry.is_dir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [step["notebook"] for step in manifest["steps"]] == [f"{name}.ipynb" for name in FORWARD]
    assert (manifest["state"], manifest["approved_by"], manifest["parameters"]["table"]) == ("completed", "ann", "users")
    for name in FORWARD:
        executed = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code"), name
        assert (folder / f"{name}.html").stat().st_size > 10_000


def nothing_is_left_among_the_notebooks(database: str, runs: Path, result: Result) -> None:
    assert {path.suffix or path.name for path in notebook("x").parent.iterdir()} <= {".ipynb", ".yaml", "pictures"}
    refused = command("run", "--out", str(notebook("x").parent / "runs"))
    assert refused.exit_code == 1
    assert "lies inside the notebooks' own folder" in refused.stderr


def test_a_run_migrates_and_is_on_record(clinic: str, tmp_path: Path) -> None:
    """One run for all that is promised of it: each takes half a minute."""
    given = ["-f", CLINIC_FILE, "--database", clinic, "-p", "approved_by", "ann", "--out", str(tmp_path)]
    result = command("run", *given)
    for promise in (
        all_notebooks_in_order_end_in_the_partitioned_clinic,
        its_record_is_complete,
        each_step_prints_a_line_and_the_last_line_is_the_records_head,
        the_record_holds_every_executed_notebook_with_its_page,
        nothing_is_left_among_the_notebooks,
    ):
        promise(clinic, tmp_path, result)
    audited = command("audit", str(tmp_path), "--database", clinic)
    assert (audited.exit_code, audited.stdout) == (0, f"{tmp_path} is as it was recorded.\n")
    with psycopg.connect(clinic) as connection:
        connection.execute("DELETE FROM runbook.record")
    alone = command("audit", str(tmp_path), "--database", clinic)
    assert alone.exit_code == 0 and "Nobody but its own HEAD vouches for the last run: the ledger of" in alone.stdout


@pytest.mark.long
def test_another_run_does_nothing_and_says_so(walked: Walked, clinic: str, tmp_path: Path) -> None:
    walked(*FORWARD)
    before = dump(clinic)
    again = command("run", "-f", CLINIC_FILE, "--database", clinic, "-p", "approved_by", "ann", "--out", str(tmp_path))
    assert again.exit_code == 0, again.output
    assert [line.split()[1] for line in again.stdout.splitlines()[:6]] == ["already"] * 6
    assert dump(clinic) == before


UNTIL = [pytest.param(n, id=name, marks=[] if n == len(FORWARD) else pytest.mark.long) for n, name in enumerate(FORWARD, 1)]


@pytest.mark.parametrize("until", UNTIL)
def test_run_all_twice_is_harmless(walked: Walked, clinic: str, until: int, capsys: pytest.CaptureFixture[str]) -> None:
    walked(*FORWARD[:until])
    before = dump(clinic)
    walk(clinic, *FORWARD[:until])
    assert dump(clinic) == before
    if until > 1:
        assert "Already done: the plan" in capsys.readouterr().out


@pytest.mark.long
def test_each_notebook_can_be_run_again_after_the_end(walked: Walked, clinic: str) -> None:
    walked(*FORWARD)
    walk(clinic, "91_finish", unneeded_for_h=0)
    before = dump(clinic)
    for name in (*FORWARD, "91_finish"):
        walk(clinic, name, unneeded_for_h=0)
    assert dump(clinic) == before
    assert query(clinic, "SELECT state FROM runbook.migration") == [("finished",)]


@pytest.mark.parametrize("until", UNTIL)
def test_rollback_leads_back_from_every_step(walked: Walked, clinic: str, until: int) -> None:
    before = dump(clinic, "--exclude-schema=runbook")
    walked(*FORWARD[:until])
    walk(clinic, "90_rollback")
    assert dump(clinic, "--exclude-schema=runbook") == before


@pytest.mark.long
@pytest.mark.parametrize("name", ["90_rollback", "91_finish"])
def test_rollback_and_finish_are_notebooks_too(walked: Walked, clinic: str, tmp_path: Path, name: str) -> None:
    walked(*FORWARD)
    verb = name.partition("_")[2]
    waits = ["-p", "unneeded_for_h", "0"] if verb == "finish" else []
    result = command(verb, "-f", CLINIC_FILE, "--database", clinic, "-p", "approved_by", "ann", *waits, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"{name:<17} done" in result.stdout
    assert ("is the original table again" in result.stdout) == (verb == "rollback")
    state = "rolled back" if verb == "rollback" else "finished"
    assert query(clinic, "SELECT state FROM runbook.migration") == [(state,)]


@pytest.mark.long
def test_the_record_names_who_approved_what_and_nobody_else(walked: Walked, clinic: str, tmp_path: Path) -> None:
    walked(*FORWARD)  # approved by ann
    add = ["add", "-f", CLINIC_FILE, "--database", clinic, "-p", "add", '{"users_nurses": ["nurse"]}', "--out", str(tmp_path)]

    def approvers() -> list[str]:
        return [json.loads(path.read_text())["approved_by"] for path in sorted(tmp_path.glob("*/manifest.json"))]

    assert command(*add, "-p", "plan", "0" * 12, "-p", "approved_by", "ann").exit_code == 1
    assert command(*add, "-p", "approved_by", " ").exit_code == 1
    assert set(approvers()) == {""}
    assert command(*add, "-p", "approved_by", "carl").exit_code == 0
    assert sorted(approvers()) == ["", "", "carl"]
    assert "; the addition approved by carl" in (tmp_path / "index.html").read_text()


def test_a_table_without_a_row_is_migrated_and_drawn(clinic: str) -> None:
    query(clinic, "WITH gone AS (DELETE FROM users RETURNING 1) SELECT count(*) FROM gone")
    space = walk(clinic, *FORWARD[:4])
    drawn = space["restore"].rows(space["run"])
    assert drawn.to_dict("list") == {"name": ["users_patients", "users_doctors", "users_admins"], "rows": [0, 0, 0]}


def test_plain_papermill_runs_a_notebook_from_any_working_directory(clinic: str, tmp_path: Path) -> None:
    walk(clinic, "00_plan")
    done = papermill("01_backup", tmp_path / "out.ipynb", "-f", CLINIC_FILE, "-p", "database", clinic, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert query(clinic, "SELECT count(*) FROM users_backup") == [(1000,)]


@pytest.mark.long
def test_plain_papermill_refuses_a_parameter_that_no_notebook_has(clinic: str, tmp_path: Path) -> None:
    before = dump(clinic)
    options = ["-f", CLINIC_FILE, "-p", "database", clinic, "-p", "partition", "users_patients"]
    done = papermill("00_plan", tmp_path / "out.ipynb", *options, cwd=tmp_path)
    assert done.returncode != 0
    assert "BadInput: partition is not a parameter of any notebook" in done.stderr
    assert dump(clinic) == before


def test_what_is_injected_is_what_its_last_cell_says() -> None:
    """A misspelt parameter that was corrected is forgotten; one that equals a notebook's own value is said all the same."""
    cells = ["# Parameters\nuniqe = 'global'", "# Parameters\nunique = 'global'\n", "x = resolve(unique=unique).unique"]
    code = f"""from IPython.core.interactiveshell import InteractiveShell
from runbook.parameters import resolve
shell = InteractiveShell.instance(user_ns={{"resolve": resolve}})
for cell in {cells!r}:
    shell.run_cell(cell, store_history=True).raise_error()
print(shell.user_ns["x"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("global\n", "")


@pytest.mark.long
def test_what_was_open_is_none_any_more_when_the_next_is_refused(clinic: str) -> None:
    """Else later cells would go on with it: elsewhere, or by what was just refused."""
    migration.plan(clinic)
    cells = [
        "import runbook",
        f"run = runbook.open({clinic!r}, 'users')",
        f"run = runbook.open({clinic!r}, 'nobody')",
        "run.plan",
    ]
    code = f"""from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
print([type(shell.run_cell(cell, silent=True).error_in_exec).__name__ for cell in {cells!r}])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "['NoneType', 'NoneType', 'BadInput', 'NameError']", done.stderr


def test_the_embedded_example_of_two_users_ends_two_nothing_nothing() -> None:
    embedded.reset()
    walk("embedded", users=2, approved_by="")
    counts = (
        "SELECT (SELECT count(*) FROM users_patients), (SELECT count(*) FROM users_doctors), (SELECT count(*) FROM users_admins)"
    )
    with psycopg.connect(embedded.start()) as connection:
        assert connection.execute(counts).fetchone() == (2, 0, 0)


@pytest.mark.parametrize("name", EVERY)
def test_papermill_sees_every_parameter(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        seen = inspect_notebook(str(notebook(name)))
    assert caplog.text == ""
    assert {"database", "table"} <= seen.keys() <= Parameters.model_fields.keys()
    assert all(parameter["help"] for parameter in seen.values()), "each has a comment"
    defaults = Parameters().model_dump()
    source = {name: yaml.safe_load(str(each["default"]).replace("None", "null")) for name, each in seen.items()}
    assert source == {name: defaults[name] for name in seen}, "the notebook's defaults are those that are checked"


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_is_stored_without_outputs(name: str) -> None:
    stored = nbformat.read(notebook(name), as_version=4)
    nbformat.validate(stored)
    assert stored.metadata.kernelspec.name == "python3"
    assert "papermill" not in stored.metadata
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells(name) if cell.cell_type == "code")


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_says_what_it_does_locks_and_undoes(name: str) -> None:
    first, second = cells(name)[:2]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {name[:2]} · ")
    assert all(word in first.source for word in ("**Does**", "**Locks**", "**Undo**"))
    assert "parameters" in second.metadata.tags
    for cell in cells(name):
        for linked in re.findall(r"\]\(([^)]*)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert notebook("x").with_name(linked).is_file(), f"{name} links to {linked}"


def test_no_notebook_holds_logic() -> None:
    for name in EVERY:
        for cell in cells(name):
            if cell.cell_type == "code":
                assert not any(
                    line.startswith(("def ", "class ", "for ", "if ", "while ", "try")) for line in cell.source.split("\n")
                )
