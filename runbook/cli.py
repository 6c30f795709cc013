"""The command line: thin ways to execute notebooks, and to read what they left."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pandas as pd
from psycopg import sql
from tqdm import tqdm

from runbook import __version__, archive, embedded, ledger, parameters
from runbook.database import target
from runbook.draft import draft
from runbook.engine import Executed, execute
from runbook.errors import BadInput, RunbookError
from runbook.parameters import Parameters
from runbook.redaction import known_secrets, redact
from runbook.statements import folder

FORWARD = ("00_plan", "01_backup", "02_partition", "03_restore", "04_foreign_keys", "05_cutover", "06_verify")
STEPS = {name: name for name in FORWARD} | {name[:2]: name for name in FORWARD} | {name[3:]: name for name in FORWARD}


class Sentence(click.Group):
    """Errors of ours are one sentence and exit code 1, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RunbookError as error:
            raise click.ClickException(redact(str(error), known_secrets())) from None


@click.group(cls=Sentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn a live PostgreSQL table into a partitioned one, notebook by notebook, without losing a write.

    \b
    runbook run                                   the example, on a server of its own
    runbook run -f orders.yaml --to plan          look at a plan; nothing is changed
    runbook run -f orders.yaml -p approved_by ann the whole migration
    runbook lab -f orders.yaml                    the same by hand, in JupyterLab
    runbook rollback -f orders.yaml               the way back, from any step

    Exit codes: 0 done, 1 refused or failed (the reason is printed), 2 wrong usage, 130 interrupted.
    """


def which_table(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which database, which table and how."""
    for option in (
        click.option("--users", type=click.IntRange(min=0), help="The embedded example only: load it with so many users."),
        click.option(
            "--database", help='"embedded", postgresql://user@host/db, service=name, or "environment" for PG* variables.'
        ),
        click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="One parameter; may be repeated."),
        click.option("-f", "file", type=click.Path(path_type=Path, dir_okay=False), help="A YAML file of parameters."),
    ):
        command = option(command)
    return command


into = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Where the record goes.",
)


def gather(file: Path | None, pairs: tuple[tuple[str, str], ...], database: str | None, users: int | None) -> dict[str, Any]:
    """The parameters of a command, checked; the clinic's file only on the embedded server and only without another table."""
    given = parameters.from_file(file) if file else {}
    given |= parameters.from_command_line(list(pairs))
    if database is not None:
        given["database"] = database
    if users is not None:
        given["users"] = users
    checked = parameters.check(given)
    if not checked.table:
        if checked.database != "embedded":
            raise BadInput(
                f"No table is named for {checked.database}: say which with -f FILE, or with -p table NAME -p key COLUMN."
            )
        given = {**parameters.clinic(), **given}
    if checked.users is not None and checked.database != "embedded":
        raise BadInput("users loads the embedded example, and cannot change another database: leave it out.")
    parameters.check(given)
    return given


@main.command()
@which_table
@click.option("--from", "first", type=click.Choice(list(STEPS)), default="00_plan", help="Begin with this step.")
@click.option("--to", "last", type=click.Choice(list(STEPS)), default="06_verify", help="End with this step.")
@into
@click.option("--reset", is_flag=True, help="Begin the embedded example afresh; no other database can be reset.")
def run(
    file: Path | None, pairs: Any, database: str | None, users: int | None, first: str, last: str, out: Path, reset: bool
) -> None:
    """Execute the notebooks in order, each in a fresh kernel, and keep the record.

    Without -f and -p it runs the example: a clinic's users by role, on a server of its own.
    """
    given = gather(file, pairs, database, users)
    if reset:
        if given.get("database", "embedded") != "embedded":
            raise BadInput(
                f"--reset begins the embedded example afresh; {given['database']} is not the embedded server, and is left alone."
            )
        embedded.reset()
    names = FORWARD[FORWARD.index(STEPS[first]) : FORWARD.index(STEPS[last]) + 1]
    if not names:
        raise click.UsageError(f"--from {first} comes after --to {last}.")
    perform(names, given, out)


def perform(names: tuple[str, ...], given: dict[str, Any], out: Path) -> None:
    """Execute notebooks into a new folder under `out`; the record is sealed whatever happens."""
    if out.resolve() == folder("notebooks").resolve() or folder("notebooks").resolve() in out.resolve().parents:
        raise BadInput(f"{out} lies inside the notebooks' own folder: choose another with --out.")
    table, where = str(given["table"]), str(given.get("database", "embedded"))
    record = archive.Run.begin(out, table, given, approved_by=str(given.get("approved_by", "")))
    lines, failed = [], None
    bar = tqdm(total=len(names), unit="step", disable=not sys.stderr.isatty(), leave=False)
    for name in names:
        bar.set_description(name)
        notebook = record.start(f"{name}.ipynb")

        def progress(text: str) -> None:
            bar.set_postfix_str(text.replace("\r", "\n").strip().rsplit("\n", 1)[-1][:60])

        done = execute(folder("notebooks") / f"{name}.ipynb", notebook, _own(name, given), on_output=progress)
        record.add(done)
        bar.update()
        lines.append(_line(name, done, where, table))
        with bar.external_write_mode(file=sys.stdout):
            click.echo("{step:<16} {state:<7} {rows:>12} rows {seconds:>8.1f} s".format(**lines[-1]))
        if done.error or done.failed_cell is not None:
            failed = done
            break
    bar.close()
    head = _seal(record, where, table, failed)
    if failed is None:
        click.echo()
        click.echo(pd.DataFrame(lines).to_string(index=False))
    click.echo(f"\nRecord: {record.folder}")
    if failed is not None:
        click.echo(
            f"{failed.notebook.stem} stopped at cell {failed.failed_cell}: {failed.error}\nRun the same command again to go on, or `runbook rollback`.",
            err=True,
        )
    click.echo(f"Head:   {head}")
    if failed is not None:
        sys.exit(130 if failed.error_name == "KeyboardInterrupt" else 1)


def _own(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters that this notebook has."""
    cells = json.loads((folder("notebooks") / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    known = {
        node.targets[0].id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {key: value for key, value in given.items() if key in known}


def _line(name: str, done: Executed, where: str, table: str) -> dict[str, Any]:
    rows = 0
    if not done.error:
        history = _history(where, table)
        step = next(step for step, notebook in ledger.NOTEBOOKS.items() if notebook == name)
        mine = history[(history.step == step) & (history.state == "done")] if len(history) else history
        rows = int(mine["rows"].fillna(0).max()) if len(mine) else 0
    state = "failed" if done.error or done.failed_cell is not None else "done"
    return {"step": name, "state": state, "rows": f"{rows:,}", "seconds": round(done.seconds, 1)}


def _history(where: str, table: str) -> pd.DataFrame:
    try:
        found = ledger.of(target(where), table, ended=True)
    except RunbookError:
        return pd.DataFrame()
    return found.database.frame("ledger.history", migration=found.migration)


def _seal(record: archive.Run, where: str, table: str, failed: Executed | None) -> str:
    """Seal the record, and write its head into the ledger where there is one: archive and database vouch for each other."""
    found, server, user = None, "", ""
    try:
        database = target(where)
        with database.session("record") as session:
            server = session.value(sql.SQL("SELECT version()").format())
            user = session.value(sql.SQL("SELECT current_user").format())
        found = ledger.of(database, table, ended=True)
    except RunbookError:
        pass
    head = record.seal(
        plan_hash=found.plan.hash if found else "",
        server=server,
        database_user=user,
        result=failed.error if failed else "completed",
    )
    if found:
        with found.database.session("record") as session:
            session.run(
                "ledger.insert_record",
                migration=found.migration,
                folder=record.folder.name,
                head=head,
            )
    return head


@main.command()
@which_table
@into
def rollback(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path) -> None:
    """The way back from any step, without losing a write (notebook 90)."""
    perform(("90_rollback",), gather(file, pairs, database, users), out)


@main.command()
@which_table
@into
def finish(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path) -> None:
    """End the way back: drop the log and the retired table (notebook 91)."""
    perform(("91_finish",), gather(file, pairs, database, users), out)


@main.command()
@which_table
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(file: Path | None, pairs: Any, database: str | None, users: int | None, as_json: bool) -> None:
    """Which step each table is at, from the ledger."""
    given = {**(parameters.from_file(file) if file else {}), **parameters.from_command_line(list(pairs))}
    checked = Parameters.model_validate(given | ({"database": database} if database else {}))
    found = target(checked.database, users)
    with found.session("status") as session:
        rows = session.rows("ledger.overview") if session.value("ledger.exists") else []
    for row in rows:
        row["step"] = ledger.NOTEBOOKS.get(row["step"], row["step"])
    if as_json:
        click.echo(json.dumps(rows, default=str, indent=1, ensure_ascii=False))
        return
    if not rows:
        click.echo(f"No migration has been planned on {found.name}.")
    for row in rows:
        click.echo(
            f"{row['table']}: {row['state']}, at {row['step']} ({row['action']} {row['action_state']}). {row['sentence'] or ''}".strip()
        )


@main.command("sql")
@which_table
def print_sql(file: Path | None, pairs: Any, database: str | None, users: int | None) -> None:
    """Print the plan's whole migration as one script; on a quiet copy `runbook sql | psql` ends where the notebooks end."""
    from runbook import script

    given = gather(file, pairs, database, users)
    made = draft(**given)
    with made.database.session("sql") as session:
        number = session.value("ledger.last_id") if session.value("ledger.exists") else None
    planned = (
        ledger.of(made.database, made.plan.full_name) if made.already else ledger.Run(made.database, (number or 0) + 1, made.plan)
    )
    for finding in planned.plan.blockers:
        click.echo(f"-- BLOCKER: {finding.sentence} {finding.way_out}")
    click.echo(
        f"-- Plan {planned.plan.hash} of {planned.plan.full_name}, by the runbook {__version__}.\n{script.whole(planned)!r}"
    )


@main.command()
@which_table
@into
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def lab(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path, no_browser: bool) -> None:
    """Open the notebooks in JupyterLab, in a new folder under --out, with the parameters filled in."""
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook

    given = gather(file, pairs, database, users)
    desk = out / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-lab"
    shutil.copytree(folder("notebooks"), desk)
    if file or pairs or database or users is not None:
        for path in desk.glob("*.ipynb"):
            write_ipynb(parameterize_notebook(load_notebook_node(str(path)), _own(path.stem, given)), str(path))
    click.echo(f"The notebooks are in {desk}.")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={desk.resolve()}",
        "--LabApp.default_url=/lab/tree/00_plan.ipynb",
    ]
    if os.name == "posix" and os.geteuid() == 0:
        command.append("--allow-root")
    os.execv(sys.executable, [*command, *(["--no-browser"] if no_browser else [])])


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path("runs"))
@click.option("--database", help="Compare with the heads in this database's ledger, too.")
def audit(runs: Path, database: str | None) -> None:
    """Compute every hash of the record again, and name what was changed, removed, added or re-ordered."""
    heads: list[str] = []
    if database:
        with target(database).session("audit") as session:
            heads = [row["head"] for row in session.rows("ledger.heads")]
    said = archive.audit(runs, heads)
    for sentence in said:
        click.echo(sentence)
    if said:
        sys.exit(1)
    click.echo(f"{runs} is as it was recorded.")


@main.command()
def stop() -> None:
    """Stop the embedded server; its data stays."""
    click.echo("The embedded server has stopped." if embedded.stop() else "The embedded server was not running.")
