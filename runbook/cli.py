"""The command line: thin ways to execute notebooks, and to read what they left."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import click
from psycopg.conninfo import conninfo_to_dict

from runbook import __version__, archive, embedded, imports, ledger, parameters, rehearsal
from runbook.audit import audit as audited
from runbook.audit import vouched_for
from runbook.database import target
from runbook.errors import BadInput, RunbookError
from runbook.execution import FORWARD, begin, own, perform, say, seal, under_way, went_back
from runbook.options import Sentence, gather, offered, options, step
from runbook.signals import held


@click.group(cls=Sentence, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Turn a live PostgreSQL table into a partitioned one, notebook by notebook, without losing a write.

    \b
    runbook run                                          the example, on a server of its own
    runbook run --database service=shop -f orders.yaml --to plan
                                                         look at a plan; nothing but the ledger is written
    runbook run --database service=shop -f orders.yaml -p approved_by ann
                                                         the whole migration; again: goes on where it stopped
    runbook status --database service=shop --json        where each table stands
    runbook sql --database service=shop -f orders.yaml   the migration as one SQL script, to review
    runbook rehearse --database service=shop -f orders.yaml
                                                         every step but the cut-over, then the way back
    runbook rollback --database service=shop -f orders.yaml
                                                         the way back, from any step
    runbook monitor --database service=shop -f orders.yaml
                                                         how the partitions fare, every day
    runbook finish --database service=shop -f orders.yaml -p approved_by ann
                                                         the end of the way back
    runbook lab                                          the same notebooks by hand, in JupyterLab

    A password comes from PGPASSWORD, PGPASSFILE or the service file, never from a command line.

    Exit codes: 0 done (also when all was done already), 1 refused or failed (the reason is printed), 2 wrong usage,
    130 interrupted, 143 terminated. Shell completion: eval "$(_RUNBOOK_COMPLETE=bash_source runbook)".
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the package left it while it loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    imports.keep()


@main.command(short_help="Execute the notebooks in order, and keep the record.")
@options(users=True, out=True)
@click.option(
    "--from", "first", callback=step, shell_complete=offered, default="00_plan", show_default=True, help="Begin with this step."
)
@click.option(
    "--to", "last", callback=step, shell_complete=offered, default=FORWARD[-1], show_default=True, help="End with this step."
)
@click.option("--reset", is_flag=True, help="Begin the embedded example afresh; nothing else can be reset.")
def run(
    file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path, first: str, last: str, reset: bool
) -> None:
    """Execute the notebooks in order, each in a fresh kernel, and keep the record.

    \b
    runbook run                            the example: a clinic's users by role
    runbook run --users 1000000 --reset    the same with a million users, from the beginning
    runbook run --to restore               the first four steps; the application keeps its table
    runbook run --from foreign_keys        the others

    What is done already is not done again, so that the same command goes on after whatever stopped it.
    """
    given = gather(file, pairs, database, users)
    if reset and given.get("database", "embedded") != "embedded":
        raise BadInput(f"--reset begins the embedded example afresh; {given['database']} is not that, and is left alone.")
    wanted = ledger.REPAIR if given.get("restore_from") == "backup" else ledger.STEPS
    names = tuple(ledger.NOTEBOOKS[each] for each in wanted if first <= ledger.NOTEBOOKS[each] <= last)
    if not names:
        raise click.UsageError(f"--from {first} comes after --to {last}.")
    if reset:
        embedded.reset()
    if users is not None:
        embedded.start(users)
    perform(names, given, out)


@main.command(short_help="The way back from any step, without losing a write.")
@options(out=True)
def rollback(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """The way back from any step, without losing a write (notebook 90)."""
    given = gather(file, pairs, database)
    perform(("90_rollback",), given, out, partial(went_back, str(given.get("database", "embedded")), str(given["table"])))


@main.command(short_help="Every step but the cut-over, then the way back.")
@options(users=True, out=True)
def rehearse(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path) -> None:
    """Every step but the cut-over, then the way back, on the real table; nothing of it is left.

    It prints the forecast beside what it took, the longest that anybody waited for it, the rows that were compared, and
    whether the database's objects are what they were: exit code 1 if not. The application keeps its table all the while.
    Whatever stops the rehearsal, the way back is taken.
    """
    given = gather(file, pairs, database, users)
    where, table = str(given.get("database", "embedded")), str(given["table"])
    if given.get("restore_from") == "backup":
        raise BadInput(
            "A repair is not rehearsed: `runbook run --to plan` shows what is missing, and 90_rollback takes its keys back."
        )
    if users is not None:
        embedded.start(users)
    with rehearsal.Watch(target(where), table) as watch:
        if under_way(where, table):
            raise BadInput(
                f"A migration of {table} is under way or done, or a rehearsal of it was broken off, and another rehearsal would take it away:"
                " take it back with `runbook rollback` first; a migration goes on with `runbook run`."
            )
        try:
            perform((*FORWARD[: FORWARD.index("05_cutover")], "90_rollback"), given, out, watch.told)
        except BaseException:
            try:
                if under_way(where, table, patience_s=60):
                    perform(("90_rollback",), given, out)
            except (OSError, RunbookError) as error:
                say(f"The rehearsal's way back was not taken: {error} `runbook rollback` takes away what it left.", err=True)
            raise
    watch.require_nothing()


@main.command(short_help="Add partitions for a new value, or for the next months.")
@options(out=True)
def add(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """Add partitions to a table that was partitioned: a new value, the next months (notebook 20).

    \b
    runbook add -f orders.yaml -p add '{"orders_asia": ["jp", "cn"]}' -p approved_by ann
    runbook add -f visits.yaml -p approved_by cron     by range: `ahead` more steps, where they are lacking
    """
    perform(("20_add_partitions",), gather(file, pairs, database), out)


@main.command(short_help="End the way back: drop the log and the retired table.")
@options(out=True)
def finish(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """End the way back: drop the log and the retired table (notebook 91)."""
    perform(("91_finish",), gather(file, pairs, database), out)


@main.command(short_help="How the partitions fare, to be run every day.")
@options(out=True)
def monitor(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """How the partitions fare, to be run every day (notebook 08); exit code 1 when a threshold is passed.

    \b
    runbook monitor -f orders.yaml -p max_default_rows 1000 -p min_pruning_percent 80
    """
    perform(("08_monitor",), gather(file, pairs, database), out)


@main.command()
@options()
@click.option("--json", "as_json", is_flag=True, help="For machines: a list with one object a migration.")
def status(file: Path | None, pairs: Any, database: str | None, as_json: bool) -> None:
    """Which step each table is at, from the ledger."""
    given = {**(parameters.from_file(file) if file else {}), **parameters.from_command_line(list(pairs))}
    checked = parameters.check(given | ({"database": database} if database is not None else {}))
    found = target(checked.database)
    with found.session("status") as session:
        rows = session.rows("ledger.overview") if ledger.kept(session) else []
    rows = [row for row in rows if checked.table in ("", row["table"], row["table"].partition(".")[2])]
    for row in rows:
        row["step"] = ledger.NOTEBOOKS.get(row["step"], row["step"])
    if as_json:
        click.echo(json.dumps(rows, default=str, indent=1, ensure_ascii=False))
    elif not rows:
        click.echo(f"No migration{f' of {checked.table}' if checked.table else ''} has been planned on {found.name}.")
    else:
        for row in rows:
            at = f"{row['step']} ({row['action']} {row['action_state']})"
            click.echo(f"{row['table']}: {row['state']}, at {at}. {row['sentence'] or ''}".strip())
    if found.embedded and not as_json:
        where = conninfo_to_dict(found.conninfo)
        click.echo(f"Its server: psql -h {shlex.quote(str(where['host']))} -U {where['user']} {where['dbname']}")


@main.command("sql", short_help="Print the plan's whole migration as one SQL script.")
@options(users=True)
def print_sql(file: Path | None, pairs: Any, database: str | None, users: int | None) -> None:
    """Print the plan's whole migration as one script; on a quiet copy `runbook sql | psql` ends where the notebooks end."""
    from runbook import script

    given = gather(file, pairs, database, users)
    with redirect_stdout(sys.stderr):  # whom it waits for is no part of the script
        planned = script.planned(given)
    click.echo(f"-- Plan {planned.plan.hash} of {planned.plan.full_name}, by the runbook {__version__}.")
    click.echo(repr(script.whole(planned)))


@main.command(short_help="Work through the same notebooks by hand, in JupyterLab.")
@options(users=True, out=True)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def lab(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path, no_browser: bool) -> None:
    """Work through the notebooks in JupyterLab: what is run and saved there leaves the same record.

    A new folder under --out gets a copy of the notebooks, with the parameters filled in; Ctrl-C twice ends the run and seals it.
    """
    imports.jsonschema()
    from runbook import desk  # JupyterLab's libraries take seconds to load, and only this needs them

    given = gather(file, pairs, database, users)
    record = begin(out, given, by_hand=True)
    head = ""
    try:
        desk.lay(record, lambda name: own(name, given if file or pairs or database or users is not None else {}))
        click.echo(f"The notebooks are in {record.folder}.")
        desk.serve(record, browser=not no_browser)
    finally:
        with held():
            head = seal(record, str(given.get("database", "embedded")), str(given["table"]), "worked through by hand")
        click.echo(f"\nRecord: {record.folder}\nHead:   {head}")


@main.command(short_help="Compute every hash of the record again; name what differs.")
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), default="runs")
@click.option("--database", help="Compare with the heads in this database's ledger, too.")
def audit(runs: Path, database: str | None) -> None:
    """Compute every hash of the record in RUNS (default: runs) again, and name what was changed, removed, added or re-ordered."""
    known = vouched_for(database) if database is not None else {}
    said, heads = audited(runs, **known), known.get("heads")
    if not said and not any(archive.manifests(runs)):
        said = [f"{runs} holds no run: name the folder that --out named, or what was in it was removed."]
    for sentence in said:
        click.echo(sentence)
    if said:
        sys.exit(1)
    who = (
        "Nobody but its own HEAD"
        if (runs / "HEAD").is_file()
        else "There is no HEAD, as after a kill before it was written: nobody"
    )
    vouched = "" if heads else f" {who} vouches for the last run: with --database the ledger does."
    if database is not None and not heads:
        vouched = f" {who} vouches for the last run: the ledger of {database} has no head of a run."
    click.echo(f"{runs} is as it was recorded.{vouched}")


@main.command()
def stop() -> None:
    """Stop the embedded server; its data stays."""
    click.echo("The embedded server has stopped." if embedded.stop() else "The embedded server was not running.")
