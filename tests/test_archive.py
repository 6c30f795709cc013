"""The record on disk keeps no secret, shows whatever was tampered with, and opens without network or scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from runbook import cli, execution
from runbook.archive import Run, sha256, write_whole
from runbook.audit import audit
from runbook.engine import Executed, execute
from runbook.pages import index, render_html
from runbook.redaction import known_secrets, redact
from runbook.signals import ended_by_signals, held
from tests import migration

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def executed(path: Path, *cells: nbformat.NotebookNode, error: str = "") -> Executed:
    """A notebook as the engine leaves it, made without a kernel."""
    cells = cells or (new_code_cell("1 + 1", outputs=[new_output("stream", text="2\n")], execution_count=1),)
    said = {"state": "completed"}
    if error:
        said = {"state": "failed", "cell": 0, "cell_id": cells[0]["id"], "error": error, "error_name": "NotEqual"}
    nbformat.write(new_notebook(cells=list(cells), metadata={"runbook": said}), path)
    return Executed(path, 1.25, 0 if error else None, error, "NotEqual" if error else "")


def make(runs: Path, table: str = "users", *, error: str = "") -> Run:
    run = Run.begin(
        runs, table, {"table": table, "database": "service=shop", "partitions": {"users_admins": ["admin"]}}, approved_by="Ann"
    )
    run.add(executed(run.start("00_plan.ipynb")))
    run.add(executed(run.start("03_restore.ipynb"), error=error))
    run.head = run.seal(plan_hash="abc123", server="PostgreSQL 18.4", database_user="dba", result="done")  # type: ignore[attr-defined]
    return run


# --- redaction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://ann:tr0ub4dor@db:5432/clinic", "postgresql://ann:***@db:5432/clinic"),
        ("postgresql+psycopg://ann:tr0/ub@4dor@db/clinic?sslmode=require", "postgresql+psycopg://ann:***@db/clinic?sslmode=require"),
        ("postgresql://ann@db/clinic", "postgresql://ann@db/clinic"),
        ("postgresql:///clinic?host=/run/a&password=tr0ub4dor&port=1", "postgresql:///clinic?host=/run/a&password=***&port=1"),
        ("https://ghp_tr0ub4dor@github.com/clinic", "https://***@github.com/clinic"),
        ("https://example.org/x?access_token=tr0ub4dor", "https://example.org/x?access_token=***"),
        ("host=db password=tr0ub4dor user=ann", "host=db password=*** user=ann"),
        ("host=db password = 'tr0 ub\\'4dor' user=ann", "host=db password = '***' user=ann"),
        ("PGPASSWORD=tr0ub4dor psql", "PGPASSWORD=*** psql"),
        ("POSTGRES_PASSWORD: \"tr0ub4dor\"", "POSTGRES_PASSWORD: \"***\""),
        ('{"password": "tr0\\"ub4dor", "x": 1}', '{"password": "***", "x": 1}'),
        ('"{\\"password\\": \\"tr0ub4dor\\", \\"x\\": 1}"', '"{\\"password\\": \\"***\\", \\"x\\": 1}"'),
        ("ALTER ROLE ann PASSWORD 'tr0''ub4dor' LOGIN", "ALTER ROLE ann PASSWORD '***' LOGIN"),
        ("SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:a2V5", "SCRAM-SHA-256$***"),
        ("md5" + "0123456789abcdef" * 2, "md5***"),
        ("Authorization: Bearer eyJhbGciOi.J9", "Authorization: Bearer ***"),
        # What a migration of a table with such a column has to show is no secret.
        ("UPDATE users SET password = s.password, role = 'user'", "UPDATE users SET password = s.password, role = 'user'"),
        ("password varchar(255) NOT NULL", "password varchar(255) NOT NULL"),
        ("127.0.0.1:5432, 12:30:05, id@host", "127.0.0.1:5432, 12:30:05, id@host"),
    ],
)  # fmt: skip
def test_a_secret_is_hidden_by_the_place_where_it_stands(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean


def test_a_known_secret_is_hidden_in_every_form_that_it_is_written_in() -> None:
    secret = "p@ss\"w\\ö'<x>&/"
    for form in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret),
                 "p%40ss%22w%5C%C3%B6%27%3Cx%3E%26%2F", "p@ss&quot;w\\ö&#x27;&lt;x&gt;&amp;/"):  # fmt: skip
        assert redact(f"it is {form}!", [secret]).strip("\"'") in ("it is ***!", 'it is "***"!', "it is '***'!")


def test_a_password_that_is_a_plain_word_takes_no_other_word_with_it() -> None:
    assert redact("user of users, role 'user'", ["user"]) == "*** of users, role '***'"
    assert redact("123 rows, password=123", ["123"]) == "123 rows, password=***"


def test_libpqs_password_and_service_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pass").write_text("# a comment:with:four:colons:here\ndb:*:*:ann:from\\:pass\\\\file\n")
    (tmp_path / "other").write_text("h\\:1:5432:clinic:ann:through-the-service\n")
    (tmp_path / "service").write_text(f"[clinic]\nhost=db\npassword=from-service\npassfile={tmp_path}/other\n")
    for name, value in {
        "PGPASSWORD": "from-environment", "PGPASSFILE": str(tmp_path / "pass"), "PGSERVICEFILE": str(tmp_path / "service"),
        "DATABASE_URL": "postgresql://ann:from%20url@db/clinic", "CI_JOB_TOKEN": "from-the-ci",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    known = {"from-environment", "from:pass\\file", "through-the-service", "from-service", "from url", "from-the-ci"}
    assert known <= set(known_secrets())
    assert not any("comment" in secret or secret == "here" for secret in known_secrets())


def test_no_file_of_a_record_holds_a_planted_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets come in by URL, environment, password file, service file, a server's message and a traceback."""
    secrets = {name: f"planted-{name}-s3cret" for name in ("url", "env", "passfile", "service", "given", "message")}
    (tmp_path / "pass").write_text(f"*:*:*:*:{secrets['passfile']}\n")
    (tmp_path / "service").write_text(f"[clinic]\npassword={secrets['service']}\n")
    monkeypatch.setenv("PGPASSWORD", secrets["env"])
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pass"))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "service"))
    verifier = "SCRAM-SHA-256$4096:c2FsdHNhbHQ=$cGxhbnRlZA==:cGxhbnRlZGtleQ=="
    code = f"""
import os, sys, json
files = [open(os.environ[name]).read() for name in ("PGPASSFILE", "PGSERVICEFILE")]
parts = {{**os.environ, "url": database, "files": files}}
print(json.dumps(parts)); print(parts, file=sys.stderr)
from IPython.display import HTML, JSON
display(HTML("<b>" + database + "</b>"), JSON(parts))
given = {secrets["given"]!r}
def connect(password):
    raise RuntimeError(f"ALTER ROLE ann PASSWORD '{secrets["message"]}'; {verifier} {{password}} " + database)
connect(given)
"""
    cells = [new_code_cell("database = ''"), new_code_cell(code)]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "a.ipynb")
    parameters = {"database": f"postgresql://ann:{secrets['url']}@db/clinic"}
    run = Run.begin(tmp_path / "runs", "users", parameters, secrets=[secrets["given"]])
    result = execute(tmp_path / "a.ipynb", run.start("00_plan.ipynb"), parameters, secrets=[secrets["given"]])
    run.add(result)
    run.seal(server=f"PostgreSQL at {parameters['database']}", result=result.error)

    assert result.error_name == "RuntimeError"
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"00_plan.ipynb", "00_plan.html", "manifest.json", "index.html", "HEAD"}
    for text in (result.error, *(file.read_text() for file in files)):
        assert "s3cret" not in text
        assert "cGxhbnRlZ" not in text
    assert "postgresql://ann:***@db/clinic" in (run.folder / "00_plan.html").read_text()


# --- the run's folder and manifest ---------------------------------------------------------------------------------


def test_the_manifest_says_who_did_what_with_what_and_how_it_ended(tmp_path: Path) -> None:
    run = make(tmp_path / "runs", error="users and its copy differ in 3 rows.")
    said = json.loads((run.folder / "manifest.json").read_text())
    assert (said["table"], said["state"], said["sealed"], said["approved_by"]) == ("users", "failed", True, "Ann")
    assert said["parameters"]["partitions"] == {"users_admins": ["admin"]}
    assert (said["plan_hash"], said["server"], said["result"]) == ("abc123", "PostgreSQL 18.4", "done")
    assert said["database_user"] == "dba" and said["operator"] and said["host"]
    assert said["versions"]["python"] == sys.version.split()[0] and said["versions"]["papermill"]
    assert set(said["git"]["runbook"]) == {"revision", "clean"}
    assert [(step["notebook"], step["state"], step["seconds"], step["error"]) for step in said["steps"]] == [
        ("00_plan.ipynb", "completed", 1.25, ""),
        ("03_restore.ipynb", "failed", 1.25, "users and its copy differ in 3 rows."),
    ]
    assert sorted(said["files"]) == ["00_plan.html", "00_plan.ipynb", "03_restore.html", "03_restore.ipynb"]
    assert said["begun"].endswith("+00:00") and said["begun"] <= said["ended"]


@pytest.mark.parametrize(
    ("table", "name"),
    [("users", "users"), ("clinic.users", "clinic.users"), ("../../etc/passwd", "etc_passwd"), ("Küche 🍳", "Kuche"),
     ("🍳", "table"), ("a" * 300, "a" * 60), ("..", "table")],
)  # fmt: skip
def test_any_table_has_a_folder_of_its_own_under_runs(tmp_path: Path, table: str, name: str) -> None:
    folders = [Run.begin(tmp_path / "runs", table, {}).folder for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.parent == tmp_path / "runs"
        assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-{re.escape(name)}(-\d)?", folder.name)
        assert json.loads((folder / "manifest.json").read_text())["table"] == table


def test_a_git_checkout_is_named_with_its_revision_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Run.begin(tmp_path / "runs", "users", {}).manifest["git"]["working_folder"] == {"revision": "", "clean": None}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "users.yaml").write_text("table: users")
    for words in (["init", "-q"], ["add", "users.yaml"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    said = Run.begin(tmp_path / "runs", "users", {}).manifest["git"]["working_folder"]
    assert len(said["revision"]) == 40 and said["clean"] is True
    (tmp_path / "users.yaml").write_text("table: others")
    assert Run.begin(tmp_path / "runs", "users", {}).manifest["git"]["working_folder"]["clean"] is False


def test_a_line_break_in_a_name_is_no_alarm(tmp_path: Path) -> None:
    make(tmp_path / "runs", "a\rb\r\nc")
    assert audit(tmp_path / "runs") == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, texts, seen = tmp_path / "x", ["a" * 300_000, "b" * 300_000], set()
    write_whole(path, texts[0])
    writer = threading.Thread(target=lambda: [write_whole(path, texts[i % 2]) for i in range(60)])
    writer.start()
    while writer.is_alive():
        seen.add(path.read_text())
    assert seen <= set(texts)
    assert os.listdir(tmp_path) == ["x"]


# --- the audit -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    runs = tmp_path_factory.mktemp("three") / "runs"
    made = [make(runs), make(runs, "orders", error="it failed"), make(runs)]
    return runs, made


@pytest.fixture
def record(three: tuple[Path, list[Run]], tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A copy of a record of three runs: its folder, the runs' names, the ledger's heads."""
    runs = shutil.copytree(three[0], tmp_path / "runs")
    return runs, [run.folder.name for run in three[1]], [run.head for run in three[1]]  # type: ignore[attr-defined]


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_an_untouched_record_has_nothing_to_say_against_it(record: tuple[Path, list[str], list[str]]) -> None:
    runs, _, heads = record
    index(runs)
    assert audit(runs, heads) == []
    assert audit(runs.parent / "nothing") == [f"{runs.parent / 'nothing'} does not exist."]
    checked = subprocess.run(["sha256sum", "-c", "HEAD"], cwd=runs, capture_output=True, text=True)
    assert checked.returncode == 0


UNREADABLE = ["{1}/manifest.json was changed: it cannot be read."]


def twist(folder: Path, **said: object) -> None:
    """A manifest that JSON can read and nobody can use."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def leave(runs: Path, *names: str) -> None:
    """What a run that was killed before it had a manifest leaves, and what it does not."""
    (runs / ".begun.part").mkdir()
    for name in names:
        (runs / ".begun.part" / name).write_text("x")


def list_other(runs: Path, old: str, new: str) -> None:
    """The list of the runs says another thing, and HEAD vouches for it."""
    page, head = runs / "index.html", runs / "HEAD"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new))
    head.write_text(head.read_text().splitlines()[0] + f"\n{sha256(page)}  index.html\n")


def drop(which: int) -> Callable[[Path, list[str]], None]:
    return lambda runs, names: shutil.rmtree(runs / names[which])


def swap(runs: Path, names: list[str]) -> None:
    (runs / names[0]).rename(runs / "x")
    (runs / names[1]).rename(runs / names[0])
    (runs / "x").rename(runs / names[1])


def cut(runs: Path, names: list[str]) -> None:
    """The last run goes, and HEAD names the one before it, and the list that is there."""
    shutil.rmtree(runs / names[2])
    before = f"{sha256(runs / names[1] / 'manifest.json')}  {names[1]}/manifest.json"
    (runs / "HEAD").write_text(f"{before}\n{(runs / 'HEAD').read_text().splitlines()[1]}\n")


def forge(runs: Path, names: list[str]) -> None:
    """A failed run becomes a good one, its files' sums set right."""
    path = runs / names[1] / "manifest.json"
    path.write_text(path.read_text().replace('"failed"', '"completed"'))


def shorten(runs: Path) -> None:
    """A list of runs of one's own, which HEAD does not name any more."""
    (runs / "index.html").write_text("all fine")
    (runs / "HEAD").write_text((runs / "HEAD").read_text().splitlines(keepends=True)[0])


def smuggle(runs: Path, names: list[str]) -> None:
    """A whole run that claims to follow the first."""
    shutil.copytree(runs / names[1], runs / "20200101T000000Z-more")
    path = runs / "20200101T000000Z-more" / "manifest.json"
    path.write_text(path.read_text().replace(names[1], "20200101T000000Z-more"))


@pytest.mark.parametrize(
    ("tamper", "sentences"),
    [
        (lambda runs, names: flip(runs / names[0] / "00_plan.ipynb"), ["{0}/00_plan.ipynb was changed."]),
        (lambda runs, names: flip(runs / names[2] / "03_restore.html", -20), ["{2}/03_restore.html was changed."]),
        (lambda runs, names: (runs / names[1] / "00_plan.html").unlink(), ["{1}/00_plan.html was removed."]),
        (lambda runs, names: (runs / names[1] / "more.txt").write_text("x"), ["{1}/more.txt was added."]),
        (lambda runs, names: (runs / "more.txt").write_text("x"), ["more.txt belongs to no run: it was added."]),
        (lambda runs, names: (runs / "more").mkdir(), ["more has no manifest.json: it was removed, or the folder was added."]),
        (drop(0), ["{0} is missing: it was removed, though {1} names it."]),
        (drop(1), ["{1} is missing: it was removed, though {2} names it."]),
        (drop(2), ["{2} is missing: it was removed, though HEAD names it."]),
        (cut, ["index.html lists {2}, which has no manifest here: it was removed."]),
        (lambda runs, names: link(runs / names[1], runs.parent / "elsewhere"), ["{1} was replaced by a link."]),
        (lambda runs, names: link(runs / names[2] / "manifest.json", runs.parent / "elsewhere"), ["{2}/manifest.json was replaced by a link."]),
        (forge, ["{1}/manifest.json was changed: it is not the one that {2} names."]),
        (smuggle, ["20200101T000000Z-more is not in the chain that ends in HEAD: it was added, or runs were re-ordered."]),
        (swap, ["{0} holds the record of {1}: it was renamed, or exchanged with another.",
                "{1} holds the record of {0}: it was renamed, or exchanged with another."]),
        (lambda runs, names: (runs / "HEAD").unlink(), ["HEAD, which names the last run, is missing or cannot be read."]),
        (lambda runs, names: (runs / "index.html").write_text("all fine"), ["index.html was changed: it is not the one that HEAD names."]),
        (lambda runs, names: shorten(runs), ["HEAD, which names the last run, is missing or cannot be read."]),
        (lambda runs, names: list_other(runs, ">orders</td>", ">others</td>"), ["index.html says another thing of {1} than its manifest: it was changed, and HEAD with it."]),
        (lambda runs, names: list_other(runs, ">2.5 s<", ">0.1 s<"), [f"index.html says another thing of {{{run}}} than its manifest: it was changed, and HEAD with it." for run in range(3)]),
        (lambda runs, names: list_other(runs, f"{names[2]}/00_plan.html", "https://example.org/00_plan.html"), ["index.html says another thing of {2} than its manifest: it was changed, and HEAD with it."]),
        (lambda runs, names: list_other(runs, "</table>", "</table><p>All fine.</p>"), ["index.html says more than the manifests do: it was changed, and HEAD with it."]),
        (lambda runs, names: (runs / "index.html").unlink(), ["index.html was removed: it is not the one that HEAD names."]),
        (lambda runs, names: link(runs / names[1] / "00_plan.html", runs.parent / "elsewhere.html"), ["{1}/00_plan.html was replaced by a link."]),
        (lambda runs, names: (runs / names[1] / "more").symlink_to("/tmp"), ["{1}/more was added."]),
        (lambda runs, names: (runs / names[1] / "more").mkdir(), ["{1}/more was added."]),
        (lambda runs, names: (runs / "HEAD").write_bytes(b"\xff\xfe"), ["HEAD, which names the last run, is missing or cannot be read."]),
        (lambda runs, names: twist(runs / names[1], files=[]), UNREADABLE), (lambda runs, names: twist(runs / names[1], steps=[1]), UNREADABLE),
        (lambda runs, names: twist(runs / names[1], previous="x"), UNREADABLE), (lambda runs, names: twist(runs / names[1], broken_off=[1]), UNREADABLE),
        (lambda runs, names: (runs / names[1] / "manifest.json").write_text("[]"), UNREADABLE),
        (lambda runs, names: link(runs / "HEAD", runs.parent / "elsewhere"), ["HEAD was replaced by a link."]),
        (lambda runs, names: link(runs / "index.html", runs.parent / "elsewhere"), ["index.html was replaced by a link."]),
        (lambda runs, names: leave(runs, "certificate.html", "manifest.json", ".manifest.json.part"), [".begun.part/certificate.html was added."]),
        (lambda runs, names: (runs / ".HEAD.part").mkdir(), [".HEAD.part was added."]),
        (lambda runs, names: (runs / ".HEAD.part").write_text("x"), []),
        (lambda runs, names: ((runs / names[1] / "manifest.json").unlink(), (runs / names[1] / "manifest.json").mkdir()), UNREADABLE),
        (lambda runs, names: (runs / names[1] / "manifest.json").write_text("{"),
         ["{1}/manifest.json was changed: it cannot be read."]),
    ],
)  # fmt: skip
def test_the_audit_names_what_was_changed_removed_added_or_reordered(
    record: tuple[Path, list[str], list[str]], tamper: Callable[[Path, list[str]], None], sentences: list[str]
) -> None:
    runs, names, _ = record
    tamper(runs, names)
    assert sorted(audit(runs)) == sorted(sentence.format(*names) for sentence in sentences)


def test_the_list_of_the_runs_is_held_to_the_manifests_without_head_too(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = make(runs)
    (runs / "HEAD").unlink()  # as after a kill between the two
    gone = "HEAD was removed, though the ledger names a run that wrote it."
    assert audit(runs) == [] and audit(runs, [run.head]) == [gone]  # type: ignore[attr-defined]
    page = runs / "index.html"
    page.write_text(page.read_text().replace("2.5 s", "0.1 s"))
    assert audit(runs) == [f"index.html says another thing of {run.folder.name} than its manifest: it was changed."]
    page.unlink()
    assert audit(runs) == []
    second = make(runs)  # goes on from the first, though nothing names that
    assert second.manifest["previous"]["run"] == run.folder.name and audit(runs) == []


def test_the_list_of_the_runs_may_lack_the_end_of_a_run_only_if_the_ledger_does(
    record: tuple[Path, list[str], list[str]],
) -> None:
    """HEAD names the run before the last, as a kill would leave it, and the list shows the last one at work."""
    runs, names, heads = record
    page, row = runs / "index.html", f'href="{names[2]}/manifest.json"'
    lines = [line.replace("failed", "running") if row in line else line for line in page.read_text().splitlines(keepends=True)]
    page.write_text("".join(lines))
    (runs / "HEAD").write_text(f"{heads[1]}  {names[1]}/manifest.json\n{sha256(page)}  index.html\n")
    assert audit(runs) == []
    changed = f"index.html says another thing of {names[2]} than its manifest: it was changed, and HEAD with it."
    assert audit(runs, heads) == [changed]
    page.write_text(page.read_text().replace(f"{names[2]}/03_restore.html", "https://example.org/03_restore.html"))
    assert audit(runs) == [changed]


def test_the_ledger_vouches_for_the_last_run_even_if_the_chain_was_made_anew(
    record: tuple[Path, list[str], list[str]],
) -> None:
    runs, names, heads = record
    shutil.rmtree(runs / names[2])
    (runs / "HEAD").write_text(f"{heads[1]}  {names[1]}/manifest.json\n{sha256(index(runs))}  index.html\n")
    assert audit(runs) == []
    assert audit(runs, heads) == [f"No run here has the manifest {heads[2]}, which the ledger names."]


def test_a_completed_run_that_follows_the_last_one_is_of_the_ledger_or_is_named(
    record: tuple[Path, list[str], list[str]],
) -> None:
    """Whoever can write there can make a run that the chain takes for one; the ledger knows of none."""
    runs, _, heads = record
    run = Run.begin(runs, "users", {})
    run.add(executed(run.start("06_verify.ipynb")))
    head = run.seal(plan_hash="f" * 64, result="completed")
    assert audit(runs) == audit(runs, [*heads, head], ["f" * 64]) == audit(runs, heads, ["e" * 64]) == []
    assert audit(runs, heads, ["f" * 64], [run.folder.name]) == []
    assert audit(runs, heads, ["f" * 64]) == [
        f"{run.folder.name} completed by a plan of the ledger, which does not name it: it was added, or altered with all that names it; or the database was restored to before it."
    ]


def test_a_run_that_was_killed_between_its_seal_and_the_ledger_is_no_alarm(
    clinic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, seal, plan = tmp_path / "runs", Run.seal, migration.plan(clinic).plan.hash

    def killed(self: Run, **facts: Any) -> str:
        seal(self, **facts)
        raise KeyboardInterrupt

    for broken in (False, True):
        run = Run.begin(runs, "users", {})
        run.add(executed(run.start("00_plan.ipynb")))
        if broken:
            monkeypatch.setattr(Run, "seal", killed)
        with suppress(KeyboardInterrupt):
            execution.seal(run, clinic, "users", "completed")
    monkeypatch.undo()
    done = CliRunner().invoke(cli.main, ["audit", str(runs), "--database", clinic])
    assert (done.exit_code, done.output) == (0, f"{runs} is as it was recorded.\n")
    forged = Run.begin(runs, "users", {})
    forged.add(executed(forged.start("00_plan.ipynb")))
    forged.seal(plan_hash=plan, result="completed")
    done = CliRunner().invoke(cli.main, ["audit", str(runs), "--database", clinic])
    assert (done.exit_code, done.output.partition(" ")[0]) == (1, forged.folder.name)


def test_a_run_that_broke_off_is_true_and_the_next_run_vouches_for_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = make(runs)
    call = (
        "import os, sys; from pathlib import Path; from runbook.archive import Run\n"
        "run = Run.begin(Path(sys.argv[1]), 'users', {}); run.start('00_plan.ipynb').write_text('{}')\n"
        "for name in ('evidence.json', '.certificate.html.part'): (run.folder / name).write_text('')  # while it is being sealed\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", call, str(runs)], check=False)
    (broken,) = (folder for folder in runs.iterdir() if folder.is_dir() and folder != first.folder)
    said = json.loads((broken / "manifest.json").read_text())
    assert (said["state"], said["sealed"], said["steps"][0]["state"]) == ("running", False, "running")
    assert audit(runs) == []

    working, after = Run.begin(runs, "orders", {}), make(runs)  # one is at work while another begins and ends
    assert [entry["run"] for entry in working.manifest["broken_off"]] == [broken.name]
    assert after.manifest["broken_off"] == []
    assert audit(runs) == []
    assert "broken off" in index(runs).read_text()
    working.add(executed(working.start("00_plan.ipynb")))
    working.seal()
    assert working.manifest["previous"]["run"] == after.folder.name
    assert audit(runs) == []
    (broken / "evidence.json").write_text("all fine")
    (broken / "00_plan.ipynb").unlink()
    (broken / "promises.xml").write_text("all fine")
    assert audit(runs) == [
        f"{broken.name}/00_plan.ipynb was removed, though {working.folder.name} found it there.",
        f"{broken.name}/evidence.json was changed since {working.folder.name} found the run broken off.",
        f"{broken.name}/promises.xml was added since {working.folder.name} found the run broken off.",
    ]
    shutil.rmtree(broken)
    assert audit(runs) == [f"{broken.name} is missing: it was removed, though {working.folder.name} names it."]


# --- the pages -----------------------------------------------------------------------------------------------------


def loads(page: str) -> list[str]:
    """Whatever a browser would fetch by itself."""
    found = re.findall(r"""<(?!a\s)[a-z][^>]*?\s(?:src|srcset|href|data|poster|action)\s*=\s*["']?([^"'\s>]+)""", page, re.I)
    found += re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+(\S+)""", page, re.I)
    return [str(target) for target in found if not str(target).startswith(("data:", "('data:", "#"))]


def test_a_page_opens_without_network_or_scripts_and_with_its_pictures(tmp_path: Path) -> None:
    evil = (
        "<script>alert(1)</script><script src='https://cdn.example/x.js'></script>"
        "<img src='https://example.org/a.png' alt='a chart'>"
        "<link rel=stylesheet href='https://example.org/a.css'><iframe src='https://example.org'></iframe>"
        "<b onclick='x()' style='background:url(https://example.org/b.png)'>kept</b>"
        "<style>@import 'https://example.org/c.css'; p {color: red}</style>"
        "<a href='javascript:x()'>no</a><svg><image href='https://example.org/d.png'/></svg>"
    )
    cells = [
        new_markdown_cell(
            "# Restore\n[02](02_partition.ipynb) [05](./05_cutover.ipynb#swap) $x^2$\n"
            "[docs](https://www.postgresql.org/docs) ![gone](https://example.org/e.png)"
        ),
        new_code_cell("chart()", execution_count=1, outputs=[
            new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}),
            new_output("display_data", {"text/html": evil, "text/plain": "x"}),
            new_output("stream", text="1,000 rows < 2,000 & done\n")]),
    ]  # fmt: skip
    page = render_html(executed(tmp_path / "03_restore.ipynb", *cells).notebook)
    text = page.read_text()
    assert page.name == "03_restore.html"
    assert "<script" not in text and "onclick" not in text and "javascript:" not in text
    assert loads(text) == []
    assert f"data:image/png;base64,{PIXEL}" in text
    assert 'href="02_partition.html"' in text and 'href="./05_cutover.html#swap"' in text
    assert 'href="https://www.postgresql.org/docs"' in text and ".ipynb" not in text
    assert "1,000 rows &lt; 2,000 &amp; done" in text and "chart" in text and "kept" in text and "p {color: red}" in text
    assert 'alt="a chart"' in text
    assert len(text) < 1_000_000


def test_the_page_of_a_failed_notebook_begins_with_the_sentence_and_leads_to_the_cell(tmp_path: Path) -> None:
    cell = new_code_cell("restore.compare(run)", execution_count=1)
    text = render_html(executed(tmp_path / "a.ipynb", cell, error="users <and> its copy differ.").notebook).read_text()
    banner = text.index("Failed: users &lt;and&gt; its copy differ.")
    assert banner < text.index("restore")
    assert f'href="#cell-id={cell.id}"' in text and f'id="cell-id={cell.id}"' in text


def test_the_title_of_a_page_names_the_table_and_the_runs_time(tmp_path: Path) -> None:
    alone = render_html(executed(tmp_path / "00_plan.ipynb", new_markdown_cell("# Plan")).notebook)
    assert "<title>00_plan</title>" in alone.read_text()
    kept = make(tmp_path / "runs", "<orders>")
    begun = kept.manifest["begun"][:19].replace("T", " ")
    assert f"<title>00_plan: &lt;orders&gt;, {begun} UTC</title>" in kept.folder.joinpath("00_plan.html").read_text()


def test_a_page_leads_to_the_list_of_the_runs_and_to_the_certificate_where_there_is_one(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "runs", "users", {})
    page = run.start("00_plan.ipynb").with_suffix(".html")
    run.add(executed(page.with_suffix(".ipynb")))
    assert '<nav><a href="../index.html">All runs</a><a href="certificate.html">' in page.read_text()
    run.seal()
    assert '<nav><a href="../index.html">All runs</a><a>' in page.read_text()
    assert "<main>" in page.read_text() and "<main>" in (tmp_path / "runs" / "index.html").read_text()
    assert audit(tmp_path / "runs") == []


def test_the_index_lists_every_run_with_what_failed_first(tmp_path: Path) -> None:
    good, bad = make(tmp_path / "runs"), make(tmp_path / "runs", "<orders>", error="orders has 3 rows & more")
    text = index(tmp_path / "runs").read_text()
    assert "<script" not in text and loads(text) == [] and 'name="viewport"' in text
    assert text.index(bad.folder.name) < text.index(good.folder.name)
    for piece in (
        "&lt;orders&gt;",
        "03_restore: orders has 3 rows &amp; more",
        "as dba on",
        'data-is="Database">service=shop<',
        "abc123, approved by Ann",
        "2.5 s",
        "completed",
        "failed",
    ):
        assert piece in text
    for link in re.findall(r'href="([^"]+)"', text):
        assert (tmp_path / "runs" / link).is_file()


@pytest.mark.long
def test_a_record_that_a_kill_cut_off_anywhere_is_no_alarm(tmp_path: Path) -> None:
    def write(runs: Path, last: int) -> bool:
        """In a process of its own, which is killed at the `last` write; whether it came to the end."""
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0
        count = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                nonlocal count
                count += 1
                if count == last:
                    os.kill(os.getpid(), 9)
                return real(*args)

            return call

        try:
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            run = Run.begin(runs, "users", {"table": "users"})
            path = run.start("00_plan.ipynb")
            path.with_suffix(".html").write_text('<a href="01_backup.html">on</a>')  # to which this run does not come
            run.add(executed(path), rendered=True)
            run.seal(result="completed")
            os._exit(0)
        finally:
            os._exit(1)

    for last in range(1, 100):
        runs = tmp_path / str(last)
        assert write(runs, 0)
        ended = write(runs, last)
        assert audit(runs) == [], f"killed at write {last}"
        assert write(runs, 0)
        assert audit(runs) == [], f"killed at write {last}, and run again"
        if ended:
            break
    assert last > 5


def test_a_signal_waits_until_the_record_is_sealed(tmp_path: Path) -> None:
    """SIGTERM and SIGINT, while it is being done."""
    for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        with pytest.raises(error), ended_by_signals():
            run = Run.begin(tmp_path / "runs", "users", {"table": "users"})
            with held():
                os.kill(os.getpid(), number)
                run.seal(result="completed")
        assert run.manifest["sealed"]
    assert audit(tmp_path / "runs") == []


def test_a_run_that_was_stopped_between_two_notebooks_is_not_completed(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "runs", "users", {"table": "users"})
    run.add(executed(run.start("00_plan.ipynb")))
    run.seal(result="01_backup was stopped before its first cell.")
    assert run.manifest["state"] == "failed"


def test_what_failed_by_hand_before_it_went_well_stays_in_the_manifest(tmp_path: Path) -> None:
    run = Run.begin(tmp_path, "users", {}, by_hand=True)
    times = [f"2026-01-01T10:0{minute}:00.000+00:00" for minute in range(3)]
    for at, error in ((times[0], "no approval"), (times[0], "no approval"), (times[1], "locked"), (times[2], "")):
        path = run.start("05_cutover.ipynb", at)
        path.write_text("{}")
        run.add(Executed(path, 1.0, 3 if error else None, error, "Refused" if error else ""), rendered=True)
    run.seal()
    (step,) = json.loads((run.folder / "manifest.json").read_text())["steps"]
    assert (step["begun"], step["state"], step["error"]) == (times[2], "completed", "")
    assert [each["error"] for each in step["earlier"]] == ["no approval", "locked"]
