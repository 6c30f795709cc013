"""How a table is divided: LIST, RANGE or HASH partitions, from the parameters and from the rows that are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from runbook import words
from runbook.errors import BadInput
from runbook.facts import Column, Partition, Table
from runbook.parameters import Parameters, PartitionValue
from runbook.plan import fit
from runbook.possible import as_key
from runbook.session import Session
from runbook.statements import trusted

Value = str | None
Wanted = dict[str, list[PartitionValue] | str]
MOST = 1000  # partitions; more of them make every plan slow and exhaust the lock table
FORMS = {
    "hour": "YYYY_MM_DD_HH24",
    "day": "YYYY_MM_DD",
    "week": 'IYYY"w"IW',
    "month": "YYYY_MM",
    "quarter": 'YYYY"q"Q',
    "year": "YYYY",
}
LAST = {"smallint": 2**15 - 1, "integer": 2**31 - 1, "bigint": 2**63 - 1}
FINITE = {"D": "isfinite({})", "N": "{}::text NOT IN ('NaN', 'Infinity', '-Infinity')"}  # what steps can reach


@dataclass(frozen=True)
class Division:
    """The partitions, and what the rows that are there say of them; `homeless` are values that fit none, with counts.

    `frequent` is the value of most rows where rows share values (by list); `nulls` counts the rows that NULL makes homeless.
    """

    partitions: tuple[Partition, ...]
    rows: int
    nulls: int = 0
    frequent: Value = None
    homeless: tuple[tuple[str, int], ...] = field(default_factory=tuple)
    counted: tuple[dict[str, Any], ...] = ()  # by list: each value that occurs, the given one that it equals, and its rows


def divide(session: Session, given: Parameters, table: Table, key: Column) -> Division:
    """The partitions that the parameters ask for; raises BadInput when they contradict each other or the key's type."""
    _refuse_contradictions(given, table)
    if session.value("draft.category", type=key.type) == "C":  # nor do our own statements name its type with each value
        raise BadInput(
            f"{table.name} cannot be divided by {key.name}: {key.type} is a composite type, whose values no statement can name without a"
            " cast (0A000). Choose another key, such as one of its fields in a column of its own."
        )
    maker = {"list": _list, "range": _range, "hash": _hash}[given.partition_by]
    with refused(table.name, key, given.partition_by):
        found = maker(session, given, table, key)
    if wrong := [each.name for each in found.partitions if not each.name or len(each.name.encode()) > 63 or "\0" in each.name]:
        raise BadInput(f"{wrong[0]!r} cannot be a partition's name: give it 1 to 63 bytes.")
    if sum(partition.bound == "DEFAULT" for partition in found.partitions) > 1:
        raise BadInput("partitions has more than one default partition: keep one.")
    if not found.partitions:
        why = "no rows to take the partitions from: name them in partitions"
        if found.nulls == found.rows > 0:
            why = f"{words.counted(found.nulls, 'row')}, all with NULL in {key.name}: set null_value to what it becomes, or name partitions"
        raise BadInput(f"{table.name} has {why}.")
    refuse_too_many(len(found.partitions), table.name, given)
    return found


@contextmanager
def refused(table: str, key: Column, how: str) -> Iterator[None]:
    """Raises BadInput for what the key's type does not take."""
    try:
        yield
    except (psycopg.errors.UndefinedFunction, psycopg.DataError) as error:
        if " function " in str(error.diag.context):  # of an index, which the planner looks into
            raise BadInput(
                f"{table} has an index or a default with a function that looks for others by the search_path"
                f" ({error.diag.message_primary}): ALTER FUNCTION … SET search_path = …; first."
            ) from None
        raise BadInput(
            f"{key.name} ({key.type}) cannot be divided by {how} like that ({error.diag.message_primary}): choose"
            " another key, partition_by, every or partitions."
        ) from None


def refuse_too_many(number: int, table: str, given: Parameters) -> None:
    """Raises BadInput for more partitions than serve anybody."""
    if number > MOST:
        aside = (
            ' Of rows that lie far off, name a partition of their own: {"name": [null, "2020-01-01"]}, or delete them.'
            if given.every
            else ""
        )
        raise BadInput(f"That makes more than {MOST:,} partitions of {table}, and so many serve nobody: make them larger.{aside}")


def _refuse_contradictions(given: Parameters, table: Table) -> None:
    meant = {"every": "range", "modulus": "hash"}
    for name, kind in meant.items():
        if getattr(given, name) and given.partition_by != kind:
            raise BadInput(
                f'{name} is for partition_by = "{kind}", and {table.name} is to be partitioned by {given.partition_by}.'
            )


def _list(session: Session, given: Parameters, table: Table, key: Column) -> Division:
    """As given, or one a value that occurs, named after table and value."""
    place = _place(table, key)
    wanted: Wanted | None = given.partitions
    if not wanted:
        occur = [row["value"] for row in session.rows("draft.values", **place, most=MOST + 2) if row["value"] is not None]
        if len(occur) > MOST:
            raise BadInput(
                f"{key.name} has more than {MOST:,} values: name the partitions, or choose partition_by range or hash."
            )
        names: dict[str, list[PartitionValue] | str] = {}
        kept = {
            f"{table.name}_retired",
            given.backup or f"{table.name}_backup",
        }  # names that the original and the backup will have
        filled = _filled(session, given, key)
        for value in sorted({*occur, *([filled] if filled is not None else [])}):
            names[fit(f"{table.name}_{value}", {*names, *kept})] = [value]
        wanted = names
    found = list_bounds(session, wanted, key)
    values = [value for each in found for value in each.values]
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise BadInput(f"{', '.join(map(repr, twice))} stands in partitions more than once: a value can have only one place.")
    filled = _filled(session, given, key)
    if None in values and filled is not None:
        raise BadInput(
            f"null_value says what NULL becomes, and partitions has one for NULL: {table.name} can have only one of them."
        )
    # Which value is whose is for the type's own equality to say: 1.0 is 1.00.
    counted = session.rows(
        "draft.placed", **place, values=[value for value in values if value is not None], filled=filled, most=MOST
    )
    rows: Counter[Value] = Counter({row["given"]: row["rows"] for row in counted if row["given"] is not None})
    rows[None] = nulls = sum(row["rows"] for row in counted if row["value"] is None)
    sized = [each.model_copy(update={"rows": sum(rows[value] for value in each.values)}) for each in found]
    left = {str(row["value"]): row["rows"] for row in counted if row["given"] is None and row["value"] is not None}
    frequent = next(
        (row["value"] for row in counted if row["value"] is not None), next((v for v in values if v is not None), None)
    )
    settled = _settled(sized, sum(row["rows"] for row in counted), 0 if None in values else nulls, frequent, left)
    return replace(settled, counted=tuple(counted))


def list_bounds(session: Session, wanted: Wanted, key: Column) -> list[Partition]:
    """The partitions by list that are asked for, as SQL; raises BadInput for what the key's type cannot have."""
    found = []
    for name, each in wanted.items():
        if _is_default(name, each):
            found.append(Partition(name=name, bound="DEFAULT"))
            continue
        if not each:
            raise BadInput(f"{name} has no value: give it at least one.")
        own = tuple(None if value is None else as_key(session, key, value) for value in each)
        bound = sql.SQL("FOR VALUES IN ({})").format(sql.SQL(", ").join(map(sql.Literal, own))).as_string(None)
        found.append(Partition(name=name, bound=bound, values=own))
    return found


def _range(session: Session, given: Parameters, table: Table, key: Column) -> Division:
    """Bounds as given ([from, to]; null is MINVALUE or MAXVALUE), or steps over the range of the rows and `ahead` more."""
    place, kind, filled = _place(table, key), session.value("draft.category", type=key.type), _filled(session, given, key)
    finite: sql.Composable = trusted(FINITE.get(kind, "true").format(sql.Identifier(key.name).as_string(None)))
    wanted = dict(given.partitions or {})
    for each in range_bounds(session, wanted, key):  # what is named needs no step
        within = [
            sql.SQL("{} {} {}::{}").format(sql.Identifier(key.name), trusted(sign), sql.Literal(bound), place["type"])
            for sign, bound in zip((">=", "<"), each.values, strict=False)
            if bound is not None
        ]
        if each.values:
            finite = sql.SQL("{} AND NOT ({})").format(finite, sql.SQL(" AND ").join([trusted("true"), *within]))
    stepped = given.every != ""
    extent = session.row("draft.extent", **place, finite=finite if stepped else trusted("true"))
    if stepped:
        wanted = {**steps(session, given, table.name, key, extent["low"], extent["high"]), **wanted}
    elif given.partitions is None:
        raise BadInput(f'partition_by is "range": say every ({", ".join(FORMS)} or a number), or give partitions their bounds.')
    found = range_bounds(session, wanted, key)
    bounds = [bound for each in found for bound in each.values if bound is not None]
    rows = session.rows("draft.range_counts", **place, bounds=bounds, filled=filled) if bounds else []
    at = {bound: number for number, row in enumerate(rows) for bound in row["lower"] or []}
    sized, homes = [], set()
    for each in found:
        low, high = each.values or ("", "")
        own = range(at.get(low, 0), at.get(high, len(rows))) if each.values else range(0)
        homes |= {*own}
        sized.append(each.model_copy(update={"rows": sum(rows[number]["rows"] for number in own), "values": ()}))
    left = {
        f"from {row['lower'][0]}" if row["lower"] else "below the first bound": row["rows"]
        for number, row in enumerate(rows)
        if row["rows"] and number not in homes
    }
    return _settled(sized, extent["rows"], extent["nulls"] if filled is None else 0, None, left)


def range_bounds(session: Session, wanted: Wanted, key: Column) -> list[Partition]:
    """The partitions by range that are asked for, as SQL, their values the two bounds; raises BadInput as `list_bounds` does."""
    found = []
    for name, values in wanted.items():
        if _is_default(name, values):
            found.append(Partition(name=name, bound="DEFAULT"))
            continue
        if len(values) != 2:
            raise BadInput(
                f"{name} has {len(values)} bounds: give it two, the first that it takes and the first that it does not."
            )
        ends = [isinstance(value, str) and value.strip().upper() in ("MINVALUE", "MAXVALUE") for value in values]
        if any(ends):
            meant = {name: [None if end else value for end, value in zip(ends, values, strict=True)]}
            raise BadInput(f"{name} has the bounds {values}: MINVALUE and MAXVALUE are written null, as {json.dumps(meant)}.")
        low, high = (None if value is None else as_key(session, key, value) for value in values)
        text = sql.SQL("FOR VALUES FROM ({}) TO ({})").format(
            sql.SQL("MINVALUE") if low is None else sql.Literal(low), sql.SQL("MAXVALUE") if high is None else sql.Literal(high)
        )
        found.append(Partition(name=name, bound=text.as_string(None), values=(low, high)))
    return found


def steps(
    session: Session, given: Parameters, table: str, key: Column, low: Value, high: Value
) -> dict[str, list[PartitionValue]]:
    """Steps as `every` says, from that of `low` to `ahead` beyond that of `high`, each with its bounds."""
    every, kind = str(given.every), session.value("draft.category", type=key.type)
    place = {"type": trusted(key.type), "low": low, "high": high, "ahead": given.ahead, "most": MOST + 1}
    if kind == "D" and every in FORMS and (key.type, every) != ("date", "hour"):
        step = "3 months" if every == "quarter" else f"1 {every}"  # an interval knows no quarters
        rows = session.rows("draft.time_steps", **place, unit=every, step=step, form=FORMS[every])
    elif kind == "N" and every.isdecimal() and int(every) > 0:
        rows = session.rows("draft.number_steps", **place, step=int(every), last=LAST.get(key.type))
    else:
        raise BadInput(
            f"every is {given.every!r}, which does not fit {key.name} ({key.type}): a date or time takes {', '.join(FORMS)} (hour: a time only), a"
            " number takes a positive whole number. Of other steps partitions gives the bounds."
        )
    return {fit(f"{table}_{row['name']}"): [row["lower"], row["upper"]] for row in rows}


def _hash(session: Session, given: Parameters, table: Table, key: Column) -> Division:
    """`modulus` partitions, named after the table and the remainder, or by `partitions` ({"name": [remainder]})."""
    if given.modulus < 2:
        raise BadInput('partition_by is "hash": say modulus, the number of partitions, at least 2.')
    if given.modulus > MOST:
        raise BadInput(f"modulus is {given.modulus:,}, and more than {MOST:,} partitions serve nobody: make it smaller.")
    named: Wanted = given.partitions or {fit(f"{table.name}_{remainder}"): [remainder] for remainder in range(given.modulus)}
    remainders = [values[0] if isinstance(values, list) and len(values) == 1 else None for values in named.values()]
    if sorted(map(str, remainders)) != sorted(map(str, range(given.modulus))):
        raise BadInput(
            f'partitions by hash must name each remainder from 0 to {given.modulus - 1} once, as {{"name": [0]}}: leave partitions out,'
            " or complete it."
        )
    counted = session.row("draft.rows", **_place(table, key))
    rows = counted["rows"] // given.modulus  # an estimate: the remainder is only known of a table that stands
    found = [Partition(name=name, bound=f"FOR VALUES WITH (MODULUS {given.modulus}, REMAINDER {remainder})", rows=rows)
             for name, remainder in zip(named, remainders, strict=True)]  # fmt: skip
    return Division(tuple(found), counted["rows"], counted["nulls"] if _filled(session, given, key) is None else 0)


def _place(table: Table, key: Column) -> dict[str, Any]:
    return {"key": (key.name,), "table": (table.schema_name, table.name), "type": trusted(key.type)}


def _filled(session: Session, given: Parameters, key: Column) -> str | None:
    return None if given.null_value is None else as_key(session, key, given.null_value, "null_value")


def _is_default(name: str, values: list[PartitionValue] | str) -> bool:
    if isinstance(values, str) and values.lower() != "default":
        raise BadInput(f'{name} has the value {values!r}: give a list of values, or "default".')
    return isinstance(values, str)


def _settled(found: list[Partition], rows: int, nulls: int, frequent: Value, left: dict[str, int]) -> Division:
    """What fits no other partition goes into the default one, where there is one."""
    homeless = tuple(sorted(left.items(), key=lambda item: -item[1]))
    if any(partition.bound == "DEFAULT" for partition in found):
        total, homeless = sum(left.values()), ()
        found = [each.model_copy(update={"rows": total}) if each.bound == "DEFAULT" else each for each in found]
    return Division(tuple(found), rows, nulls, frequent, homeless)
