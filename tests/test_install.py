"""Both ways of installing find notebooks and SQL, from any working directory."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from runbook import postgres
from runbook.statements import folder

ROOT = Path(__file__).parents[1]
ASKED = """
from runbook.statements import folder, statement
assert len(list(folder("notebooks").glob("*.ipynb"))) >= 9 and (folder("notebooks") / "clinic.yaml").is_file()
for path in folder("sql").glob("*.sql"):
    print(path.name)
print(statement("ledger.exists").as_string(None))
"""
pytestmark = pytest.mark.long


def pip(python: Path | str, *words: str) -> None:
    """pip; the dependencies are those of this interpreter."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *words, "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", str(ROOT), "--wheel-dir", str(out))
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment that sees this one's libraries, but not this one's runbook."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    # Behind what is installed there: a path file that names this interpreter's libraries, whose own path files are not read.
    Path(own.stdout.strip(), "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python


def said(cwd: Path, *words: str | Path) -> str:
    """What a program prints that knows nothing of this checkout."""
    known = {name: value for name, value in postgres.environment().items() if name != "PYTHONPATH"}
    known["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))  # nbconvert's templates
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, env=known)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_notebooks_and_sql(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(metadata).decode())
    assert about["Name"] == "partition-runbook"
    for kind in ("notebooks", "sql"):
        assert {f"runbook/{kind}/{path.name}" for path in folder(kind).iterdir() if path.is_file()} <= names
    assert not [name for name in names if name.startswith(("tests/", ".ci/"))]


def test_an_installed_wheel_works_from_another_folder(wheel: Path, elsewhere: Path, tmp_path: Path) -> None:
    pip(sys.executable, "--python", str(elsewhere), "install", str(wheel))
    assert str(tmp_path) in said(tmp_path, elsewhere, "-c", "import runbook; print(runbook.__file__)")
    assert "to_regclass('runbook.migration')" in said(tmp_path, elsewhere, "-c", ASKED)
    runbook = elsewhere.with_name("runbook")
    assert "version 0.2.0" in said(tmp_path, runbook, "--version")
    assert "00_plan           done" in said(tmp_path, runbook, "run", "--reset", "--users", "3", "--to", "plan")
    assert (tmp_path / "runs" / "index.html").is_file()


def test_an_editable_install_works_from_another_folder(elsewhere: Path, tmp_path: Path) -> None:
    pip(sys.executable, "--python", str(elsewhere), "install", "-e", str(ROOT))
    assert "clinic.sql" in said(tmp_path, elsewhere, "-c", ASKED)
