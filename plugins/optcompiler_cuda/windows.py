"""Sliding windows: where in the image a tap of a filter or a pooling window falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optcompiler_cuda.text import Axis, KernelText, Lane


@dataclass(frozen=True)
class Tap:
    """Tap number `index` (text) of a window `size` high and wide, row by row."""

    kernel: KernelText
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    size: tuple[int, int]
    index: str
    lane: Lane | None = None

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The row and the column of the tap in its window."""
        height, width = self.size
        if width == 1:
            return Axis(self.index if height > 1 else "0", self.lane), Axis("0")
        if height == 1:
            return Axis("0"), Axis(self.index, self.lane)
        across = self.kernel.number("WIDTH", width)
        return (
            Axis(f"({self.index} // {across})", self.lane),
            Axis(f"({self.index} % {across})", self.lane),
        )

    def position(
        self,
        row: Axis,
        column: Axis,
        image: Sequence[int],
        out: Sequence[int],
        lane: Lane,
    ) -> tuple[tuple[Axis, Axis], str]:
        """The image's row and column under the tap, and what holds where they lie inside.

        `row` and `column` index the output, whose height and width are `out`; `lane` is theirs.
        The guard is "" when every tap of every window is inside.
        """
        names, guards = [], []
        for d, (at, tap, letter) in enumerate(
            zip((row, column), self.axes, ("y", "x"), strict=True)
        ):
            stride = self.kernel.number(f"STRIDE_{letter.upper()}", self.strides[d])
            dilation = self.kernel.number(f"DILATION_{letter.upper()}", self.dilations[d])
            before = self.kernel.number(f"PAD_{letter.upper()}", self.pads[d])
            terms = []
            if at.text != "0":
                terms.append(at.text if stride == "1" else f"{at.text} * {stride}")
            if tap.text != "0":
                terms.append(tap.text if dilation == "1" else f"{tap.text} * {dilation}")
            text = " + ".join(terms) or "0"
            if before != "0":
                text = f"{text} - {before}"
            last = (out[d] - 1) * self.strides[d] + (self.size[d] - 1) * self.dilations[d]
            if self.pads[d] > 0 or last >= image[d]:
                size = self.kernel.number(f"IN_{letter.upper()}", image[d])
                self.kernel.line(f"{letter} = {text}")
                guards += [f"({letter} >= 0)", f"({letter} < {size})"]
                text = letter
            names.append(Axis(text if text.isidentifier() or text == "0" else f"({text})", lane))
        return (names[0], names[1]), " & ".join(guards)
