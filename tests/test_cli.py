"""The command line: help that teaches, exit codes, what machines read, and a Ctrl-C that leaves the truth."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import conninfo_to_dict

from runbook import archive, cli, embedded
from runbook.execution import begin, seal
from runbook.ledger import Run, claim
from tests.walk import CLINIC_FILE, FORWARD, walk

Sql = Callable[..., list[tuple[Any, ...]]]
COMMANDS = ("add", "audit", "finish", "lab", "monitor", "rehearse", "rollback", "run", "sql", "status", "stop")


def command(*words: str) -> Result:
    """`runbook …` in this process."""
    return CliRunner().invoke(cli.main, list(words))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    shown = command(name, "--help")
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: main {name}")
    assert shown.output.split("\n\n")[1].strip().endswith((".", "\\)", "notebooks end.")), "a sentence"


def test_the_help_teaches_by_examples_that_parse() -> None:
    shown = command("--help").output
    lines = [line.split("   ")[0].split() for line in shown.splitlines() if line.strip().startswith("runbook ")]
    assert {words[1] for words in lines} >= {"run", "status", "sql", "rollback", "lab"}
    for words in lines:
        cli.main.commands[words[1]].make_context(words[1], [word for word in words[2:] if word != "\\"])
    assert "Exit codes: 0 done" in shown
    assert set(cli.main.commands) == set(COMMANDS)


def test_the_list_of_commands_says_each_in_a_whole_line() -> None:
    listed = command("--help").output.partition("\nCommands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)  # none goes on in a second line
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_does_not_wait_for_jupyter() -> None:
    asked = "import sys, runbook.cli; print([name for name in ('papermill', 'nbformat', 'jupyterlab', 'matplotlib') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.long
def test_a_step_is_known_by_number_and_by_name(clinic: str, tmp_path: Path) -> None:
    given = ["-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path)]
    for words in (["--from", "03", "--to", "restore"], ["--from", "restore", "--to", "03_restore"]):
        result = command("run", *given, *words)
        assert result.exit_code == 1
        assert result.stdout.startswith("03_restore        failed")
        assert "03_restore stopped at “" in result.stderr
        assert "run 00_plan first" in result.stderr
        assert "The same command goes on" not in result.stderr
        assert result.stdout.splitlines()[-1].startswith("Head:   ")


def test_status_says_for_machines_what_it_says_for_people(clinic: str) -> None:
    assert command("status", "--database", clinic).output.startswith("No migration has been planned on postgresql://")
    assert json.loads(command("status", "--database", clinic, "--json").output) == []
    walk(clinic, "00_plan", "01_backup")
    assert command("status", "--database", clinic).output.startswith("public.users: open, at 01_backup (check done).")
    (row,) = json.loads(command("status", "--database", clinic, "--json").output)
    assert (row["table"], row["state"], row["step"], row["action_state"]) == ("public.users", "open", "01_backup", "done")
    assert command("status", "--database", clinic, "-p", "table", "public.users", "--json").output.count("plan_hash") == 1
    assert json.loads(command("status", "--database", clinic, "-p", "table", "doctors", "--json").output) == []


def test_what_nobody_works_at_any_more_was_broken_off(forward: Callable[..., Run], clinic: str, sql: Sql) -> None:
    run = forward("copy")
    sql("UPDATE runbook.action SET state = 'started', finished_at = NULL, sentence = NULL WHERE action = 'copy'")
    assert command("status", "--database", clinic).output == "public.users: open, at 03_restore (copy broken off).\n"
    with run.database.session("restore.copy") as session:
        claim(session, run.plan)
        assert command("status", "--database", clinic).output == "public.users: open, at 03_restore (copy started).\n"


def test_environment_means_libpqs_variables(clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says which database they meant."""
    for name, value in conninfo_to_dict(clinic).items():
        monkeypatch.setenv({"dbname": "PGDATABASE"}.get(name, f"PG{name.upper()}"), str(value))
    walk("environment", "00_plan")
    assert command("status", "--database", "environment").output.startswith("public.users: open, at 00_plan")
    record = begin(tmp_path / "runs", {"table": "users", "database": "environment"})
    seal(record, "environment", "users", "completed")
    place = conninfo_to_dict(clinic)
    assert record.manifest["target"] == f"{place['dbname']} at {place['host']}, port {place['port']}"
    assert f"environment: {record.manifest['target']}" in (tmp_path / "runs" / "index.html").read_text()


def test_a_service_file_means_its_database(clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "".join(f"{name}={value}\n" for name, value in conninfo_to_dict(clinic).items())
    (tmp_path / "services").write_text(f"[shop]\n{entries}")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert command("status", "--database", "service=shop").output.startswith("No migration has been planned on service=shop")


def test_stop_stops_the_example_and_says_so_when_it_was_stopped_already() -> None:
    embedded.reset()  # whatever another test has loaded
    embedded.start(users=0)
    assert command("stop").output == "The embedded server has stopped.\n"
    assert command("stop").output == "The embedded server was not running.\n"


def wait_for(sql: Sql, query: str, seconds: float = 180) -> None:
    """Return when the query finds something."""
    end = time.monotonic() + seconds
    while not sql(query):
        assert time.monotonic() < end, query
        time.sleep(0.1)


@pytest.mark.parametrize("library", ["pydantic_core", "numpy"])
def test_ctrl_c_while_it_loads_leaves_no_traceback(library: str) -> None:
    program = str(Path(sys.executable).with_name("runbook"))
    going = subprocess.Popen([program, "status", "--database", "service=nowhere"], stderr=subprocess.PIPE, text=True)
    while library not in Path("/proc", str(going.pid), "maps").read_text():
        time.sleep(0.01)
    going.send_signal(signal.SIGINT)
    assert going.communicate(timeout=60)[1] == ""
    assert going.returncode == -signal.SIGINT, "130 to a shell"


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"])
def test_an_interrupted_run_leaves_the_truth_and_goes_on(clinic: str, sql: Sql, tmp_path: Path, number: int, code: int) -> None:
    program = str(Path(sys.executable).with_name("runbook"))
    walk(clinic, "00_plan")
    words = ["run", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path), "--from", "backup", "--to", "partition"]
    with psycopg.connect(clinic) as application:
        application.execute("LOCK TABLE users IN ROW EXCLUSIVE MODE")
        going = subprocess.Popen(
            [program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        waiting = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'runbook partition.log' AND wait_event_type = 'Lock'"
        wait_for(sql, waiting)
        lines = []
        while not any(line.startswith("  waiting for pid ") for line in lines):  # without a terminal, too, at once
            lines.append(going.stdout.readline())
            assert lines[-1], "it ended before it said who was in the way"
        os.killpg(going.pid, number) if number == signal.SIGINT else going.send_signal(number)
        printed, said = going.communicate(timeout=60)
    assert going.returncode == code, said
    assert "02_partition stopped at “" in said
    assert "The same command goes on from there" in said
    assert "Traceback" not in said
    (folder,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["state"], manifest["sealed"]) == ("failed", True)
    assert [step["state"] for step in manifest["steps"]] == ["completed", "failed"]
    assert printed.splitlines()[-1].startswith("Head:   ")
    again = command(*words)
    assert again.exit_code == 0, again.output
    assert [line.split()[1] for line in again.stdout.splitlines()[:2]] == ["already", "done"]
    kept = [json.loads(line) for line in (folder / "02_partition.statements.jsonl").read_text().splitlines()]
    assert any("ShareRowExclusiveLock on users: pid " in held for each in kept for held in each["waited_for"])
    assert command("audit", str(tmp_path), "--database", clinic).exit_code == 0


@pytest.mark.long
def test_a_ctrl_c_before_the_first_notebook_is_told_as_one(tmp_path: Path) -> None:
    words = [str(Path(sys.executable).with_name("runbook")), "status"]
    with open(tmp_path / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        environment = {**os.environ, "RUNBOOK_HOME": str(tmp_path)}
        going = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        while "FLOCK  ADVISORY  WRITE " + str(going.pid) not in Path("/proc/locks").read_text():
            assert going.poll() is None
            time.sleep(0.1)
        going.send_signal(signal.SIGINT)
        said = going.communicate(timeout=30)[1]
    assert (going.returncode, said) == (130, "Interrupted.\n")


@pytest.mark.long
def test_a_run_that_is_terminated_between_two_notebooks_is_sealed(clinic: str, sql: Sql, tmp_path: Path) -> None:
    walk(clinic, "00_plan")
    words = ["run", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path)]
    with psycopg.connect(clinic) as somebody:
        somebody.execute("LOCK TABLE runbook.migration")  # what was done before is looked up before each notebook
        program = str(Path(sys.executable).with_name("runbook"))
        going = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(sql, "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'runbook%' AND wait_event_type = 'Lock'")
        going.send_signal(signal.SIGTERM)
        time.sleep(1)
    said = going.communicate(timeout=60)[1]
    assert (going.returncode, "00_plan was stopped between two cells." in said) == (143, True)
    (kept,) = tmp_path.glob("*/manifest.json")
    assert json.loads(kept.read_text())["sealed"]


@pytest.mark.long
def test_what_is_told_to_do_fits_what_was_stopped(clinic: str, tmp_path: Path) -> None:
    given = ["-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path)]
    assert "rollback" not in command("monitor", *given).stderr
    refused = command("run", *given, "-p", "key", "nothing").stderr
    assert "Nothing but the ledger was written: when that is mended" in refused


def test_a_folder_that_cannot_be_written_is_a_sentence(clinic: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = command("run", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "file" / "runs"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "file/runs cannot be used: Not a directory." in result.stderr


@pytest.mark.long
def test_a_failure_of_the_record_itself_is_not_told_as_success(
    clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(archive.Run, "add", full)
    result = command("run", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path), "--to", "plan")
    assert result.exit_code == 1
    assert "A file of the record cannot be used: No space left on device." in result.stderr
    (kept,) = tmp_path.glob("*/manifest.json")
    manifest = json.loads(kept.read_text())
    assert manifest["state"] == "failed"
    assert manifest["result"] == "00_plan stopped: OSError: No space left on device"


@pytest.mark.long
@pytest.mark.parametrize("ends", ["| true", "2>&-", "<&- >&- 2>&-"])
def test_whoever_does_not_read_stops_no_work(clinic: str, tmp_path: Path, ends: str) -> None:
    program = Path(sys.executable).with_name("runbook")
    words = [program, "run", "-f", CLINIC_FILE, "--database", clinic, "--out", tmp_path / "runs", "--to", "backup"]
    done = subprocess.run(f"{shlex.join(map(str, words))} {ends}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (manifest,) = [json.loads(kept.read_text()) for kept in tmp_path.glob("runs/*/manifest.json")]
    assert (manifest["state"], manifest["sealed"], len(manifest["steps"])) == ("completed", True, 2)


@pytest.mark.long
def test_what_is_interrupted_while_it_is_sealed_is_told_all_the_same(
    clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = archive.Run.seal

    def interrupted(record: archive.Run, **facts: Any) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return seal(record, **facts)

    monkeypatch.setattr(archive.Run, "seal", interrupted)
    result = command("run", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path), "--to", "plan")
    assert result.exit_code == 130 and "Interrupted." in result.stderr
    assert re.search(r"00_plan +done(.|\n)*Record: .*\nHead:   [0-9a-f]{64}\n", result.stdout)


@pytest.mark.long
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_is_offered_commands_and_steps(shell: str) -> None:
    program = str(Path(sys.executable).with_name("runbook"))
    environment = {**os.environ, "_RUNBOOK_COMPLETE": f"{shell}_source"}
    script = subprocess.run([program], env=environment, capture_output=True, text=True, check=True).stdout
    assert "_RUNBOOK_COMPLETE" in script

    def offered(words: str) -> str:
        begun = words.split(" ")[1:]
        asked = {"COMP_WORDS": words, "COMP_CWORD": begun[-1] if shell == "fish" else str(len(begun))}
        complete = environment | asked | {"_RUNBOOK_COMPLETE": f"{shell}_complete"}
        return subprocess.run([program], env=complete, capture_output=True, text=True, check=False).stdout

    commands, steps = offered("runbook r"), offered("runbook run --to ")
    assert all(name in commands for name in ("rehearse", "rollback", "run"))
    assert "audit" not in commands
    assert all(name in steps for name in FORWARD)


@pytest.mark.parametrize(("begun", "names"), [("03", ["03_restore"]), ("re", ["restore"]), ("05_c", ["05_cutover"]), ("x", [])])
def test_a_step_is_completed_as_it_was_begun(begun: str, names: list[str]) -> None:
    context = click.Context(cli.run)
    for option in cli.run.params:
        if option.name in ("first", "last"):
            assert [each.value for each in option.shell_complete(context, begun)] == names
