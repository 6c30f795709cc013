"""The README says what is true: its parameters, commands, SQL, files and tests exist and work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml
from papermill.inspection import inspect_notebook

from runbook import cli, parameters
from tests.walk import EVERY, client, notebook, walk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head left out."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\) ?\| ?", line.strip("| ")) for line in section.split("\n") if line.startswith("|")]
    return rows[2:]


def commands() -> list[str]:
    """Every call of the runbook in a shell block or a workflow."""
    steps = [step.get("run", "") for step in workflow()["jobs"]["rehearse"]["steps"]]
    lines = [
        line.split("#")[0].strip().removeprefix(".venv/bin/") for block in (*blocks("sh"), *steps) for line in block.split("\n")
    ]
    return [line.split(" > ")[0] for line in lines if line.startswith("runbook ")]


def workflow() -> dict[str, Any]:
    text = next(block for block in blocks("yaml") if "runs-on" in block)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_the_table_of_parameters_is_that_of_the_notebooks() -> None:
    seen: dict[str, set[str]] = {}
    defaults: dict[str, str] = {}
    for name in EVERY:
        for parameter, facts in inspect_notebook(str(notebook(name))).items():
            seen.setdefault(parameter, set()).add(name[:2])
            defaults[parameter] = str(facts["default"]).strip('"')
    said = {}
    for parameter, default, where, _ in table("Parameters"):
        numbers = {name[:2] for name in EVERY} if where.startswith("all") else set(where.split(", "))
        said[parameter.strip("`")] = numbers - set(where.partition("all but ")[2].split(", "))
        if default.strip("`") in ("", "True", "False") or default.startswith("`") or default.isdigit():
            assert default.strip("`") == defaults[parameter.strip("`")].replace("None", ""), parameter
    assert said == seen


def test_every_notebook_is_in_the_walk() -> None:
    assert re.findall(r"\]\(notebooks/(\w+)\.ipynb\) \|", README) == list(EVERY)


def test_every_command_is_one_that_the_runbook_has() -> None:
    assert len(commands()) > 8
    for line in commands():
        verb, *words = shlex.split(line)[1:]
        command = cli.main.commands[verb]
        context = command.make_context(verb, list(words))
        pairs = list(context.params.get("pairs") or ())
        parameters.check({"table": "users", **parameters.from_command_line(pairs)})


def test_every_file_of_parameters_is_valid() -> None:
    files = [yaml.safe_load(block) for block in blocks("yaml") if "runs-on" not in block]
    assert files
    for given in files:
        assert parameters.check(given).key == given["key"]


def test_the_workflow_gives_the_password_only_by_environment() -> None:
    job = workflow()["jobs"]["rehearse"]
    assert "PGPASSWORD" in job["env"]
    assert not any("password" in step.get("run", "").lower() for step in job["steps"])


def test_the_workflow_shows_what_came_of_a_run_that_failed_too(tmp_path: Path) -> None:
    steps = workflow()["jobs"]["rehearse"]["steps"]
    at = next(number for number, step in enumerate(steps) if step.get("run", "").startswith("runbook run"))
    assert [step.get("if") for step in steps[at:]] == [None, "always()", "always()"]
    folder = tmp_path / "runs" / "20260101T000000Z-orders"
    folder.mkdir(parents=True)
    for there in (False, True):  # a plan that was refused has no promises
        if there:
            (folder / "promises.md").write_text("| a promise | ❌ fail |\n")
        environment = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", "-e", "-c", steps[at + 1]["run"]], cwd=tmp_path, env=environment, check=True)
        assert (tmp_path / "summary").read_text() == "| a promise | ❌ fail |\n" * there


def test_every_test_that_proves_a_promise_exists() -> None:
    cited = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(cited) > 15
    for file, name in cited:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_picture_is_shown_in_words_and_small() -> None:
    shown = {path: words for words, path in re.findall(r"^!\[(.+)\]\((.+)\)$", README, re.MULTILINE)}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "notebooks" / "pictures").iterdir()} == set(shown)
    for path, words in shown.items():
        assert (ROOT / path).stat().st_size < 100_000, path
        assert len(words) > 20


def test_the_two_commands_are_marked_for_ci() -> None:
    for name in ("run", "test"):
        after = README.split(f"<!-- command: {name} -->\n")[1]
        assert after.startswith("```sh\npython3 -m venv .venv\n")


def test_the_sql_runs_on_the_migrated_clinic(clinic: str) -> None:
    walk(clinic)
    for block in blocks("sql"):
        shown = client("psql", "--no-psqlrc", clinic, text="\\set ON_ERROR_STOP on\n" + block)
        assert "users_patients |   949" in shown
        plan = shown.split("QUERY PLAN")[1].split(" rows)")[0]
        assert "users_doctors" in plan
        assert "users_patients" not in plan, "the plan reads one partition"
        assert "FOREIGN KEY (user_id, user_role) REFERENCES users(id, role)" in shown
