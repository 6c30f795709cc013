"""The swap of the names: what it locks, and the statements of its one transaction; the way back has its own, made of the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from psycopg import sql

from runbook import changes, composite, foreign_keys, locks
from runbook.changes import Statements
from runbook.errors import PromiseBroken
from runbook.ledger import Run
from runbook.plan import fit
from runbook.session import Session
from runbook.statements import rendered, spelled, statement, trusted


def lock_set(run: Run, session: Session | None = None) -> tuple[list[sql.Composable], list[sql.Composable]]:
    """What a swap locks: referencing tables, source, tables that the source references or whose policies read it; and the views.
    In this order a row is written and its foreign keys are looked up: in the other one each would wait for a writer that waits.

    With a session: those that still stand; a referencing table, or a view, may have been dropped since."""
    plan = run.plan
    tables: list[sql.Composable] = [*(reference.identifier for reference in plan.references), plan.source]
    tables += [sql.Identifier(*table) for table in plan.referenced_tables]
    unique = {each.as_string(None): each for each in tables}
    views: list[sql.Composable] = [sql.Identifier(*view) for view in plan.view_tables]
    return (list(unique.values()), views) if session is None else (standing(session, unique.values()), standing(session, views))


def sequences(run: Run) -> list[sql.Composed]:
    """What locks the sequences that change hands: each is given to whom it belongs already. Whoever took a value keeps its lock to
    the end of the transaction: one that then waits for the table, while we wait for the sequence, would wait for us for ever."""
    return [rendered(each.definition) for each in run.plan.carried if each.kind == "sequence"]


def refuse_owner(run: Run, session: Session) -> None:
    """Raises PromiseBroken where the table got another owner since the cut-over than its original has, and a sequence is to go back:
    it can belong to a table of its own owner only."""
    retired = spelled(run.names["retired"])
    for row in session.rows("rollback.owners", **run.names, retired_text=retired) if sequences(run) else ():
        raise PromiseBroken(
            f"{run.plan.full_name} belongs to {row['owner']} since the cut-over, its original to {row['former']}, and a sequence goes with a table"
            f" of its own owner only: ALTER TABLE {spelled(run.plan.source)} OWNER TO {spelled((row['former'],))}; or, for the new one to stay,"
            f" ALTER TABLE {retired} OWNER TO {spelled((row['owner'],))}; then run 90_rollback again."
        )


def standing(session: Session, tables: Iterable[sql.Composable]) -> list[sql.Composable]:
    """Those of them that are there."""
    return [each for each in tables if session.value("catalog.there", name=spelled(each))]


def logs(run: Run, session: Session) -> list[sql.Composable]:
    """The logs and guards that stand, which the application's triggers may write."""
    rows = session.rows("locks.tables_in", schemas=[run.staging, run.plan.guard_schema])
    return [sql.Identifier(row["schema"], row["name"]) for row in rows]


def unlogged(run: Run, session: Session) -> list[sql.Composable]:
    """The tables that lose triggers when the logs go; one is a partition that was detached since, and has its own left."""
    rows = session.rows("rollback.triggered", staging_name=run.staging)
    tables = [*lock_set(run, session)[0], *(sql.Identifier(row["schema"], row["name"]) for row in rows)]
    return list({each.as_string(None): each for each in tables}.values())


def lock_statements(run: Run) -> Statements:
    """The locks that come first, as the first attempt takes them."""
    tables, views = lock_set(run)
    yield statement("locks.lock_ours", tables=run.names["shadow"])
    yield locks.together(tables, views, "ACCESS EXCLUSIVE", sequences=sequences(run))


def swap_statements(run: Run) -> Statements:
    """The swap: the source retires, the shadow takes its name, schema and everything that hung on it."""
    plan, names = run.plan, run.names
    if any(each.kind == "function of its rows" for each in plan.carried):
        yield unchecked()
    yield from changes.switch_off(run)
    yield from composite.drop_old(run)
    for key in plan.outgoing:
        yield statement("cutover.drop_key", table=plan.source, constraint=(key.name,))
    for check in plan.checks:
        if not check.validated:
            yield statement("cutover.drop_key", table=plan.source, constraint=(check.name,))
    for each in plan.carried:
        if each.retire:
            yield rendered(each.retire)
    yield from rename(run, retire=True)
    if not plan.takes_any_value:
        yield statement("cutover.drop_unplaced", **names)
    for table in (names["shadow"], *changes.leaves(run, run.staging)):
        yield statement("cutover.set_schema", table=table, to=names["schema"])
    yield from positions(run, retire=True)
    yield from _carry(run)
    yield from foreign_keys.legacy(run)
    yield from composite.add_composite(run)
    if refuses_moves(run):
        yield statement("cutover.refuse_moves", **names)
    yield from changes.turn_round(run)


def unchecked() -> sql.Composed:
    """Functions are made anew as they were: one may call another that is not there yet, or look where only its callers do."""
    return rendered("SET LOCAL check_function_bodies = off")


def refuses_moves(run: Run) -> bool:
    """Whether a row must not change its partition: on PostgreSQL 14 that is a delete, which its references' keys would act on."""
    return run.plan.server_version == 14 and any(
        f"ON DELETE {action}" in each.composite
        for each in (*run.plan.references, *run.plan.selves)
        for action in ("CASCADE", "SET NULL", "SET DEFAULT")
    )


def _carry(run: Run) -> Statements:
    """What hung on the source, given to the table that has its name now; the server rendered these texts before."""
    plan = run.plan
    for each in plan.carried:
        yield rendered(each.definition)
        if each.leaf and each.kind != "statistics":  # these it has since 03, which gathered them
            yield from (rendered(each.leaf.replace("\1", leaf.as_string(None))) for leaf in changes.leaves(run))
    for check in plan.checks:
        if not check.validated:
            yield add(plan.source, check.name, check.definition, check.comment)
    for key in plan.outgoing:
        definition = plan.becomes(key).removesuffix(" NOT VALID")
        if plan.server_version >= 18:
            yield add(
                plan.source, key.name, definition if "NOT ENFORCED" in definition else f"{definition} NOT VALID", key.comment
            )
        else:
            for leaf in changes.leaves(run):
                yield add(leaf, key.name, f"{definition} NOT VALID")
    for view in plan.views:
        yield rendered(view.definition)


def add(table: sql.Composable, name: str, definition: str, comment: str | None = None) -> sql.Composed:
    """Add a constraint, with its comment."""
    parts = [statement("ddl.add_constraint", table=table, constraint=(name,), definition=trusted(definition))]
    if comment:
        parts.append(statement("partition.comment_constraint", table=table, constraint=(name,), comment=comment))
    return sql.SQL("; ").join(parts)


def rename(run: Run, *, retire: bool) -> Statements:
    """Table, indexes and identity sequences take the retired names, or their own names back."""
    plan, schema = run.plan, run.plan.table.schema_name
    if not retire:
        yield statement("ddl.rename", table=run.names["retired"], to=run.names["name"])
    for index in plan.indexes:
        old, new = (index.name, index.retired_name) if retire else (index.retired_name, index.name)
        yield statement("cutover.rename_index", index=(schema, old), to=(new,))
    for own, retired in identity_sequences(run):
        old, new = (own, retired) if retire else (retired, own)
        yield statement("cutover.rename_sequence", sequence=(schema, old), to=(new,))
    if retire:
        yield statement("ddl.rename", table=plan.source, to=run.names["retired_name"])


def identity_sequences(run: Run) -> Iterator[tuple[str, str]]:
    """Of each its name, and the one that it retires by."""
    for column in run.plan.columns:
        if column.identity and column.identity_sequence:
            yield column.identity_sequence, fit(f"{column.identity_sequence}_retired")


def positions(run: Run, *, retire: bool) -> Statements:
    """After the names have changed: the identity sequences in use go on where the others stand."""
    schema = run.plan.table.schema_name
    for own, retired in identity_sequences(run):
        to = spelled((schema, own))
        if retire:
            other = sql.Identifier(schema, retired)
            yield statement("cutover.sequence_position", to=to, sequence=other, sequence_text=spelled(other))
        else:
            other = sql.Identifier(run.staging, own)
            yield statement(
                "cutover.sequence_position_back", to=to, original=(schema, own), sequence=other, sequence_text=spelled(other)
            )
