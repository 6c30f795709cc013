"""The composite foreign keys, which take the place of those to the source: added NOT VALID at the swap, validated after it."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from runbook.changes import Statements
from runbook.facts import Reference
from runbook.ledger import Run
from runbook.references import names, tables
from runbook.session import Session
from runbook.statements import spelled, statement, trusted

# (what, statement, the tables that it needs SHARE ROW EXCLUSIVE on for an instant)
Validations = Iterator[tuple[str, sql.Composed, list[sql.Identifier]]]


def drop_old(run: Run) -> Statements:
    """The keys to the source, which the composite ones replace."""
    for reference in run.plan.references:
        yield statement("ddl.drop_constraint", table=reference.identifier, constraint=(reference.name,))


def add_composite(run: Run) -> Statements:
    """The composite keys, NOT VALID: checked for every new row from now on, for the old ones later under a light lock."""
    for reference in run.plan.references:
        yield from _not_valid(run, reference, reference.composite)


def add_old(run: Run) -> Statements:
    """The inverse of drop_old, NOT VALID."""
    for reference in run.plan.references:
        yield from _not_valid(run, reference, reference.definition.removesuffix(" NOT VALID"))


def by_leaf(run: Run, reference: Reference) -> bool:
    """Whether the key is to be checked on each leaf and then adopted: before 18 a partitioned table takes no NOT VALID key."""
    return bool(reference.leaves) and run.plan.server_version < 18


def _not_valid(run: Run, reference: Reference, definition: str) -> Statements:
    own = {**names(run, reference), "definition": trusted(definition)}
    if not by_leaf(run, reference):
        yield statement("foreign_keys.add_key", **own)
        yield from _comment(reference)
        return
    for leaf, _ in tables(run, reference):
        yield statement("foreign_keys.add_key", **(own | {"reference": leaf}))


def validate(run: Run, reference: Reference, definition: str, session: Session | None = None) -> Validations:
    """Check the old rows of a key that is NOT VALID, under SHARE UPDATE EXCLUSIVE; before 18 a partitioned table adopts its
    partitions' keys then, without a scan of them. With a session: what is left of it."""
    what, own = f"{reference.name} of {reference.table}", {**names(run, reference), "definition": trusted(definition)}
    if not by_leaf(run, reference):
        yield what, statement("ddl.validate", table=reference.identifier, constraint=(reference.name,)), []
        return
    for leaf, validated in tables(run, reference, session):
        if session is None or validated is False:
            yield what, statement("ddl.validate", table=leaf, constraint=(reference.name,)), []
    if session is None or not session.value("foreign_keys.keyed", **own):
        adopt = [
            statement("ddl.add_constraint", table=own["reference"], constraint=own["constraint"], definition=own["definition"]),
            *_comment(reference),
        ]
        yield what, sql.SQL("; ").join(adopt), [reference.identifier, run.plan.source]


def _comment(reference: Reference) -> Statements:
    if reference.comment:
        constraint, comment = sql.Identifier(reference.name), sql.Literal(reference.comment)
        yield statement("partition.comment_constraint", table=reference.identifier, constraint=constraint, comment=comment)


def validations(run: Run, session: Session | None = None) -> Validations:
    """What checks the old rows of each composite key."""
    for reference in run.plan.references:
        if session is not None and not session.value("catalog.there", name=spelled(reference.identifier)):
            continue  # the table was dropped since
        if not reference.definition.endswith("NOT VALID"):  # and stays that
            yield from validate(run, reference, reference.composite, session)
