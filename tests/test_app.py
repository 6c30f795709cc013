"""A real application before and after: Drizzle on node-postgres, and SQLAlchemy; its old code, and its new on what 07 wrote."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from runbook import application, points, verify
from runbook.drizzle import Drizzle
from runbook.ledger import Run
from runbook.orm import tables
from tests import migration
from tests.app import models
from tests.conftest import fresh
from tests.test_application import IMPORTS, INDEXED, TYPES, reflected

HERE = Path(__file__).with_name("app")
REFUSED = "23503 appointments_user_id_fkey"
# What nobody can migrate yet, and what is easy to declare wrong: tables that reference themselves and each other.
CIRCLES = """
CREATE TABLE trees (id integer PRIMARY KEY, parent integer REFERENCES trees, best integer, a integer, b integer, UNIQUE (a, b), FOREIGN KEY (a, b) REFERENCES trees (a, b));
CREATE TABLE leaves (id integer PRIMARY KEY, tree integer REFERENCES trees ON DELETE SET NULL ON UPDATE CASCADE, "class" text, "a-b" text, "a_b" text);
ALTER TABLE trees ADD FOREIGN KEY (best) REFERENCES leaves;
"""


def tool(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def built(server: Any, clinic_template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TypeScript application with its packages, compiled with the schema that 07 writes before the cut-over."""
    folder = tmp_path_factory.mktemp("node") / "app"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tool(folder, "npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
    for database in fresh(server, clinic_template):
        (folder / "after" / "schema.ts").write_text(application.Schema(migration.plan(database)).drizzle[1])
    for database in fresh(server, "template1"):
        with psycopg.connect(database) as connection:
            connection.execute(TYPES + CIRCLES + IMPORTS + INDEXED)  # type: ignore[arg-type]
        run, circles = migration.plan(database, table="my shop.the orders", key="region"), reflected(database)
        (folder / "odd.ts").write_text(Drizzle(tables(run, new=True)).text())
        (folder / "circles.ts").write_text(Drizzle(circles).text())
    tool(folder, "npx", "tsc", "-p", ".")
    return folder


def acts(built: Path, version: str, url: str) -> dict[str, str]:
    """Run the application; what became of each thing that it did, by name."""
    at = conninfo_to_dict(url)
    return dict(json.loads(tool(built / "built", "node", version, str(at["host"]), str(at["port"]), str(at["dbname"]))))


def shown(run: Run) -> dict[str, str]:
    points.show(run)
    return {each["what changes"]: each["seen"] for each in run.finished("application", "points").facts["points"]}  # type: ignore[union-attr]


def said_of_inserts(run: Run) -> str:
    return next(
        seen for what, seen in shown(run).items() if what.startswith("An insert into appointments that does not name user_role")
    )


@pytest.mark.node
@pytest.mark.long
@pytest.mark.parametrize("legacy", ["fill", "strict"])
def test_a_drizzle_application_before_and_after(clinic: str, built: Path, legacy: str) -> None:
    before = acts(built, "before.js", clinic)
    assert len(before) == 16 and set(before.values()) == {"ok"}
    run = migration.plan(clinic, legacy_inserts=legacy)
    migration.walk(run, migration.FORWARD)
    assert application.Schema(run).drizzle[1] == (built / "after" / "schema.ts").read_text()

    assert set(drop(acts(built, "after/main.js", clinic), "with another role").values()) == {"ok"}
    assert acts(built, "after/main.js", clinic)["book for doctor with another role"] == REFUSED
    by_email = {f"upsert {who} by email": "42P10" for who in ("patient", "doctor")}
    if legacy == "fill":
        assert acts(built, "before.js", clinic) == before | by_email
        verify.check(run)
        migration.walk(run, migration.END)
    else:
        assert said_of_inserts(run).startswith("23503: ") and "appointments_user_id_fkey" in said_of_inserts(run)
    # The final state: what the default says fits a patient; a doctor's appointment is refused, as 07 says.
    strict = drop(before, "cancel for doctor", "list for doctor") | by_email | {"book for doctor": REFUSED}
    assert acts(built, "before.js", clinic) == strict
    assert set(drop(acts(built, "after/main.js", clinic), "with another role").values()) == {"ok"}


def drop(report: dict[str, str], *ends: str) -> dict[str, str]:
    return {name: said for name, said in report.items() if not name.endswith(ends)}


def imported(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("legacy", ["fill", "strict"])
def test_a_sqlalchemy_application_before_and_after(clinic: str, tmp_path: Path, legacy: str) -> None:
    before = models.work(clinic, models, knows_role=False)
    assert before.pop("list for patient") == "2 of patient" and before.pop("list for doctor") == "2 of doctor"
    assert len(before) == 12 and set(before.values()) == {"ok"}
    run = migration.plan(clinic, legacy_inserts=legacy)
    new = imported(tmp_path / "models_after.py", application.Schema(run).sqlalchemy[1])
    migration.walk(run, migration.FORWARD)
    after = models.work(clinic, new, knows_role=True)
    assert after == before | {"list for patient": "2 of patient", "list for doctor": "2 of doctor"}
    old = models.work(clinic, models, knows_role=False)
    if legacy == "fill":
        assert old == after
        assert application.filled(run)["since yesterday"].sum() == 4, "two inserts for each, and none by the new models"
    else:
        refused = dict.fromkeys(("book for doctor", "book for doctor by the relationship"), REFUSED)
        assert old == after | refused | {"list for doctor": "0 of doctor"}
        assert said_of_inserts(run).startswith("23503: ")


@pytest.mark.long
def test_the_generated_models_are_typed(clinic: str, tmp_path: Path) -> None:
    path = tmp_path / "models_after.py"
    path.write_text(
        application.Schema(migration.plan(clinic)).sqlalchemy[1]
        + "\n\nrole: str = Appointments().user_role\nwrong: int = Appointments().user_role\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert said.stdout.count("error:") == 1, said.stdout
    assert 'variable has type "int"' in said.stdout
