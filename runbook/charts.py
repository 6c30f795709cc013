"""Pictures of what was done and seen; they survive in the archive, without a server and without a script."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from runbook.cutover import Swap
from runbook.ledger import Run

BLUE, SKY, ORANGE, RED = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"  # Okabe and Ito: apart for the colour-blind, and in grey


class Picture(Figure):
    """A figure that shows itself as PNG in any notebook; it needs neither pyplot nor a chosen backend."""

    def draw(self, renderer: Any) -> None:
        with warnings.catch_warnings():  # a name's emoji that no font has becomes a box, not a page of warnings
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


class Bars(NamedTuple):
    """One bar a line, with the text at its end."""

    label: str
    colour: str
    lengths: Sequence[float]
    texts: Sequence[str]
    starts: Sequence[float] | None = None


def _plain(text: object, length: int = 44) -> str:
    """A name as a label: no formula, one line, not too long; a tree's indent stays."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    return (line if len(line) <= length else f"{line[: length - 1]}…").replace("$", r"\$")


def _draw(title: str, unit: str, names: Sequence[object], *sides: Bars, beside: bool = False, left: bool = False) -> Picture:
    """Horizontal bars, `beside` each other or over each other; labels at the left edge keep a tree's shape."""
    lines, share = len(names), len(sides) if beside else 1
    picture = Picture(figsize=(9, min(14.0, 1.3 + 0.3 * max(lines, 2) * (1 + 0.4 * (share - 1)))), layout="constrained")
    axes = picture.add_subplot(frameon=False)
    for number, side in enumerate(sides):
        places = [line + (number - (share - 1) / 2) * 0.8 / share * beside for line in range(lines)]
        bars = axes.barh(places, side.lengths, 0.74 / share, left=side.starts or 0, color=side.colour, label=side.label)
        axes.bar_label(bars, list(side.texts), padding=3, fontsize=8)
    axes.set_title(_plain(title, 70), loc="left", fontsize=11)
    axes.set_yticks(range(lines), [_plain(name) for name in names], ha="left" if left else "right")
    axes.set(xlabel=unit, ylim=(lines - 0.5, -0.5), axisbelow=True)
    axes.tick_params(axis="y", length=0, pad=6.4 * max((len(_plain(name)) for name in names), default=1) if left else 3)
    axes.grid(axis="x", color="#e5e7eb")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    if len(sides) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(sides), frameon=False, fontsize=8)
    return picture


def rows_per_partition(frame: pd.DataFrame) -> Picture:
    """How the rows are spread; `frame` has name and rows."""
    total = max(1, int(frame["rows"].sum()))
    texts = [f"{rows:,} ({rows / total:.1%})" for rows in frame["rows"]]
    return _draw("Rows per partition", "rows", list(frame["name"]), Bars("", BLUE, list(frame["rows"]), texts))


def before_after(frame: pd.DataFrame) -> Picture:
    """Rows per partition when the plan was made and now; `frame` has name, before and rows."""
    return _beside(frame, "name", "Rows before and after", "rows", "{:,}", before="when the plan was made", rows="now")


def latency(frame: pd.DataFrame) -> Picture:
    """Median milliseconds of each look-up, retired table beside result; `frame` has look_up, retired_ms and result_ms."""
    unit, sides = "milliseconds, planning included", {"retired_ms": "retired table", "result_ms": "partitioned table"}
    return _beside(frame, "look_up", "Median latency of a look-up, in turns", unit, "{:.3g}", **sides)


def forecast(frame: pd.DataFrame) -> Picture:
    """Seconds of each step, as 00 foretold them and as they were; `frame` has what, unit, forecast and actual."""
    steps = frame[frame["unit"] == "s"].dropna(subset=["actual"] if frame["actual"].notna().any() else [])
    sides = {"forecast": "forecast", "actual": "what it took"}
    return _beside(steps, "what", "What 00 foretold, and what it took", "seconds of work", "{:.2f}", **sides)


def _beside(frame: pd.DataFrame, names: str, title: str, unit: str, form: str, **sides: str) -> Picture:
    known = [side for side in sides if frame[side].notna().any()]
    texts = {side: [form.format(each) for each in frame[side]] for side in known}
    bars = [Bars(sides[side], BLUE if side == known[-1] else SKY, list(frame[side]), texts[side]) for side in known]
    return _draw(title, unit, list(frame[names]), *bars, beside=True)


def partition_tree(frame: pd.DataFrame) -> Picture:
    """The partitions under their root, with their sizes; `frame` has name, level, table_bytes and index_bytes."""
    table, index = frame["table_bytes"] / 1e6, frame["index_bytes"] / 1e6
    names = ["    " * (level - 1) + "└ " * (level > 0) + name for name, level in zip(frame["name"], frame["level"], strict=True)]
    sizes = Bars("indexes", SKY, list(index), [f"{size:,.2f}" for size in table + index], list(table))
    return _draw("Partitions and their sizes", "MB", names, Bars("table", BLUE, list(table), [""] * len(names)), sizes, left=True)


def over_time(frame: pd.DataFrame, column: str, title: str) -> Picture:
    """A line for each partition through the looks at it; `frame` has at, name and the column."""
    picture = Picture(figsize=(9, 3.4), layout="constrained")
    axes = picture.add_subplot(frameon=False)
    for number, (name, line) in enumerate(frame.groupby("name")):
        colour, dashes = (BLUE, ORANGE, RED, SKY)[number % 4], ("-", "--", ":")[number // 4 % 3]
        axes.plot(line["at"], line[column], color=colour, linestyle=dashes, marker="o", markersize=4, label=_plain(name))
    axes.set_title(_plain(title, 70), loc="left", fontsize=11)
    axes.set(ylabel=column, ylim=(0, None), axisbelow=True)
    axes.grid(axis="y", color="#e5e7eb")
    axes.tick_params(axis="x", rotation=20, labelsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return picture


def lock_timeline(swap: Swap) -> Picture:
    """Each attempt of the swap on the clock, in seconds, and in the last one the time for which names were locked."""
    names, locked = [f"attempt {n}" for n, _ in enumerate(swap.attempts, 1)], [0.0] * (len(swap.attempts) - 1) + [swap.locked_s]
    waiting = Bars("waiting for locks", ORANGE, [length for _, length in swap.attempts], [""] * len(names))
    return _locked("The swap", "seconds since the swap began", names, [start for start, _ in swap.attempts], waiting, locked)


def run_timeline(run: Run) -> Picture:
    """Every action of the ledger, the last time that it was done, one after the other; in red, when names were locked."""
    history = run.database.frame("ledger.history", migration=run.migration)
    done = history[history["state"] == "done"].drop_duplicates(["step", "action"], keep="last").sort_values("started_at")
    lengths = (done["finished_at"] - done["started_at"]).dt.total_seconds().tolist()
    names = (done["step"] + " · " + done["action"]).tolist()
    swap = run.finished("cutover", "swap")
    locked = [float(swap.facts["locked_s"]) if swap and name == "cutover · swap" else 0.0 for name in names]
    starts = [sum(lengths[:line]) for line in range(len(lengths))]
    work = Bars("at work", BLUE, lengths, [f"{length:.2f} s" for length in lengths])
    return _locked(run.plan.full_name, "seconds of work; pauses are left out", names, starts, work, locked)


def _locked(title: str, unit: str, names: list[str], starts: list[float], bars: Bars, locked: list[float]) -> Picture:
    begun = [start + length - lock for start, length, lock in zip(starts, bars.lengths, locked, strict=True)]
    label = f"names locked, {sum(locked) * 1000:.0f} ms"
    return _draw(title, unit, names, bars._replace(starts=starts), Bars(label, RED, locked, [""] * len(locked), begun))
