"""What the partition key can be, by its type and its checks, though no row is that yet; and what null_value would make of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import psycopg

from runbook.errors import BadInput
from runbook.facts import Column, Finding, Named
from runbook.plan import Plan, identifiers
from runbook.session import Session
from runbook.statements import spelled, trusted
from runbook.words import counted

SAMPLE = 500  # rows


def doubled(session: Session, plan: Plan) -> Iterator[Finding]:
    """Keys that many rows may share while the partition key is NULL, and no two once null_value stands there."""
    for index in plan.indexes if plan.key_nullable and plan.null_value is not None else ():
        others = [name for name in index.columns if name != plan.key]
        expression = "(" in index.tail.partition("(")[2].partition(")")[0]  # of these the forecast's sample has to tell
        if not index.unique or plan.key not in index.columns or expression:
            continue
        rows = session.value(
            "draft.doubles", table=plan.source, key=(plan.key,), filled=plan.null_value, type=trusted(plan.key_type),
            predicate=trusted(index.tail.partition(" WHERE ")[2] or "true"), others=identifiers(others or [plan.key]),
            given=trusted(" AND ".join(f"{spelled((name,))} IS NOT NULL" for name in others) or "true"),
        )  # fmt: skip
        if rows:
            yield Finding.blocker(
                index.name,
                f"{counted(rows, 'row')} of {plan.full_name} would be doubles in {index.name} ({', '.join(index.columns)})"
                f" once NULL in {plan.key} is {plan.null_value!r}.",
                "Make them differ, set null_value to a value that no row has beside these, or by list give NULL a partition.",
            )


def filled(session: Session, plan: Plan) -> Iterator[Finding]:
    """A foreign key by which null_value would refer to nobody: it would fail when it is validated, after the cut-over. And what
    is computed from the key, and would become another value."""
    for row in session.rows("catalog.computed_from", oid=plan.table.oid, key=plan.key) if plan.null_value is not None else ():
        yield Finding.blocker(
            row["name"], f"{row['name']} is computed from {plan.key}, and would become another value where null_value takes the place of NULL.",
            "Drop that column before, and make it anew after the cut-over; or by list give NULL a partition.",
        )  # fmt: skip
    for row in session.rows("catalog.outgoing", oid=plan.table.oid) if plan.null_value is not None else ():
        referenced = (row["referenced_schema"], row["referenced_table"])
        if row["columns"] == [plan.key] and not session.value(
            "draft.exists", table=referenced, column=(row["referenced"],), value=plan.null_value, type=trusted(plan.key_type)
        ):
            yield Finding.blocker(
                row["name"], f"{plan.key} references {'.'.join(referenced)}, which has no row {plan.null_value!r} that null_value could refer to.",
                "Insert that row first, or set null_value to one that is there.",
            )  # fmt: skip


def orphaned(session: Session, plan: Plan) -> Iterator[Finding]:
    """Rows that a key of the table to itself would refuse: there is no row to give their new column its value, so that 03 could not
    copy them. Those of other tables 04 looks for."""
    for each in plan.selves:
        key = {"schema": each.schema_name, "table": each.table, "constraint": each.name}
        for found in session.rows("foreign_keys.orphans", **key) if each.adds_column else ():
            rows = session.value("foreign_keys.count", search=trusted(found["query"])) if found["readable"] else 0
            if rows:
                yield Finding.blocker(
                    each.name, f"{counted(rows, 'row')} of {plan.full_name} {'refers' if rows == 1 else 'refer'} to nothing by {each.name}, whose columns are to hold the key"
                    f" of the row referred to: they came while keys were not checked, and are found by {found['query']}.", "Correct or delete them first.",
                )  # fmt: skip


def emptied(session: Session, plan: Plan) -> Iterator[Finding]:
    """Keys whose action sets the partition key to NULL, which it cannot be any more."""
    for row in session.rows("catalog.outgoing", oid=plan.table.oid) if plan.key_nullable and not plan.takes_null else ():
        if " SET NULL" in row["definition"] and plan.key in row["columns"]:
            yield Finding.warning(
                row["name"], f"From the cut-over on {plan.key} is NOT NULL: a row of {row['referenced_schema']}.{row['referenced_table']} that is deleted or changed sets"
                f" {plan.key} to NULL by {row['name']}, which is refused (23502).",
                f"Let the application give the rows that refer to it another {plan.key} first; or by list give NULL a partition.",
            )  # fmt: skip


def recomputed(session: Session, plan: Plan, size: int | None = SAMPLE) -> Iterator[Finding]:
    """Stored generated columns that would not be copied as they are: a function was replaced since, and a copied row is computed anew.
    By the first rows, which are the oldest mostly; without a `size` by all."""
    for row in session.rows("catalog.stored", oid=plan.table.oid):
        rows = 0  # also where its function may not be executed, or misses what it reads
        with suppress(psycopg.Error), session.connection.transaction(force_rollback=True):
            session.connection.execute("SET LOCAL search_path TO DEFAULT")
            rows = session.value("catalog.held_otherwise", source=plan.source, size=size, otherwise=trusted(row["otherwise"]))
        if rows:
            yield Finding.blocker(
                f"{plan.full_name}.{row['name']}",
                f"{counted(rows, 'row')} of {plan.full_name}{f' (of the first {size})' if size else ''} {'holds' if rows == 1 else 'hold'} another {row['name']} than its"
                " expression gives today, as where a function was replaced since; each copy is computed anew, and would differ.",
                f"UPDATE {plan.full_name} SET {row['base']} = {row['base']} WHERE {row['otherwise']}; computes it anew." if row["base"] else "Make that column anew.",
            )  # fmt: skip


def unlisted(session: Session, plan: Plan) -> Iterator[Finding]:
    """What an enum, a boolean or a check lets the key be and no row is yet."""
    if plan.partition_by != "list" or plan.takes_any_value:
        return
    domain = session.row("draft.domain", type=plan.key_type, key_text=spelled((plan.key,)))
    checks = [*plan.checks, *map(Named.model_validate, domain["checks"])]
    values = [row["label"] for row in session.rows("draft.labels", type=domain["type"])]
    by = [plan.key_type] if values else []
    for check in () if values else checks:
        named = _named(session, plan.key, domain["type"], check)
        if named and _allowed(session, plan.key, domain["type"], check, named) is not None:
            values, by = [*values, *named], [*by, check.name]
    for check in checks if values else ():
        allowed = _allowed(session, plan.key, domain["type"], check, values)
        values = values if allowed is None else allowed
    taken = {value for partition in plan.partitions for value in partition.values}
    if left := [value for value in dict.fromkeys(values) if value not in taken]:
        listed = ", ".join(map(repr, left[:10])) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        yield Finding.warning(
            f"{plan.full_name}.{plan.key}", f"No partition takes {listed}, which {plan.key} ({', '.join(by)}) can be: such a row will be refused (23514).",
            'Add a partition for them, or a default partition ({"name": "default"}).',
        )  # fmt: skip


def _allowed(session: Session, key: str, type_: str, check: Named, values: list[str]) -> list[str] | None:
    """Those that a check allows; None where other columns decide, too."""
    condition = trusted(check.definition.removeprefix("CHECK ").removesuffix(" NO INHERIT").removesuffix(" NOT VALID"))
    try:
        with session.connection.transaction():
            rows = session.rows("draft.allowed", key=(key,), type=trusted(type_), condition=condition, values=values)
            return [row["value"] for row in rows]
    except psycopg.Error:
        return None


CAST = re.compile(r"::(?:\"[^\"]*\"|[a-z_]+(?: [a-z_]+)*)(?:\(\d+(?:,\d+)?\))?(?:\[\])?")
LITERALS = {"S": re.compile(r"'((?:[^']|'')*)'"), "N": re.compile(r"(?<![\w.'])'?(-?\d+)\)?'?(?![\w.'])")}


def _named(session: Session, key: str, type_: str, check: Named) -> list[str]:
    """The values that a check compares the key with, as the key's type prints them."""
    own = re.escape(spelled((key,))), re.escape(key)
    text = CAST.sub("", check.definition)
    literals = LITERALS.get(session.value("draft.category", type=type_))
    if not literals or "~" in text or not re.search(rf'(?<![\w"])(?:{own[0]}|{own[1]}|\((?:{own[0]}|{own[1]})\)) = ', text):
        return []
    found = []
    for value in dict.fromkeys(each.replace("''", "'") for each in literals.findall(text)):
        with suppress(psycopg.DataError, psycopg.IntegrityError), session.connection.transaction():  # no value of this type
            found.append(str(session.value("draft.literal", value=value, type=trusted(type_))))
    return found


def rewritten(session: Session, plan: Plan) -> Iterator[Finding]:
    """Where a guard keeps a key: row triggers that change rows for which its own has not fired yet."""
    for row in session.rows("catalog.self_writers", oid=plan.table.oid) if plan.guards else ():
        yield Finding.warning(
            row["name"], f"The trigger {row['name']} of {plan.full_name} writes to it: where that is another row of the statement for which it fires, its"
            " keys are not known to what keeps them unique yet, so that the statement can be refused (23505), or a value stays taken.",
            'Let it write to the row for which it fires only, or make it FOR EACH STATEMENT; or choose unique = "per_partition".',
        )  # fmt: skip


def as_key(session: Session, key: Column, value: object, given: str = "partitions") -> str:
    """The value, which this parameter has, as the key's type prints it; raises BadInput when the type does not take it."""
    if not isinstance(value, str) and session.value("draft.category", type=key.type) == "S":
        raise BadInput(
            f"{value!r} is no text, and {key.name} ({key.type}) holds text: put it in quotes in {given}. YAML reads no, 007 and 12:30"
            " as something else."
        )
    try:
        with session.connection.transaction():
            return str(session.value("draft.literal", value=str(value), type=trusted(key.type)))
    except psycopg.DataError:
        raise BadInput(f"{value!r} is not a value that {key.name} ({key.type}) can have: correct it in {given}.") from None
    except psycopg.IntegrityError as error:  # a domain's check, which old rows may break
        raise BadInput(
            f"{value!r} is not a value that {key.name} ({key.type}) can have ({error.diag.message_primary}): correct it in {given};"
            " where that does not name it, correct the rows that hold it, or the domain."
        ) from None
