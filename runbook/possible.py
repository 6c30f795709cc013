"""What the partition key can be, by its type and its checks, though no row is that yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import psycopg

from runbook.facts import Finding, Named
from runbook.plan import Plan
from runbook.session import Session
from runbook.statements import spelled, trusted


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
