"""The benchmark: the notebooks against a hand-written offline script, in turns, on copies of one clinic."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import click
import psycopg
import yaml
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook import embedded
from runbook.statements import folder
from tests import servers

HERE = Path(__file__).parent
OFFLINE = "offline script"
RATIO, ROW_RATIO = 0.75, 1.1  # to reach: against the script; a row of the largest against one of the smallest


@dataclass(frozen=True)
class Turn:
    """One migration: seconds a step, and the peak memory of the process that ran it, in MiB."""

    seconds: dict[str, float]
    memory: float = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def runbook_steps(url: str) -> Turn:
    """Runs the code cells of the notebooks 00 to 06 in this process; imports come before the clock starts."""
    parameters = yaml.safe_load((folder("notebooks") / "clinic.yaml").read_text())
    parameters |= {"database": url, "approved_by": "the benchmark"}
    paths = sorted(folder("notebooks").glob("0[0-6]_*.ipynb"))
    notebooks = {path.stem: list(code_cells(path)) for path in paths}
    for cells in notebooks.values():
        for _, tree in cells:
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), "imports", "exec"), {})
    seconds = {}
    for name, cells in notebooks.items():
        namespace: dict[str, Any] = {"__name__": "__main__", "display": lambda *shown, **options: None}
        begin = time.perf_counter()
        for number, (tags, tree) in enumerate(cells):
            exec(compile(tree, f"{name}, code cell {number}", "exec"), namespace)
            if "parameters" in tags:
                namespace |= {key: value for key, value in parameters.items() if key in namespace}
        seconds[name] = time.perf_counter() - begin
        namespace.clear()  # and with it the connections, as at the end of a kernel
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Turn(seconds, peak / (2**20 if sys.platform == "darwin" else 2**10))


def code_cells(path: Path) -> Iterator[tuple[list[str], ast.Module]]:
    """Tags and syntax tree of each code cell."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield cell["metadata"].get("tags", []), ast.parse("".join(cell["source"]))


def runbook(conninfo: str) -> Turn:
    """The notebooks in a process of their own, so that its peak memory is theirs."""
    found = conninfo_to_dict(conninfo)
    url = f"postgresql://{found['user']}@/{found['dbname']}?host={quote(str(found['host']))}&port={found['port']}"
    command = [sys.executable, "-m", "tests.bench", "--only", url]
    environment = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"The notebooks failed:\n{done.stderr[-4000:]}")
    return Turn(**json.loads(done.stdout))


def offline(conninfo: str) -> Turn:
    command = [
        embedded.binaries("psql"),
        "-Xq1d",
        conninfo,
        "-v",
        "ON_ERROR_STOP=1",
        "-f",
        HERE / "offline.sql",
    ]
    begin = time.perf_counter()
    done = subprocess.run(command, env=embedded.environment(), capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"The offline script failed:\n{done.stderr}")
    return Turn({OFFLINE: time.perf_counter() - begin})


@contextlib.contextmanager
def copied(server: str, template: str) -> Iterator[str]:
    """A copy of the template's files, written to disk, as its own changes are before the next turn."""
    names = {"copy": sql.Identifier("bench"), "template": sql.Identifier(template)}
    with psycopg.connect(server, autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {copy} TEMPLATE {template} STRATEGY file_copy")
        connection.execute(create.format(**names))
        connection.execute("CHECKPOINT")
        os.sync()
        yield make_conninfo(server, dbname="bench")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names["copy"]))
        connection.execute("CHECKPOINT")


def load(server: str, users: int) -> str:
    """Makes the template database with so many users; returns its name."""
    template = f"clinic_{users}"
    click.echo(f"Loading {users:,} users and {2 * users:,} appointments", err=True)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(template)))
    conninfo = make_conninfo(server, dbname=template)
    embedded.load_clinic(conninfo, users)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
    return template


def measure(server: str, users: int, runs: int) -> tuple[list[Turn], list[Turn]]:
    """The turns of the offline script and of the notebooks; the two go first alternately."""
    template = load(server, users)
    turns: dict[Any, list[Turn]] = {offline: [], runbook: []}
    for number in range(runs):
        for method in (offline, runbook) if number % 2 == 0 else (runbook, offline):
            with copied(server, template) as conninfo:
                turns[method].append(method(conninfo))
            click.echo(f"  {method.__name__}: {turns[method][-1].total:.2f} s", err=True)
    return turns[offline], turns[runbook]


def report(users: int, by_hand: list[Turn], notebooks: list[Turn]) -> float:
    """Prints one table; returns the notebooks' median seconds."""
    ours = median(turn.total for turn in notebooks)
    theirs = median(turn.total for turn in by_hand)
    click.echo(f"\n{users:,} users, {2 * users:,} appointments; medians of {len(notebooks)} runs in turn\n")
    for step in notebooks[0].seconds:
        click.echo(f"  {step:<24}{median(turn.seconds[step] for turn in notebooks):>9.2f} s")
    click.echo(f"  {'all notebooks':<24}{ours:>9.2f} s")
    click.echo(f"  {OFFLINE:<24}{theirs:>9.2f} s")
    click.echo(f"  {'ratio':<24}{ours / theirs:>9.2f}     to reach: at most {RATIO}")
    click.echo(f"  {'peak memory of Python':<24}{max(turn.memory for turn in notebooks):>9.0f} MiB")
    return ours


@click.command()
@click.option("--users", default=1_000_000, show_default=True, help="Users of the clinic; twice the appointments.")
@click.option("--sizes", help="Several numbers of users, such as 100000,1000000: adds the time per row.")
@click.option("--runs", default=3, show_default=True, help="How often each of the two migrates.")
@click.option("--only", hidden=True, metavar="URL", help="Run the notebooks once against this database.")
def main(users: int, sizes: str | None, runs: int, only: str | None) -> None:
    """Time the notebooks against the hand-written offline script, on an embedded server of their own."""
    if only:
        with contextlib.redirect_stdout(io.StringIO()):
            turn = runbook_steps(only)
        click.echo(json.dumps({"seconds": turn.seconds, "memory": turn.memory}))
        return
    chosen = sorted(int(size) for size in sizes.split(",")) if sizes else [users]
    with servers.own_home():
        server = make_conninfo(embedded.start(users=0), dbname="postgres")
        taken = {size: report(size, *measure(server, size, runs)) for size in chosen}
    if len(chosen) > 1:
        first, last = (taken[size] / size * 1e6 for size in (chosen[0], chosen[-1]))
        click.echo(f"\n  time per row: {first:.2f} µs of {chosen[0]:,}, {last:.2f} µs of {chosen[-1]:,}:")
        click.echo(f"  {'ratio':<24}{last / first:>9.2f}     to reach: at most {ROW_RATIO}")


if __name__ == "__main__":
    main()
