"""What pg_dump says of a database, object by object, and what may differ once a table is partitioned."""

from __future__ import annotations

import re

from runbook.ledger import Run
from runbook.plan import fit
from tests.walk import client

ENTRY = re.compile(r"^-- Name: (.*); Type: ([^;]*); Schema: ([^;]*); .*$")


def schema(database: str) -> dict[tuple[str, str], str]:
    """(type, name) → text of every object, the ledger left out."""
    found: dict[tuple[str, str], str] = {}
    entry = ("", "")
    dumped = client("pg_dump", f"--dbname={database}", "--schema-only", "--exclude-schema=runbook*")
    for line in dumped.splitlines():
        if match := ENTRY.match(line):
            entry = (match[2], match[1])
            while entry in found:
                entry = (entry[0], entry[1] + "'")
            found[entry] = ""
        elif line and not line.startswith(("--", "SET default_", "\\")) and entry[0]:
            found[entry] += line + "\n"
    return found


def differences(before: dict[tuple[str, str], str], after: dict[tuple[str, str], str], run: Run) -> list[str]:
    """What a migration lost, changed or added beyond what partitioning means; each as a line."""
    plan = run.plan
    root, leaves = plan.table.name, [partition.name for partition in plan.partitions]
    added = {(reference.table, reference.role_column) for reference in (*plan.references, *plan.selves) if reference.adds_column}
    for (kind, name), text in before.items():  # a referencing table may be partitioned
        if kind == "TABLE ATTACH":
            added |= {(name, role) for table, role in added if f".{table} ATTACH" in text}
    leaf_indexes = {name for index in plan.indexes for name in index.leaf_names.values()}
    statistics = set[str]()
    for leaf in leaves:
        of_leaf = set[str]()
        for each in plan.carried:
            if each.kind == "statistics":
                of_leaf.add(fit(f"{leaf}_{each.name}", of_leaf))
        statistics |= of_leaf
    ours = {plan.retired, plan.backup, *leaves, *leaf_indexes, *statistics, *(index.retired_name for index in plan.indexes)}
    elsewhere = {index.name for index in plan.indexes if not index.everywhere}
    composite = {f"{reference.table} {reference.name}" for reference in (*plan.references, *plan.selves) if reference.adds_column}

    def of_ours(name: str, text: str) -> bool:
        plain = name.replace('"', "")
        return (
            any(re.search(rf"(^| ){re.escape(each.replace(chr(34), ''))}($|[ .(])", plain) for each in ours)
            or bool(re.search(r"_retired\b|\bretired_", plain))
            or "runbook" in name
            or f".{plan.retired}" in text
            or name.removeprefix("FUNCTION ") == fit(f"{root}_keep_partition") + "()"
            or (bool(plan.guards) and plan.guard_schema.replace('"', "") in text.replace('"', ""))
        )

    def normal(kind: str, name: str, text: str) -> str:
        text = re.sub(r"\nPARTITION BY .*;", ";", text)
        text = re.sub(r"\)\nWITH \(.*\);", ");", text)  # storage options are the partitions'
        text = text.replace(" ON ONLY ", " ON ").replace("ALTER TABLE ONLY ", "ALTER TABLE ")
        lines = []
        for line in text.splitlines():
            if (
                kind == "TABLE"
                and name == root
                and re.match(rf'\s*"?{re.escape(plan.key.replace(chr(34), chr(34) * 2))}"? ', line)
            ):
                line = re.sub(r" (CONSTRAINT \S+ )?NOT NULL", "", line)
            if kind == "TABLE" and any(
                name == table and re.match(rf'\s*"?{re.escape(role.replace(chr(34), chr(34) * 2))}"? ', line)
                for table, role in added
            ):
                continue
            if kind == "TABLE" and any(
                name == table and "CHECK" in line and role.replace('"', '""') in line for table, role in added
            ):
                continue
            if (line.startswith("ALTER TABLE") and " CLUSTER ON " in line) or (
                "ALTER INDEX" in line and "ATTACH PARTITION" in line
            ):
                continue
            lines.append(line.rstrip(","))
        if kind == "CONSTRAINT" and name == f"{root} {next(index.name for index in plan.indexes if index.primary)}":
            lines = [
                re.sub(
                    r" \(([^)]*)\)",
                    lambda m: (
                        " ("
                        + ", ".join(
                            each
                            for each in m[1].split(", ")
                            if each.removeprefix('"').removesuffix('"').replace('""', '"') != plan.key
                        )
                        + ")"
                    ),
                    line,
                    count=1,
                )
                for line in lines
            ]
        if kind == "FK CONSTRAINT" and name in composite:
            lines = []
        return "\n".join(lines)

    found = []
    kept = {key: text for key, text in after.items() if not of_ours(key[1], text)}
    for key, text in before.items():
        if key[0] in ("INDEX", "CONSTRAINT", "COMMENT") and elsewhere & {
            key[1].removeprefix(f"{root} "),
            key[1].partition(" ON ")[0].partition(" ")[2],
        }:
            continue
        was = normal(*key, text)
        if key not in kept:
            found.append(f"lost: {key} {was}")
        elif (now := normal(*key, kept[key])) != was:
            found.append(f"changed: {key}\n  {was}\n  {now}")
    attached = {key for key in kept if key[0] == "INDEX ATTACH" and key[1].startswith(tuple(f"{leaf}_" for leaf in leaves))}
    found += [f"new: {key} {text}" for key, text in kept.items() if key not in before and key not in attached]
    return found
