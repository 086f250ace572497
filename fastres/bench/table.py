"""Tables and progress bars for people: rich's, which typer brings along."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table


def console(file: TextIO | None = None) -> Console:
    """A console on `file` (default: stdout); 130 columns wide where it is no terminal."""
    file = sys.stdout if file is None else file
    return Console(file=file, width=None if file.isatty() else 130, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Table:
    """A table; columns whose name starts with ">" are aligned to the right."""
    made = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def progress() -> Progress:
    """A progress bar with the remaining time, on stderr, so that stdout holds results alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=console(sys.stderr),
        transient=True,
    )


def figure(value: float | None, digits: int = 3) -> str:
    """`digits` significant figures without an exponent; a dash for None."""
    if value is None or value != value:
        return "–"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text or abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) >= 1 else text
    return text
