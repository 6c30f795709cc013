"""The record of an executed notebook is true, above all about failures: each is really made to happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from runbook import engine, forked
from runbook.engine import Executed, execute


def write(path: Path, *code: str, kernel: str = "python3") -> Path:
    """A notebook with a title, a parameters cell, the given cells and one that must not run after a failure."""
    spec = {"name": kernel, "language": "python", "display_name": kernel}
    cells = [new_code_cell(text) for text in ("x = 1", *code, "print('the last cell')")]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = new_notebook(metadata={"kernelspec": spec}, cells=[new_markdown_cell("# A title"), *cells])
    nbformat.write(notebook, path)
    return path


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def states(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.metadata.papermill.status for cell in notebook.cells]


def assert_failed_at_cell_2(target: Path, error_name: str, sentence: str) -> nbformat.NotebookNode:
    """The cell after title and parameters failed, for this reason; nothing later claims to have run."""
    notebook = read(target)
    assert states(notebook) == ["completed", "completed", "failed", "pending"]
    assert notebook.metadata.papermill.exception is True
    assert notebook.metadata.papermill.end_time
    said = notebook.metadata.runbook
    assert (said.state, said.cell, said.error_name) == ("failed", 2, error_name)
    assert sentence in said.error
    assert said.cell_id == notebook.cells[2].id
    assert notebook.cells[2].metadata.papermill.exception is True
    assert [out.ename for out in notebook.cells[2].outputs if out.output_type == "error"][-1] == error_name
    assert notebook.cells[3].execution_count is None and notebook.cells[3].outputs == []
    return notebook


def assert_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """As a command executes notebooks; what is started as usual is so in a process of its own."""
    forked.begin()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Executed, nbformat.NotebookNode, list[str]]:
    """One notebook without a failure, executed in an environment full of traps; shared, because it takes seconds."""
    folder = tmp_path_factory.mktemp("good {x}")
    wrong = folder / "data" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    wrong.joinpath("kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "language": "python", "display_name": "another Python"})
    )
    profile = folder / "ipython" / "profile_default" / "startup"
    profile.mkdir(parents=True)
    profile.joinpath("00.py").write_text("x = 'set by a start-up file'; planted = True")
    traps = {"JUPYTER_DATA_DIR": folder / "data", "MPLBACKEND": "agg", "IPYTHONDIR": folder / "ipython"}
    source = write(
        folder / "source.ipynb",
        "import sys, os; print(sys.executable, os.getcwd(), x, 'planted' in globals())\n"
        "print(get_ipython().kernel.parent.transport)",
        "import sys, time\n"
        "for done in range(8):\n"
        "    print(f'\\r{done} of 7 rows', end='', file=sys.stderr, flush=True)\n"
        "    print(f'block {done}', end='\\r', flush=True)\n"
        "    time.sleep(0.05)\n"
        "print(file=sys.stderr)\n"
        "print('all blocks')",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "print('password', 'open' + '-sesame')\nprint('postgresql://ann:tr0ub4dor@db/clinic')",
    )
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in traps.items():
            patch.setenv(name, str(value))
        said = execute(source, folder / "target.ipynb", {"x": 3}, on_output=heard.append, secrets=["open-sesame"], cwd=folder)
    return said, read(folder / "target.ipynb"), heard


def test_a_notebook_without_failure_is_completed_in_every_cell(
    good: tuple[Executed, nbformat.NotebookNode, list[str]],
) -> None:
    said, notebook, _ = good
    assert (said.failed_cell, said.error, said.error_name) == (None, "", "")
    assert said.seconds > 0
    assert set(states(notebook)) == {"completed"}
    assert notebook.metadata.runbook == {"state": "completed"}
    assert not notebook.metadata.papermill.exception


def test_the_kernel_is_this_interpreter_and_no_start_up_file_has_a_say(
    good: tuple[Executed, nbformat.NotebookNode, list[str]],
) -> None:
    said, notebook, _ = good
    assert notebook.cells[3].outputs[0].text == f"{sys.executable} {said.notebook.parent} 3 False\nipc\n"


def test_only_the_last_state_of_a_progress_bar_is_kept(
    good: tuple[Executed, nbformat.NotebookNode, list[str]],
) -> None:
    texts = {out.name: out.text for out in good[1].cells[4].outputs}
    assert texts == {"stderr": "7 of 7 rows\n", "stdout": "all blocks\n"}


def test_pictures_are_in_the_record_whatever_mplbackend_says(
    good: tuple[Executed, nbformat.NotebookNode, list[str]],
) -> None:
    assert "image/png" in good[1].cells[5].outputs[0].data


def test_standard_output_is_heard_as_it_comes_and_without_secrets(
    good: tuple[Executed, nbformat.NotebookNode, list[str]],
) -> None:
    said, _, heard = good
    assert "block 3\r" in heard[1:-1]
    assert "the last cell\n" in heard[-1]
    for text in ("".join(heard), said.notebook.read_text()):
        assert "open-sesame" not in text
        assert "tr0ub4dor" not in text
        assert "postgresql://ann:***@db/clinic" in text


def test_a_cell_that_raises_has_failed_and_later_cells_are_pending(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "from runbook.errors import BadInput\nraise BadInput('users has 3 rows whose role fits no partition: nurse (3).')"
    said = execute(write(tmp_path / "a.ipynb", code), tmp_path / "b.ipynb", {})
    sentence = "users has 3 rows whose role fits no partition: nurse (3)."
    assert (said.failed_cell, said.error, said.error_name) == (2, sentence, "BadInput")
    notebook = assert_failed_at_cell_2(tmp_path / "b.ipynb", "BadInput", sentence)
    assert notebook.cells[2].outputs[0].traceback == [f"BadInput: {sentence}"]
    assert_quiet(capfd)


@pytest.mark.long
def test_a_cell_that_runs_into_its_timeout_has_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "_source", None)  # a kernel that is started: before `import runbook` an error is IPython's own
    source = write(tmp_path / "a.ipynb", "import time\nprint('before')\ntime.sleep(60)")
    said = execute(source, tmp_path / "b.ipynb", {}, timeout_s=1)
    assert said.failed_cell == 2 and said.seconds < 20
    notebook = assert_failed_at_cell_2(tmp_path / "b.ipynb", "CellTimeoutError", "its limit of 1 seconds")
    assert notebook.cells[2].outputs[0].text == "before\n"
    stopped, folded, reason = notebook.cells[2].outputs[1:]
    assert (stopped.ename, stopped.traceback, reason.ename) == ("KeyboardInterrupt", ["KeyboardInterrupt"], "CellTimeoutError")
    assert folded.data["text/html"].startswith(
        "<details><summary>Traceback</summary>"
    )  # IPython's own: nothing of ours was imported
    assert "time.sleep(60)" in folded.data["text/html"] and "\x1b" not in str(folded.data)
    assert_quiet(capfd)


def test_a_cell_whose_kernel_was_killed_has_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    said = execute(source, tmp_path / "b.ipynb", {})
    assert (said.failed_cell, said.error_name) == (2, "DeadKernelError")
    assert_failed_at_cell_2(tmp_path / "b.ipynb", "DeadKernelError", "killed by SIGKILL")
    assert_quiet(capfd)


def test_a_cell_that_calls_sys_exit_has_failed(tmp_path: Path) -> None:
    said = execute(write(tmp_path / "a.ipynb", "import sys\nsys.exit(0)"), tmp_path / "b.ipynb", {})
    assert said.failed_cell == 2
    assert_failed_at_cell_2(tmp_path / "b.ipynb", "SystemExit", "sys.exit")


def test_without_its_kernel_a_notebook_has_failed_at_its_first_cell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = execute(write(tmp_path / "a.ipynb", "1", kernel="perl6"), tmp_path / "b.ipynb", {})
    assert said.failed_cell == 1
    notebook = read(tmp_path / "b.ipynb")
    assert states(notebook) == ["completed", "failed", "pending", "pending"]
    assert notebook.metadata.papermill.exception is True
    assert "There is no kernel named 'perl6' here" in notebook.metadata.runbook.error
    assert notebook.cells[1].outputs[0].ename == "NoSuchKernel"
    assert_quiet(capfd)


def begin(folder: Path, code: str, how: str = "started") -> subprocess.Popen[str]:
    """A process of its own that executes a.ipynb; returns when the cell of `code` runs."""
    write(folder / "a.ipynb", f"import os\nopen('.runs', 'w').write(str(os.getpid()))\nos.rename('.runs', 'runs')\n{code}")
    call = "from pathlib import Path; from runbook import forked; from runbook.engine import execute\n"
    call += "forked.begin()\n" if how == "forked" else ""
    call += "print(execute(Path('a.ipynb'), Path('b.ipynb'), {}))"
    process = subprocess.Popen(
        [sys.executable, "-c", call], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not (folder / "runs").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)
    return process


def ends(pid: int) -> None:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie has none
        assert time.monotonic() < until, f"{pid} goes on"
        time.sleep(0.05)


def test_a_kernel_that_is_forked_is_as_fresh_as_one_that_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.begin()
    monkeypatch.setenv("SET_SINCE", "yes")
    code = (
        "import os, sys\nprint(os.getppid(), os.getpid(), 'left' in globals(), 'matplotlib.pyplot' in sys.modules,"
        " os.environ['SET_SINCE'], '' in sys.path, os.getcwd())\nleft = sys.modules['left'] = 1"
    )
    said = []
    for _ in range(2):
        assert execute(write(tmp_path / "a.ipynb", code), tmp_path / "b.ipynb", {}, cwd=tmp_path).error == ""
        said.append(read(tmp_path / "b.ipynb").cells[2].outputs[0].text.split())
    (first, kernel, *rest), (second, another, *again) = said
    assert first == second != str(os.getpid()) and kernel != another, "two processes of one that is not this one"
    assert rest == again == ["False", "True", "yes", "True", str(tmp_path)]


@pytest.mark.parametrize("how", ["forked", pytest.param("started", marks=pytest.mark.long)])
def test_a_table_is_whole_as_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    forked.begin()
    if how == "started":
        monkeypatch.setattr(forked, "_source", None)
    code = "import runbook, pandas\npandas.DataFrame([[f'column {n}' for n in range(40)]] * 200)"
    execute(write(tmp_path / "a.ipynb", code), tmp_path / "b.ipynb", {})
    text = read(tmp_path / "b.ipynb").cells[2].outputs[0].data["text/plain"]
    assert " ... " not in text and text.count("column 39") == 200


@pytest.mark.long
def test_what_kernels_are_forked_from_can_be_killed(tmp_path: Path) -> None:
    forked.begin()
    kill = "import os, pathlib, signal\npathlib.Path('{0}').write_text(str(os.getpid()))\nos.kill(os.{0}(), signal.SIGKILL)\nprint('goes on')"
    execute(write(tmp_path / "a.ipynb", kill.format("getpid")), tmp_path / "b.ipynb", {}, cwd=tmp_path)
    assert_failed_at_cell_2(tmp_path / "b.ipynb", "DeadKernelError", "SIGKILL")
    assert execute(write(tmp_path / "a.ipynb", kill.format("getppid")), tmp_path / "b.ipynb", {}, cwd=tmp_path).error == ""
    assert read(tmp_path / "b.ipynb").cells[2].outputs[0].text == "goes on\n"
    for name in ("getpid", "getppid"):
        ends(int(tmp_path.joinpath(name).read_text()))
    assert not forked.begun(), "the next is started as usual, and the next command begins anew"
    assert execute(write(tmp_path / "a.ipynb", "1"), tmp_path / "b.ipynb", {}).error == ""


WORK = "import time\ntry:\n    time.sleep(60)\nfinally:\n    print('34 of 80 ranges are done')"


@pytest.mark.long
@pytest.mark.parametrize("how", ["started", "forked"])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_an_interrupted_process_leaves_a_true_record_with_the_kernels_last_words(
    tmp_path: Path, number: signal.Signals, name: str, how: str
) -> None:
    process = begin(tmp_path, WORK, how)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert err == "" and process.returncode == 0
    assert f"failed_cell=2, error='{'Interrupted' if name != 'Terminated' else 'Told to end'} ({number.name})" in out
    notebook = assert_failed_at_cell_2(tmp_path / "b.ipynb", name, number.name)
    assert notebook.cells[2].outputs[0].text == "34 of 80 ranges are done\n"


@pytest.mark.long
@pytest.mark.parametrize("how", ["started", "forked"])
def test_a_killed_process_leaves_a_record_that_claims_nothing_and_no_kernel(tmp_path: Path, how: str) -> None:
    process = begin(tmp_path, WORK, how)
    kernel = int(tmp_path.joinpath("runs").read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    ends(kernel)
    notebook = read(tmp_path / "b.ipynb")
    assert states(notebook) == ["completed", "completed", "running", "pending"]
    assert notebook.metadata.runbook.state == "running"
    assert notebook.metadata.papermill.end_time is None


@pytest.mark.long
def test_plain_papermill_with_this_engine_leaves_the_same_record(tmp_path: Path) -> None:
    write(tmp_path / "a.ipynb", "import os\nraise OSError('postgresql://ann:tr0ub4dor@db is not there')")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "papermill", "--engine", "runbook", "--cwd", "out", "a.ipynb", "b.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "tr0ub4dor" not in done.stderr + tmp_path.joinpath("b.ipynb").read_text()
    assert_failed_at_cell_2(tmp_path / "b.ipynb", "OSError", "postgresql://ann:***@db is not there")


def test_a_record_that_takes_long_to_write_is_written_seldom_and_whole_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, really = [0], engine.write_whole

    def slowly(path: Path, text: str) -> None:
        written[0] += 1
        time.sleep(0.2)
        really(path, text)

    monkeypatch.setattr(engine, "write_whole", slowly)
    result = execute(write(tmp_path / "a.ipynb", *(f"print({n})" for n in range(30))), tmp_path / "b.ipynb", {})
    assert result.error == "" and written[0] < 30, "twice a cell without"
    notebook = read(tmp_path / "b.ipynb")
    assert set(states(notebook)) == {"completed"} and "29\n" in [
        out.text for cell in notebook.cells for out in cell.get("outputs", ())
    ]
