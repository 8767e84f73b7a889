"""Calibration samples without any data, made from what the model itself has kept of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from optcompiler.calibration_sources import CalibrationSource, Given, batch_dimension
from optcompiler.errors import InputError

if TYPE_CHECKING:
    from optcompiler.rewriting import Batch

Kind = Literal["auto", "image", "tokens", "floats"]
KINDS = ("auto", "image", "tokens", "floats")


@dataclass(frozen=True)
class Synthetic(CalibrationSource):
    """What `synthetic` makes."""

    name: ClassVar[str] = "synthetic"

    count: int = 128
    kind: Kind = "auto"
    steps: int | None = None
    limits: tuple[float, ...] = ()
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"synthetic: kind {self.kind!r}; give one of {', '.join(KINDS)}.")
        for name in ("count", "steps", "length"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "steps" else 1):
                raise InputError(f"synthetic: {name} is {value}; give a positive one.")
        if self.limits and (len(self.limits) != 2 or self.limits[0] >= self.limits[1]):
            raise InputError(
                f"synthetic: limits are {self.limits}; give the least and the greatest input."
            )

    def batches(self, given: Given) -> Iterator[Batch]:
        if batch_dimension(given.ports) is None:
            raise InputError(
                "synthetic: the model's inputs share no batch dimension; give calibration data."
            )
        kind = self.kind if self.kind != "auto" else kind_of(given)
        if kind == "tokens":
            from optcompiler.synthetic_tokens import token_batches

            return token_batches(self, given)
        from optcompiler.synthetic_floats import float_batches

        return float_batches(self, given, images=kind == "image")


def synthetic(
    count: int = 128,
    kind: Kind = "auto",
    *,
    steps: int | None = None,
    limits: tuple[float, ...] = (),
    length: int | None = None,
    seed: int = 0,
) -> Synthetic:
    """`count` calibration samples made without data, from the model alone; the same for a seed.

    `kind`: "image" ([N, C, H, W] floats), "floats", "tokens" (integers), or "auto": what the
    inputs are. Sizes that are symbolic are 32 for tokens and 64 for other inputs, within their
    bounds; `length` replaces them.

    Images and floats begin as noise (smooth in images) and are learned by gradient descent through
    the teacher, `steps` long (None: as many as a fixed amount of arithmetic allows), so that

    1. what BatchNormalization nodes read has the mean and the variance that they have kept (Yin et
       al., "Dreaming to distill", 2020, section 3.1; Cai et al., "ZeroQ", 2020);
    2. what looks like scores of classes is a confident choice of each class in turn, with targets
       of which the greatest probability is between 0.6 and 0.98;
    3. where nothing is kept, because normalisation was folded, no channel that is read by Relu or
       Clip is far off on one side of zero, as in the assumption of Nagel et al., "Data-free
       quantization", 2019, section 4.2.

    `limits` are the least and the greatest value of inputs. Where they are not given, those are
    taken of [-3, 3] (standardised), [-1, 1], [0, 1] and [0, 255] whose noise fits these goals best.

    Tokens are drawn from the teacher where it is a causal language model, at temperature 1 after a
    random first token (Liu et al., "LLM-QAT", 2023), in at most `steps` passes, and are else random
    rows of the table that they pick from; masks are ones with zeros at the end of some samples.

    Raises `InputError` for options out of range; when it is used, for a model whose inputs share no
    batch dimension.
    """
    return Synthetic(count, kind, steps, limits, length, seed)


def kind_of(given: Given) -> Kind:
    """What the inputs are, by their types and ranks."""
    floats = [p for p in given.ports if p.dtype in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")]
    if not floats:
        return "tokens"
    return "image" if all(len(p.shape) == 4 for p in floats) else "floats"
