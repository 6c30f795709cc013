"""The whole migration of a plan as one script that psql takes: for reading, and for a quiet copy of the database."""

from __future__ import annotations

from typing import Any

from psycopg import sql

from runbook import backup, changes, cutover, foreign_keys, partition, restore
from runbook.changes import Statements
from runbook.draft import draft
from runbook.errors import BadInput
from runbook.ledger import Run, kept, of
from runbook.sheet import Sheet
from runbook.statements import Value, closed_schema, rendered, spelled, statement

HEAD = r"""\set ON_ERROR_STOP on
-- For psql, and for a table that nobody writes to meanwhile. It stops at the first error, and before the swap where somebody wrote all
-- the same; what it did until then, `runbook rollback` takes back. Afterwards the ledger (schema runbook) knows of it: `runbook run --from verify`, `runbook rollback` and `runbook finish`
-- go on from there, with the same parameters."""


def planned(given: dict[str, Any]) -> Run:
    """The migration that these parameters ask for: the one that is in force, or else one that is not frozen, under the number that
    it would get. Raises BadInput for a repair, and where the plan is another than the one that is named."""
    made = draft(**given)
    made.require_passable()
    if made.plan.restore_from == "backup":
        raise BadInput("A repair has no script: 00_plan shows what is missing, 03_restore and 04_foreign_keys what they do.")
    if made.already:
        run = of(made.database, made.plan.full_name)
    else:
        with made.database.session("sql") as session:
            last = session.value("ledger.last_id") if kept(session) else 0
            taken = {row["name"] for row in session.rows("catalog.schemas")}  # by a script that ran here before
        number = next(each for each in range((last or 0) + 1, 1 << 31) if f"runbook_{each}" not in taken)
        run = Run(made.database, number, made.plan)
    asked = str(given.get("plan", ""))
    if not run.plan.hash.startswith(asked):
        raise BadInput(
            f"The script would be of the plan {run.plan.hash[:12]}, not {asked[:12]}: look at it with 00_plan, or leave plan out."
        )
    return run


def whole(run: Run) -> Sheet:
    """Every statement of the steps 01 to 05, loops written out; ends where the notebooks end, given that nobody writes. The ledger
    has it then: 06, 20, 90 and 91 go on from there."""
    return Sheet(_statements(run))


def _statements(run: Run) -> Statements:
    yield sql.Composed([sql.SQL(HEAD)])
    yield from closed_schema("runbook", there=True)
    yield statement("ledger.create")
    yield statement(
        "ledger.script_migration", migration=run.migration, source=run.plan.full_name, source_text=spelled(run.plan.source),
        plan=run.plan.model_dump_json(), hash=run.plan.hash,
    )  # fmt: skip
    yield from _noted(run, "plan", "check")
    yield rendered("BEGIN")  # a backup that nobody has noted, the way back would leave
    yield from backup.script(run)
    sums = sql.SQL("(SELECT jsonb_build_object('sums', jsonb_agg(to_jsonb(s))) FROM ({}) s)").format(backup.sums(run))
    yield from _noted(run, "backup", "make", evidence=sums)
    yield rendered("COMMIT")
    yield from _noted(run, "backup", "check")
    yield from partition.create(run)
    yield from changes.switch_on(run)
    yield from _noted(run, "partition", "shadow", "log", "check")
    yield from restore.script(run)
    yield from _noted(run, "restore", "copy", "settle", "index", "replay", "compare", "check")
    yield from foreign_keys.script(run)
    yield from _noted(run, "foreign_keys", "columns", "fill", "check")
    logging = sql.SQL("({})").format(statement("changes.logging_back", **run.names))
    swapped = [statement("ledger.remember_triggers", **run.names, triggers=logging), *_noted(run, "cutover", "swap")]
    yield from cutover.script(run, swapped)
    yield from _noted(run, "cutover", "validate", "check")


def _noted(run: Run, step: str, *actions: str, evidence: sql.Composable | str = "{}") -> Statements:
    for action in actions:
        names: dict[str, Value] = {
            "step": step,
            "action": action,
            "sentence": "Done by the script of `runbook sql`.",
            "evidence": evidence,
        }
        yield statement("ledger.script_action", migration=run.migration, **names)
