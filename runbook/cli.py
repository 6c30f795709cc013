"""The command line: thin ways to execute notebooks, and to read what they left."""

from __future__ import annotations

import ast
import errno
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pandas as pd
import psycopg
from psycopg import sql
from tqdm import tqdm

from runbook import __version__, archive, embedded, ledger, parameters, rehearsal
from runbook.database import target
from runbook.draft import draft
from runbook.errors import BadInput, RunbookError, told
from runbook.redaction import known_secrets, redact
from runbook.statements import folder

if TYPE_CHECKING:
    from runbook.engine import Executed

FORWARD = tuple(ledger.NOTEBOOKS[step] for step in ledger.STEPS)
NAMES = {alias: name for name in FORWARD for alias in (name, name[:2], name[3:])}
QUIET_S = 30
EXIT_CODES = {"KeyboardInterrupt": 130, "Terminated": 143}


class Sentence(click.Group):
    """Errors of ours and of the server are one sentence and exit code 1, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RunbookError as error:
            said = str(error)
        except psycopg.Error as error:
            said = told(error)
        except KeyboardInterrupt:  # click would say "Aborted!" and exit with 1
            click.echo("Interrupted.", err=True)
            sys.exit(EXIT_CODES["KeyboardInterrupt"])
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = error.filename or "A file of the record"
            said = f"{where} cannot be used: {error.strerror or error}. Mend that, or choose another folder; then give the command again."
        raise click.ClickException(redact(said, known_secrets()))


def step(context: click.Context, option: click.Parameter, value: str) -> str:
    """A step by number, name or both: 03, restore or 03_restore."""
    if value not in NAMES:
        raise click.BadParameter(
            f"{value!r} is not a step; there are {', '.join(FORWARD)} (03, restore and 03_restore are the same)."
        )
    return NAMES[value]


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
    runbook lab                                          the same notebooks by hand, in JupyterLab

    A password comes from PGPASSWORD, PGPASSFILE or the service file, never from a command line.

    Exit codes: 0 done (also when all was done already), 1 refused or failed (the reason is printed), 2 wrong usage,
    130 interrupted, 143 terminated. Shell completion: eval "$(_RUNBOOK_COMPLETE=bash_source runbook)".
    """


def options(*, users: bool = False, out: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that say which database, which table and how."""
    known = [
        click.option("-f", "file", type=click.Path(path_type=Path, dir_okay=False), help="A YAML file of parameters."),
        click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="One parameter; may be repeated."),
        click.option("--database", help='"embedded", postgresql://user@host/db, service=name or "environment" (PG*).'),
    ]
    if users:
        known.append(click.option("--users", type=click.IntRange(min=0), help="The embedded example only: load so many users."))
    if out:
        place = click.Path(path_type=Path, file_okay=False)
        known.append(click.option("--out", type=place, default="runs", show_default=True, help="Where the record goes."))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(known):
            command = option(command)
        return command

    return decorate


def gather(file: Path | None, pairs: Any, database: str | None, users: int | None = None) -> dict[str, Any]:
    """The parameters of a command, checked; the clinic's only on the embedded server, and only where no table is named."""
    given = parameters.from_file(file) if file else {}
    given |= parameters.from_command_line(list(pairs))
    given |= {name: value for name, value in (("database", database), ("users", users)) if value is not None}
    checked = parameters.check(given)
    if checked.users is not None and checked.database != "embedded":
        raise BadInput(f"users loads the embedded example, and does nothing to {checked.database}: leave it out.")
    if not checked.table:
        if checked.database != "embedded":
            raise BadInput(f"No table is named for {checked.database}: use -f FILE, or -p table NAME -p key COLUMN.")
        given = {**parameters.clinic(), **given}
        parameters.check(given)
    return given


@main.command()
@options(users=True, out=True)
@click.option("--from", "first", callback=step, default="00_plan", show_default=True, help="Begin with this step.")
@click.option("--to", "last", callback=step, default=FORWARD[-1], show_default=True, help="End with this step.")
@click.option("--reset", is_flag=True, help="Begin the embedded example afresh; nothing else can be reset.")
def run(
    file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path, first: str, last: str, reset: bool
) -> None:
    """Execute the notebooks in order, each in a fresh kernel, and keep the record.

    \b
    runbook run                            the example: a clinic's users by role
    runbook run --users 1000000 --reset    the same with a million users, from the beginning
    runbook run --to restore               the first four steps; the application notices nothing
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


@main.command()
@options(out=True)
def rollback(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """The way back from any step, without losing a write (notebook 90)."""
    perform(("90_rollback",), gather(file, pairs, database), out)


@main.command()
@options(users=True, out=True)
def rehearse(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path) -> None:
    """Every step but the cut-over, then the way back, on the real table; nothing of it is left.

    It prints the forecast beside what it took, the longest that anybody waited for it, the rows that were compared, and
    whether the database's objects are what they were: exit code 1 if not. The application keeps its table all the while.
    Whatever stops the rehearsal, the way back is taken.
    """
    given = gather(file, pairs, database, users)
    where, table = str(given.get("database", "embedded")), str(given["table"])
    if users is not None:
        embedded.start(users)
    if _under_way(where, table):
        raise BadInput(f"The migration of {table} is under way or done, and a rehearsal would take it away: use `runbook run`.")
    with rehearsal.Watch(target(where), table) as watch:
        try:
            perform((*FORWARD[: FORWARD.index("05_cutover")], "90_rollback"), given, out, watch.told)
        except SystemExit:
            if _under_way(where, table):
                perform(("90_rollback",), given, out)
            raise
    watch.require_nothing()


@main.command()
@options(out=True)
def add(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """Add partitions to a table that was partitioned: a new value, the next months (notebook 20).

    \b
    runbook add -f orders.yaml -p add '{"orders_asia": ["jp", "cn"]}' -p approved_by ann
    runbook add -f visits.yaml -p approved_by cron     by range: `ahead` more steps, where they are lacking
    """
    perform(("20_add_partitions",), gather(file, pairs, database), out)


@main.command()
@options(out=True)
def finish(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """End the way back: drop the log and the retired table (notebook 91)."""
    perform(("91_finish",), gather(file, pairs, database), out)


@main.command()
@options(out=True)
def monitor(file: Path | None, pairs: Any, database: str | None, out: Path) -> None:
    """How the partitions fare, to be run every day (notebook 08); exit code 1 when a threshold is passed.

    \b
    runbook monitor -f orders.yaml -p max_default_rows 1000 -p min_pruning_percent 80
    """
    perform(("08_monitor",), gather(file, pairs, database), out)


def perform(names: tuple[str, ...], given: dict[str, Any], out: Path, result: Callable[[], str] = str) -> None:
    """Execute notebooks into a new folder under `out`; the record is sealed whatever happens. Exits unless all went well.

    `result` says at the end, when all did go well, what came of it.
    """
    from runbook import engine  # Jupyter's libraries take seconds to load, and only this needs them

    table, where = str(given["table"]), str(given.get("database", "embedded"))
    if where != "embedded":
        target(where)  # where nobody answers, there is nothing to record
    record = _begin(out, given)
    lines: list[dict[str, Any]] = []
    stopped = error_name = ""
    bar = tqdm(total=len(names), unit="step", disable=not sys.stderr.isatty(), leave=False)
    try:
        with engine.ended_by_signals():
            for name in names:
                bar.set_description(name)
                before = _history(where, table)
                done = engine.execute(
                    folder("notebooks") / f"{name}.ipynb", record.start(f"{name}.ipynb"), _own(name, given),
                    on_output=_teller(bar),
                )  # fmt: skip
                record.add(done)
                lines.append(_line(name, done, before, _history(where, table)))
                bar.update()
                with bar.external_write_mode(file=sys.stdout):
                    click.echo("{step:<16} {state:<12} {rows:>12} rows {seconds:>8.1f} s".format(**lines[-1]))
                if done.error or done.failed_cell is not None:
                    stopped, error_name = f"{name} stopped at cell {done.failed_cell}: {done.error}", done.error_name
                    break
                if name == FORWARD[0]:  # the others work by the plan that this run froze, or not at all
                    given = {"plan": ledger.of(target(where), table).plan.hash} | given
    except (KeyboardInterrupt, engine.Terminated) as error:
        stopped, error_name = f"{name} was stopped between two cells.", type(error).__name__
    except Exception as error:  # told by whoever called; the record must not say that all went well
        stopped = redact(f"{name} stopped: {type(error).__name__}: {error}", record.secrets)
        raise
    finally:
        bar.close()
        head = _seal(record, where, table, stopped or "completed")
    if not stopped:
        click.echo(f"\n{pd.DataFrame(lines).to_string(index=False)}\n{result()}".rstrip())
    click.echo(f"\nRecord: {record.folder}")
    if stopped:
        click.echo(f"{stopped}\n{_way_on(name, error_name)}".rstrip(), err=True)
    click.echo(f"Head:   {head}")
    if stopped:
        sys.exit(EXIT_CODES.get(error_name, 1))


def _way_on(name: str, error_name: str) -> str:
    """What to do after this notebook was stopped, where its error does not say it; to roll back is no answer to a plan that was
    refused, nor to what a day's look has found."""
    if name in FORWARD and (name != FORWARD[0] or error_name in EXIT_CODES):
        return "The same command goes on from there; `runbook rollback` takes everything away."
    if name == FORWARD[0]:
        return "Nothing but the ledger was written: when that is mended, give the command again."
    return "The same command goes on from there." if error_name in EXIT_CODES else ""


def _teller(bar: Any) -> Callable[[str], None]:
    """Shows the last line of a notebook's output beside the bar. Where nobody watches a terminal, one every half minute, and
    at once what somebody may have to do something about."""
    said_at = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said_at
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        bar.set_postfix_str(re.sub(r"\|.*\|", "", (lines or [""])[-1])[:90])  # of a bar the numbers
        waits = [line for line in lines if line.startswith(("waiting for ", "paused: "))]
        if bar.disable and lines and (waits or time.monotonic() - said_at > QUIET_S):
            said_at = time.monotonic()
            click.echo(f"  {(waits or lines)[-1]}")

    return tell


def _begin(out: Path, given: dict[str, Any], **facts: Any) -> archive.Run:
    """A new record under `out`."""
    ours = folder("notebooks").resolve()
    if ours in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"{out} lies inside the notebooks' own folder: choose another with --out.")
    return archive.Run.begin(out, str(given["table"]), given, approved_by=str(given.get("approved_by", "")), **facts)


def _own(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters that this notebook has."""
    cells = json.loads((folder("notebooks") / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    known = {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets
             if isinstance(target, ast.Name)}  # fmt: skip
    return {key: value for key, value in given.items() if key in known}


def _history(where: str, table: str) -> pd.DataFrame:
    """What the ledger has of the table's last migration; empty where there is none, or nobody answers."""
    with suppress(RunbookError, psycopg.Error):
        found = ledger.of(target(where), table, ended=True)
        return found.database.frame("ledger.history", migration=found.migration)
    return pd.DataFrame(columns=["step", "state", "rows"])


def _under_way(where: str, table: str) -> bool:
    """Whether a migration of the table has got beyond its plan, and was not rolled back."""
    with suppress(RunbookError, psycopg.Error):
        found = ledger.of(target(where), table)
        return bool((found.database.frame("ledger.history", migration=found.migration)["step"] != "plan").any())
    return False


def _line(name: str, done: Executed, before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    mine = after[(after["step"] == name.partition("_")[2]) & (after["state"] == "done")]
    rows = 0 if mine["rows"].isna().all() else int(mine["rows"].max())
    state = "already done" if before.equals(after) else "done"  # a plan that took another's place has as many lines
    if done.error or done.failed_cell is not None:
        state, rows = "failed", 0
    return {"step": name, "state": state, "rows": f"{rows:,}", "seconds": round(done.seconds, 1)}


def _seal(record: archive.Run, where: str, table: str, result: str) -> str:
    """Seal the record, and write its head into the ledger where there is one: archive and database vouch for each other."""
    from runbook import certificate

    facts, found = {}, None
    with suppress(RunbookError, psycopg.Error):
        database = target(where)
        with database.session("record") as session:
            facts = session.row(sql.SQL("SELECT version() AS server, current_user::text AS database_user").format())
        found = ledger.of(database, table, ended=True)
    if found:
        record.manifest |= facts
        try:
            certificate.write(record, found)
        except (RunbookError, psycopg.Error) as error:
            click.echo(redact(f"The certificate could not be written: {error}", record.secrets), err=True)
    head = record.seal(**facts, plan_hash=found.plan.hash if found else "", result=result)
    if found:
        with suppress(RunbookError, psycopg.Error), found.database.session("record") as session:
            session.run("ledger.insert_record", migration=found.migration, folder=record.folder.name, head=head)
    return head


@main.command()
@options()
@click.option("--json", "as_json", is_flag=True, help="For machines: a list with one object a migration.")
def status(file: Path | None, pairs: Any, database: str | None, as_json: bool) -> None:
    """Which step each table is at, from the ledger."""
    given = {**(parameters.from_file(file) if file else {}), **parameters.from_command_line(list(pairs))}
    checked = parameters.check(given | ({"database": database} if database else {}))
    found = target(checked.database)
    with found.session("status") as session:
        rows = session.rows("ledger.overview") if session.value("ledger.exists") else []
    rows = [row for row in rows if checked.table in ("", row["table"], row["table"].partition(".")[2])]
    for row in rows:
        row["step"] = ledger.NOTEBOOKS.get(row["step"], row["step"])
    if as_json:
        click.echo(json.dumps(rows, default=str, indent=1, ensure_ascii=False))
    elif not rows:
        click.echo(f"No migration has been planned on {found.name}.")
    else:
        for row in rows:
            at = f"{row['step']} ({row['action']} {row['action_state']})"
            click.echo(f"{row['table']}: {row['state']}, at {at}. {row['sentence'] or ''}".strip())


@main.command("sql")
@options(users=True)
def print_sql(file: Path | None, pairs: Any, database: str | None, users: int | None) -> None:
    """Print the plan's whole migration as one script; on a quiet copy `runbook sql | psql` ends where the notebooks end."""
    from runbook import script

    made = draft(**gather(file, pairs, database, users))
    made.require_passable()
    if made.already:
        planned = ledger.of(made.database, made.plan.full_name)
    else:
        with made.database.session("sql") as session:
            last = session.value("ledger.last_id") if session.value("ledger.exists") else 0
            taken = {row["name"] for row in session.rows("catalog.schemas")}  # by a script that ran here before
        number = next(each for each in range((last or 0) + 1, 1 << 31) if f"runbook_{each}" not in taken)
        planned = ledger.Run(made.database, number, made.plan)
    click.echo(f"-- Plan {planned.plan.hash} of {planned.plan.full_name}, by the runbook {__version__}.")
    click.echo(repr(script.whole(planned)))


@main.command()
@options(users=True, out=True)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def lab(file: Path | None, pairs: Any, database: str | None, users: int | None, out: Path, no_browser: bool) -> None:
    """Work through the notebooks in JupyterLab: what is run and saved there leaves the same record.

    A new folder under --out gets a copy of the notebooks, with the parameters filled in; Ctrl-C ends the run and seals it.
    """
    from runbook import desk  # JupyterLab's libraries take seconds to load, and only this needs them

    given = gather(file, pairs, database, users)
    record = _begin(out, given, by_hand=True)
    head = ""
    try:
        desk.lay(record, lambda name: _own(name, given if file or pairs or database or users is not None else {}))
        click.echo(f"The notebooks are in {record.folder}.")
        desk.serve(record, browser=not no_browser)
    finally:
        head = _seal(record, str(given.get("database", "embedded")), str(given["table"]), "worked through by hand")
        click.echo(f"\nRecord: {record.folder}\nHead:   {head}")


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), default="runs")
@click.option("--database", help="Compare with the heads in this database's ledger, too.")
def audit(runs: Path, database: str | None) -> None:
    """Compute every hash of the record again, and name what was changed, removed, added or re-ordered."""
    heads: list[str] = []
    if database:
        with target(database).session("audit") as session:
            if not session.value("ledger.exists"):
                raise BadInput(f"{database} has no ledger to compare with: name the database that was migrated.")
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
