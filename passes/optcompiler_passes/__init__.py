"""The built-in passes, one a file, registered as any third party's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from optcompiler import hookimpl

if TYPE_CHECKING:
    from optcompiler import Pass


@hookimpl
def optcompiler_passes() -> Iterable[type[Pass]]:
    from optcompiler_passes.cast_bf16 import CastBf16
    from optcompiler_passes.codebook_weights import CodebookWeights
    from optcompiler_passes.correct_bias import CorrectBias
    from optcompiler_passes.distill import Distill
    from optcompiler_passes.equalize import Equalize
    from optcompiler_passes.fold_batchnorm import FoldBatchNorm
    from optcompiler_passes.fuse_operators import FuseOperators
    from optcompiler_passes.insert_qdq import InsertQdq
    from optcompiler_passes.move_integers import MoveIntegers
    from optcompiler_passes.pack_weights import PackWeights
    from optcompiler_passes.prune_channels import PruneChannels
    from optcompiler_passes.prune_dead_channels import PruneDeadChannels
    from optcompiler_passes.quantize_weights import QuantizeWeights
    from optcompiler_passes.reconstruct import Reconstruct
    from optcompiler_passes.simplify import Simplify
    from optcompiler_passes.unify_caps import UnifyCaps

    return [
        CastBf16, CodebookWeights, CorrectBias, Distill, Equalize, FoldBatchNorm, FuseOperators,
        InsertQdq, MoveIntegers, PackWeights, PruneChannels, PruneDeadChannels, QuantizeWeights,
        Reconstruct, Simplify, UnifyCaps,
    ]  # fmt: skip
