"""Uniqueness over all partitions: a guard table with one unique index, kept by triggers on the root."""

from __future__ import annotations

from psycopg import sql

from runbook.changes import Statements
from runbook.facts import Guard
from runbook.ledger import Run
from runbook.plan import Plan, fit
from runbook.session import Session
from runbook.statements import closed_schema, spelled, statement, trusted


def names(plan: Plan, guard: Guard, staging: str, schema: str = "") -> dict[str, sql.Composable]:
    """The placeholders of one guard, which lies in the plan's schema for guards or in another. Aliases: r a row of the
    table, g of the guard, o what a row's key is."""
    schema, columns = schema or plan.guard_schema, [sql.Identifier(name) for name, _, _ in guard.parts]
    conditions: list[sql.Composable] = [trusted(f"({guard.predicate})")] if guard.predicate else []
    if not guard.nulls_not_distinct:  # rows with a NULL in the key cannot clash; a composite value with a NULL in it is none
        conditions += [sql.SQL("({}) IS DISTINCT FROM NULL").format(trusted(expression)) for _, expression, _ in guard.parts]
    same = (
        "(g.{0} {1} o.{0} OR g.{0} IS NOT DISTINCT FROM NULL AND o.{0} IS NOT DISTINCT FROM NULL)"
        if guard.nulls_not_distinct
        else "g.{0} {1} o.{0}"
    )
    equals = map(trusted, guard.operators or ["="] * len(columns))

    def row(which: str, form: str = "{}.{}") -> sql.Composable:
        each = (sql.SQL(form).format(trusted(which), sql.Identifier(name)) for name in guard.watched)
        return sql.SQL(", ").join(each)

    return {
        **plan.names(staging),
        "guards": sql.Identifier(schema),
        "guard": sql.Identifier(schema, guard.table),
        "index": sql.Identifier(guard.index),
        "function": sql.Identifier(schema, fit(f"{guard.table}_keep")),
        "function_text": sql.Literal(spelled((schema, fit(f"{guard.table}_keep")))),
        "truncate_function": sql.Identifier(schema, fit(f"{guard.table}_truncate")),
        "values": sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(trusted(expression), column)
            for (_, expression, _), column in zip(guard.parts, columns, strict=True)
        ),
        "where": sql.SQL("WHERE {}").format(sql.SQL(" AND ").join(conditions)) if conditions else sql.SQL(""),
        "parts": sql.SQL(", ").join(
            sql.SQL("{} {}").format(column, trusted(how)) for column, (_, _, how) in zip(columns, guard.parts, strict=True)
        ),
        "nulls": sql.SQL("NULLS NOT DISTINCT" if guard.nulls_not_distinct else ""),
        "g_is_o": sql.SQL(" AND ").join(sql.SQL(same).format(*each) for each in zip(columns, equals, strict=True)),
        "old_row": sql.SQL("SELECT {}").format(row("OLD", "{0}.{1} AS {1}")),
        "new_row": sql.SQL("SELECT {}").format(row("NEW", "{0}.{1} AS {1}")),
        "old_watched": row("OLD"),
        "new_watched": row("NEW"),
        "row_trigger": sql.Identifier(fit(f"!{guard.index}_keep")),  # "!": before the application's, which fire by name, too
        "update_trigger": sql.Identifier(fit(f"!{guard.index}_keep_update")),
        "truncate_trigger": sql.Identifier(fit(f"!{guard.index}_keep_truncate")),
    }


def leaves(plan: Plan, schema: str) -> list[sql.Identifier]:
    return [sql.Identifier(schema, each.name) for each in plan.partitions]


def prepare(run: Run) -> Statements:
    """The schema of the guards; they outlive the migration."""
    if run.plan.guards:
        yield from closed_schema(run.plan.guard_schema)
        yield statement("unique.own_schema", **names(run.plan, run.plan.guards[0], run.staging))


def build(plan: Plan, guard: Guard, staging: str, schema: str = "") -> Statements:
    """The statements that make a guard from the shadow's rows, in bulk."""
    own = names(plan, guard, staging, schema)
    yield statement("unique.fill", **own)
    yield statement("unique.create_index", **own)
    if guard.deferrable:
        yield statement("unique.defer", **own)
    yield statement("unique.settle", **own)
    if not schema:
        yield statement("ddl.own", table=own["guard"], owner=own["owner"])


def builds(run: Run) -> list[list[sql.Composed]]:
    """For each guard the statements that make it."""
    return [list(build(run.plan, guard, run.staging)) for guard in run.plan.guards]


def pending(run: Run, session: Session) -> list[list[sql.Composed]]:
    """The builds of the guards that are not there yet."""
    there = [spelled((run.plan.guard_schema, guard.table)) for guard in run.plan.guards]
    return [each for guard, each in zip(there, builds(run), strict=True) if not session.value("catalog.there", name=guard)]


def keep(plan: Plan, guard: Guard, staging: str, schema: str = "") -> Statements:
    """The triggers on rows: from here on whatever writes to the shadow, and later to the table, keeps the guard right."""
    own = names(plan, guard, staging, schema)
    release = statement("unique.release_one" if guard.deferrable else "unique.release", **own)
    yield statement("unique.create_function", **own, release=release)
    yield statement("unique.attach", **own)
    if not schema:
        for leaf in leaves(plan, staging):
            yield statement("unique.attach_leaf", **own, table=leaf)


def attach(run: Run) -> Statements:
    """The triggers of every guard, those for TRUNCATE too."""
    for guard in run.plan.guards:
        own = names(run.plan, guard, run.staging)
        yield from keep(run.plan, guard, run.staging)
        yield statement("unique.create_truncate_function", **own)
        for table in (run.names["shadow"], *leaves(run.plan, run.staging)):
            yield statement("unique.attach_truncate", **own, table=table)


def remove(run: Run) -> Statements:
    """The inverse of all of it."""
    if run.plan.guards:
        yield statement("ddl.drop_schema", schema=names(run.plan, run.plan.guards[0], run.staging)["guards"])
