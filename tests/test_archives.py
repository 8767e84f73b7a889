"""What torch.export.save writes passes; expressions and trees that would run something do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optcompiler.archives import screen_archive
from optcompiler.expressions import is_size_expression
from optcompiler.frontend import import_model
from tests.hostile.archives import GOOD


class Wide(torch.nn.Module):
    """Names, views, types, symbols and control flow as they come in real modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.blocks = torch.nn.ModuleDict({"a-b": torch.nn.Linear(8, 8)})
        self.tied = self.blocks["a-b"].weight
        self.register_buffer("positions", torch.arange(8)[None].expand(1, -1))
        self.narrow = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, *, scale: float | None = None) -> dict[str, object]:
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        h = torch.nn.functional.scaled_dot_product_attention(h, h, h)
        h = self.blocks["a-b"](h) + self.positions.float() + self.narrow.float()
        n = h.shape[1]
        h = torch.cond(h.sum() > 0, lambda a: a + 1, lambda a: a - 1, (h.contiguous(),))
        return {"k v": h[:, : n // 2], "t": (torch.arange(n // 2 * 2), 3)}


def test_a_saved_program_passes(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim("n", min=2)}, "scale": None}
    with torch.no_grad():
        exported = torch.export.export(
            Wide().eval(), (torch.ones(2, 3, 8, 8),), {"scale": None}, dynamic_shapes=shapes
        )
    torch.export.save(exported, tmp_path / "wide.pt2")
    screen_archive(tmp_path / "wide.pt2", "wide.pt2")
    imported = import_model(tmp_path / "wide.pt2")
    assert [p.name for p in imported.signature.parameters] == ["x", "scale"]


def test_the_program_that_the_corpus_spoils_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.pt2").write_bytes(GOOD)
    program = import_model(tmp_path / "good.pt2").program
    assert [n.op_type for n in program.graph] == ["Add"]


@pytest.mark.parametrize(
    "text",
    [
        "s77", "2*s77 + 1", "Max(1, 6*s0 - 12)", "s0//2", "Symbol('s77', positive=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", "Eq(Mod(s0, 8), 0)",
        "FloorDiv(s0, 2)", "Pow(Symbol('s0'), Integer(2))", "-int_oo", "s0**2 >= 4",
    ],
)  # fmt: skip
def test_sizes_pass(text: str) -> None:
    assert is_size_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch x')", "s0.__class__", "(lambda: 0)()", "open('x')",
        "[s0 for s0 in ()]", "s0[0]", "f'{s0}'", "exec('1')", "Symbol('s0; x')", "print(s0)", "",
        "9**9**9", "Pow(9, Pow(9, 9))", "Pow(Integer(9), Integer(999999999))", "1 << 10**10",
        "(" * 5000, "s0 := 1", "Symbol(*s0.args)", "sympify('1')", "9" * 400, "exit()", "os",
    ],
)  # fmt: skip
def test_code_and_bombs_do_not(text: str) -> None:
    assert not is_size_expression(text)
