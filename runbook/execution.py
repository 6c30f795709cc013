"""Executing notebooks into a record: what every command that changes a database does, and how it tells of it."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pandas as pd
import psycopg
from psycopg import sql
from tqdm import tqdm

from runbook import archive, asked, imports, ledger
from runbook.database import target
from runbook.errors import BadInput, RunbookError, ServerUnavailable, told
from runbook.parameters import check, clinic
from runbook.redaction import redact
from runbook.signals import Terminated, ended_by_signals, held
from runbook.statements import folder
from runbook.words import counted

if TYPE_CHECKING:
    from runbook.engine import Executed

FORWARD = tuple(ledger.NOTEBOOKS[step] for step in ledger.STEPS)
QUIET_S = 30
EXIT_CODES = {"KeyboardInterrupt": 130, "Terminated": 143}


def say(text: str, err: bool = False) -> None:
    """To who reads it; whoever goes away (`| head`) stops no work, and is told of no more."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


def perform(names: tuple[str, ...], given: dict[str, Any], out: Path, result: Callable[[], str] = str) -> None:
    """Execute notebooks into a new folder under `out`; the record is sealed whatever happens. Exits unless all went well.

    `result` says at the end, when all did go well, what came of it.
    """
    imports.jsonschema()
    from runbook import forked  # Jupyter's libraries take a while to load, and only this needs them

    forked.begin()
    from runbook import engine

    imports.keep()
    table, where = str(given["table"]), str(given.get("database", "embedded"))
    if where != "embedded":
        target(where)  # where nobody answers, there is nothing to record
    if names[0] not in (FORWARD[0], "90_rollback"):  # the way back is the answer to another plan
        _refuse_another_plan(where, given)
    record = begin(out, given)
    lines: list[dict[str, Any]] = []
    stopped = error_name = planned = ""
    bar = tqdm(total=len(names), unit="step", disable=not (sys.stderr and sys.stderr.isatty()), leave=False)
    try:
        with ended_by_signals():
            for name in names:
                bar.set_description(name)
                before = _history(where, table)
                done = engine.execute(
                    folder("notebooks") / f"{name}.ipynb", record.start(f"{name}.ipynb"), own(name, given),
                    on_output=_teller(bar),
                )  # fmt: skip
                record.add(done)
                lines.append(_line(name, done, before, _history(where, table)))
                bar.update()
                with bar.external_write_mode(file=sys.stdout):
                    say(
                        "{step:<17} {state:<12} {rows:>12} {0} {seconds:>8.1f} s".format(
                            {"": "    ", "1": "row "}.get(lines[-1]["rows"], "rows"), **lines[-1]
                        )
                    )
                if done.error or done.failed_cell is not None:
                    stopped, error_name = f"{name} stopped{_place(done)}: {done.error}", done.error_name
                    break
                if name == FORWARD[0]:  # the others work by the plan that this run froze, or not at all
                    plan = ledger.of(target(where), table).plan
                    given = {"plan": plan.hash} | given
                    levels = Counter(each.level for each in plan.findings)
                    planned = f"Plan {plan.hash[:12]}: {counted(levels['warning'], 'warning')} and {counted(levels['note'], 'note')}, in 00_plan.html.\n"
    except (KeyboardInterrupt, Terminated) as error:
        stopped, error_name = f"{name} was stopped between two cells.", type(error).__name__
    except Exception as error:  # told by whoever called; the record must not say that all went well
        stopped = redact(f"{name} stopped: {type(error).__name__}: {error}", record.secrets)
        raise
    finally:
        bar.close()
        with held():
            head = seal(record, where, table, stopped or "completed")
            if not stopped:
                say(f"\n{pd.DataFrame(lines).to_string(index=False)}\n{planned}{result()}".rstrip())
            say(f"\nRecord: {record.folder}")
            if error_name:  # of other errors whoever called tells
                on = _way_on(name, error_name, where, given) if names[-1] != "90_rollback" or name == names[-1] else ""
                say(f"{stopped}\n{on}".rstrip(), err=True)
            say(f"Head:   {head}")
    if stopped:
        sys.exit(EXIT_CODES.get(error_name, 1))


def _place(done: Executed) -> str:
    """Under which of the notebook's headings."""
    cells = json.loads(done.notebook.read_text(encoding="utf-8"))["cells"][: done.failed_cell or 0]
    headings = re.findall(
        r"(?m)^##? (.*)$", "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    )
    return f" at “{headings[-1]}”" if headings else ""


def _refuse_another_plan(where: str, given: dict[str, Any]) -> None:
    try:
        found = ledger.of(target(where), str(given["table"]))
    except RunbookError:  # the notebook says it, and that is on record
        return
    example = clinic() if where == "embedded" else {}  # what nobody said
    asked.refuse_another(found, check(given), {name for name, value in given.items() if example.get(name) != value})


def _way_on(name: str, error_name: str, where: str, given: dict[str, Any]) -> str:
    """What to do after this notebook was stopped, where its error does not say it; to roll back is no answer to a plan that was
    refused, to what a day's look has found, nor where there is no way back, or it leaves what a repair put back."""
    if error_name in ("BadInput", "OutOfOrder", "PlanOutdated", "ApprovalMissing") and name != FORWARD[0]:
        return ""  # its sentence says what else to do: the same command would be refused again
    if name in FORWARD and (name != FORWARD[0] or error_name in EXIT_CODES):
        back = "; `runbook rollback` takes everything away" if _goes_back(where, str(given["table"])) else ""
        return f"The same command goes on from there{back}."
    if name == FORWARD[0]:
        return "Nothing but the ledger was written: when that is mended, give the command again."
    if error_name in {each.__name__ for each in RunbookError.__subclasses__()}:
        return ""
    # A rehearsal's, too, which would be refused itself.
    return f"{'`runbook rollback`' if name == '90_rollback' else 'The same command'} goes on from there."


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
            say(f"  {(waits or lines)[-1]}")

    return tell


def begin(out: Path, given: dict[str, Any], **facts: Any) -> archive.Run:
    """A new record under `out`."""
    ours = folder("notebooks").resolve()
    if ours in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"{out} lies inside the notebooks' own folder: choose another with --out.")
    return archive.Run.begin(out, str(given["table"]), given, **facts)


def own(name: str, given: dict[str, Any]) -> dict[str, Any]:
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


def _goes_back(where: str, table: str) -> bool:
    with suppress(RunbookError, psycopg.Error):
        found = ledger.of(target(where), table, ended=True)
        return found.state != "finished" and found.plan.restore_from == "source"
    return True


def under_way(where: str, table: str, patience_s: float = 0) -> bool:
    """Whether a migration of the table has got beyond its plan, and was not rolled back. A server that does not answer is asked
    again for a while; raises ServerUnavailable at its end."""
    begun = time.monotonic()
    while True:
        try:
            found = ledger.of(target(where), table)
            return bool((found.database.frame("ledger.history", migration=found.migration)["step"] != "plan").any())
        except (ServerUnavailable, psycopg.OperationalError) as error:
            if time.monotonic() - begun > patience_s:
                raise ServerUnavailable(told(error)) from None
            time.sleep(1)
        except (RunbookError, psycopg.Error):
            return False


def went_back(where: str, table: str) -> str:
    """What 90 says of the way back."""
    history = _history(where, table)
    done = history[(history["step"] == "rollback") & (history["state"] == "done")].drop_duplicates("action", keep="last")
    return "\n".join(done[done["action"] != "clean"]["sentence"])


def _line(name: str, done: Executed, before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    step = next(step for step, notebook in ledger.NOTEBOOKS.items() if notebook == name)
    mine = after[(after["step"] == step) & (after["state"] == "done")]
    if name in ("08_monitor", "20_add_partitions"):  # each time anew: what they did before is not of this run
        mine = mine[mine.index >= len(before)]
    rows = 0 if mine["rows"].isna().all() else int(mine["rows"].max())
    state = "already done" if before.equals(after) else "done"  # a plan that took another's place has as many lines
    if done.error or done.failed_cell is not None:
        state, rows = "failed", 0
    counts = "" if name in ("06_verify", "07_application") else f"{rows:,}"  # these count promises and points
    return {"step": name, "state": state, "rows": counts, "seconds": round(done.seconds, 1)}


def seal(record: archive.Run, where: str, table: str, result: str) -> str:
    """Seal the record, and write its head into the ledger where there is one: archive and database vouch for each other."""
    from runbook import certificate

    facts, found = {}, None
    with suppress(RunbookError, psycopg.Error):
        database = target(where)
        with database.session("record") as session:
            facts = session.row(sql.SQL("SELECT version() AS server, current_user::text AS database_user").format())
            facts["target"] = "" if database.embedded else session.target
        found = ledger.of(database, table, ended=True)
    if found:
        record.manifest |= facts
        try:
            certificate.write(record, found)
        except (RunbookError, psycopg.Error) as error:
            click.echo(redact(f"The certificate could not be written: {error}", record.secrets), err=True)
    number = None
    if found:
        with suppress(RunbookError, psycopg.Error), found.database.session("record") as session:
            number = session.value("ledger.begin_record", migration=found.migration, folder=record.folder.name)
    head = record.seal(**facts, plan_hash=found.plan.hash if found else "", result=result)
    if found and number:
        with suppress(RunbookError, psycopg.Error), found.database.session("record") as session:
            session.run("ledger.end_record", id=number, head=head)
    return head
