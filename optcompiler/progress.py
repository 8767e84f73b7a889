"""Where long steps report: a bar with an ETA on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from optcompiler.rewriting import Progress


class Silent:
    """Shows nothing."""

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        yield from items

    def note(self, message: str) -> None:
        pass


class ConsoleProgress:
    """Bars and notes on `stream`, which is a terminal; bars of nested steps stand below each other.

    A bar leaves when its step ends, also when it ends early.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=stream or sys.stderr, markup=False, highlight=False)
        self._bars: Bars | None = None
        self._active = 0

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        from rich.markup import escape

        bars = self._start()
        task = bars.add_task(escape(description), total=len(items))
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            self._stop()

    def note(self, message: str) -> None:
        from rich.text import Text

        self._console.print(Text(message), soft_wrap=True)

    def _start(self) -> Bars:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        self._active += 1
        return self._bars

    def _stop(self) -> None:
        self._active -= 1
        if self._active == 0 and self._bars is not None:
            self._bars.stop()
            self._bars = None


def progress_on(stream: TextIO) -> Progress:
    """A `ConsoleProgress` when `stream` is a terminal, else `Silent`."""
    return ConsoleProgress(stream) if stream.isatty() else Silent()
