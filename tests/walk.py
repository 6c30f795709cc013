"""The notebooks' own code, cell by cell in this process: what a kernel would do, without the seconds that one takes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import nbformat
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from runbook import postgres
from runbook.statements import folder
from tests.servers import Server, wheel

FORWARD = ("00_plan", "01_backup", "02_partition", "03_restore", "04_foreign_keys", "05_cutover", "06_verify", "07_application")
REPAIR = ("00_plan", "03_restore", "04_foreign_keys", "06_verify", "07_application")
EVERY = (*FORWARD, "08_monitor", "20_add_partitions", "90_rollback", "91_finish")
CLINIC_FILE = str(folder("notebooks") / "clinic.yaml")
CLINIC: dict[str, Any] = {
    "table": "users",
    "key": "role",
    "partitions": {"users_patients": ["user"], "users_doctors": ["doctor"], "users_admins": ["admin"]},
    "unique": "per_partition",
    "backup": "users_backup",
    "approved_by": "ann",
}


def notebook(name: str) -> Path:
    """Where the notebook lies."""
    return folder("notebooks") / f"{name}.ipynb"


def cells(name: str) -> list[Any]:
    """The notebook's cells."""
    return list(nbformat.read(notebook(name), as_version=4).cells)


def walk(at: str, *names: str, **parameters: Any) -> dict[str, Any]:
    """Run the code of these notebooks (without names: of the way forward) on the database `at`, with the clinic's parameters
    or with others; returns what the last one's cells assigned."""
    given = {**CLINIC, "database": at} | parameters
    space: dict[str, Any] = {}
    for name in names or FORWARD:
        space = {"__name__": name}
        for number, cell in enumerate(cells(name)):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}[{number}]", "exec"), space)
                if "parameters" in cell.metadata.get("tags", []):
                    space |= {key: value for key, value in given.items() if key in space}
    return space


def client(program: str, *arguments: str, text: str | None = None) -> str:
    """What psql or pg_dump prints; raises CalledProcessError, with what it said, when it fails."""
    command = [str(wheel(18) / "bin" / program), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=postgres.environment(), check=False)
    assert done.returncode == 0, f"{program} failed: {done.stderr}"
    return done.stdout


def dump(database: str, *options: str) -> str:
    """The database as pg_dump writes it, but for the order of a table's rows and for the ledger's rows."""
    lines: list[str] = []
    rows: list[str] | None = None
    for line in client("pg_dump", f"--dbname={database}", "--exclude-table-data=runbook.*", *options).splitlines():
        if line.startswith(("\\restrict", "\\unrestrict")):  # a word that is new each time
            continue
        if rows is None:
            lines.append(line)
            rows = [] if line.startswith("COPY ") and line.endswith(" FROM stdin;") else None
        elif line == "\\.":
            lines += [*sorted(rows), line]
            rows = None
        else:
            rows.append(line)
    return "\n".join(lines)


def restored(server: Server, database: str) -> str:
    """The whole database as pg_dump writes it once it was dumped and restored; raises AssertionError where that fails."""
    copy = f"{conninfo_to_dict(database)['dbname']}_restored"
    name = sql.Identifier(copy)
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
        try:
            url = server.url(copy)
            text = client("pg_dump", f"--dbname={database}").replace("SET transaction_timeout = 0;", "")  # 17 and newer have it
            client("psql", "-Xq1", "--set=ON_ERROR_STOP=1", f"--dbname={url}", text=text)
            return dump(url)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
