"""The whole way on real models: error, metric, latency beside stock ONNX Runtime, predictions.

    python benchmarks/spine.py                      # everything
    python benchmarks/spine.py --models digits      # one model
    python benchmarks/spine.py --only digits-table  # prune + int8, with and without distillation

Latencies of one model are taken in turn in one process, batch 1, one thread; pin the process
(`taskset -c 0`). Errors are the largest difference from eager torch over eight held-out inputs,
relative to the largest output.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import optcompiler as oc
from optcompiler.batching import Batched
from optcompiler.device import interleaved_us
from optcompiler.importing import quiet

sys.path.insert(0, str(Path(__file__).parent))
from models import CASES, Case, digits, digits_example, encoder

CONSOLE = Console(width=150)


def relative_error(case: Case, call: Callable[..., Any]) -> float:
    """Largest absolute difference from eager over the held-out inputs, over the largest output."""
    worst = scale = 0.0
    with torch.no_grad():
        for inputs in case.held_out:
            expected = case.module(*inputs)
            got = torch.as_tensor(np.asarray(call(*inputs)))
            worst = max(worst, float((got - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
    return worst / scale


class Stock:
    """ONNX Runtime as its users run it: the exporter's model, float or `quantize_static`."""

    def __init__(self, case: Case, int8: bool) -> None:
        import onnxruntime
        from onnxruntime import quantization as q

        directory = Path(tempfile.mkdtemp())
        path = directory / "model.onnx"
        with quiet():
            torch.onnx.export(
                case.module, case.inputs, path, dynamo=True, verbose=False, external_data=False
            )
        names = [i.name for i in onnxruntime.InferenceSession(path).get_inputs()]
        if int8:
            prepared, quantized = directory / "prepared.onnx", directory / "int8.onnx"
            q.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            rows = [dict(zip(names, map(np.asarray, b), strict=True)) for b in _single(case)]

            class Reader(q.CalibrationDataReader):
                def __init__(self) -> None:
                    self.rows = iter(rows)

                def get_next(self) -> dict[str, np.ndarray] | None:
                    return next(self.rows, None)

            q.quantize_static(
                str(prepared), str(quantized), Reader(), quant_format=q.QuantFormat.QDQ,
                per_channel=True, activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
            )  # fmt: skip
            path = quantized
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)
        self.names = names

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        feed = dict(zip(self.names, (t.numpy() for t in inputs), strict=True))
        return torch.from_numpy(self.session.run(None, feed)[0])


def _single(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """The calibration data one sample at a time, at most 64 of them."""
    rows = [tuple(t[i : i + 1] for t in b) for b in case.calibration for i in range(len(b[0]))]
    return rows[:64]


def compiled_for(case: Case, backend: str, precision: str, **options: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = oc.compile(
        case.module, case.inputs, target=oc.Target(backend, threads=1), precision=precision,
        calibration=_single(case) if precision != "fp32" else None,
        **options,
    )  # fmt: skip
    return compiled, time.perf_counter() - start


def spine(names: Sequence[str], backends: Sequence[str]) -> None:
    table = Table(title=f"batch 1, one thread; {machine()}")
    for column in ("model", "built by", "type", "error", "metric", "drop", "µs", "× stock fp32",
                   "× stock int8", "predicted µs", "off by", "compile s"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "built by") else "right")
    for name in names:
        case = CASES[name]()
        for row in _rows(case, backends):
            table.add_row(*row)
        table.add_section()
    CONSOLE.print(table)


def _rows(case: Case, backends: Sequence[str]) -> list[list[str]]:
    entries: list[tuple[str, str, Any, float | None]] = []
    for precision in ("fp32", "int8"):
        entries.append(("stock ONNX Runtime", precision, Stock(case, precision == "int8"), None))
    for backend in backends:
        for precision in ("fp32", "int8"):
            compiled, seconds = compiled_for(case, backend, precision)
            entries.append((backend, precision, compiled, seconds))
            CONSOLE.print(f"{case.name}: {backend} {precision} compiled in {seconds:.1f} s")
    times = interleaved_us([lambda e=e: e[2](*case.inputs) for e in entries], seconds=2.0)
    teacher = case.metric(case.module) if case.metric else None
    rows = []
    for (label, precision, call, seconds), took in zip(entries, times, strict=True):
        score = case.metric(Batched(call, 1)) if case.metric else None
        predicted = call.measurements["predicted_us"] if seconds is not None else None
        rows.append([
            case.name, label, precision, f"{relative_error(case, call):.1e}",
            f"{score:.2f}" if score is not None else "-",
            f"{teacher - score:+.2f}" if score is not None and teacher is not None else "-",
            f"{took:.0f}", f"{times[0] / took:.2f}", f"{times[1] / took:.2f}",
            f"{predicted:.0f}" if predicted else "-",
            f"{100 * (predicted - took) / took:+.0f} %" if predicted else "-",
            f"{seconds:.1f}" if seconds is not None else "-",
        ])  # fmt: skip
    return rows


def digits_table() -> None:
    """Prune + int8 on digits, with and without distillation.

    First half of the channels of every layer, whatever it costs; then what the planner takes when
    the accuracy may fall by half a point.
    """
    example = digits_example()
    case = digits()
    free = oc.Budget(max_damage=float("inf"), metric=example.accuracy)
    held = oc.Budget(max_drop=0.5, metric=example.accuracy)
    table = Table(
        title=f"digits CNN, fp32 {example.accuracy(case.module):.2f} % right; {machine()}"
    )
    for column in ("channels", "distilled", "% right", "drop", "MACs", "× fewer", "KL", "µs", "s"):
        table.add_column(column, justify="right")
    for label, budget, prune in (
        ("half of all", free, "prune-channels:keep_ratio=0.5"),
        ("drop ≤ 0.5", held, "prune-channels"),
    ):
        for distill in (None, "distill", "distill:steps=1500"):
            passes = ["simplify", "fold-batchnorm", prune, "insert-qdq", "pack-weights",
                      "move-integers", "fuse-operators"]  # fmt: skip
            start = time.perf_counter()
            compiled = oc.compile(
                case.module, (example.data()[2][:2],), dynamic="batch", precision="int8",
                target=oc.Target("cpu", threads=1, sizes={"batch": 1}),
                calibration=example.calibration(), budget=budget,
                passes=passes + ([distill] if distill else []),
            )  # fmt: skip
            seconds = time.perf_counter() - start
            m = compiled.measurements
            before, after = m["macs"]["before"], m["macs"]["after"]
            table.add_row(
                label, distill or "no", f"{m['metric']['student']:.2f}",
                f"{m['metric']['drop']:+.2f}", str(after), f"{before / after:.2f}",
                f"{m['damage']:.4f}", f"{m['measured_us']:.0f}", f"{seconds:.0f}",
            )  # fmt: skip
    CONSOLE.print(table)


def cuda_table() -> None:
    """The Triton backend under the interpreter: errors only, its times mean nothing."""
    table = Table(title="cuda through Triton's interpreter")
    for column in ("model", "type", "error", "kernels", "compile s"):
        table.add_column(column, justify="right")
    for case in (digits(), encoder()):
        for precision in ("fp32", "int8"):
            start = time.perf_counter()
            compiled = oc.compile(
                case.module, case.inputs, target=oc.Target("cuda", threads=1, interpret=1),
                precision=precision, calibration=_single(case)[:16],
                budget=oc.Budget(max_damage=float("inf")),
            )  # fmt: skip
            seconds = time.perf_counter() - start
            short = Case(case.name, case.module, case.inputs, [], case.held_out[:2])
            table.add_row(
                case.name, precision, f"{relative_error(short, compiled):.1e}",
                str(len(compiled.measurements["kernels"])), f"{seconds:.0f}",
            )  # fmt: skip
    CONSOLE.print(table)


def machine() -> str:
    import platform

    import onnxruntime

    from optcompiler.device import machine_name

    return (
        f"{machine_name()}, {os.cpu_count()} cores; torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--backends", default="onnxruntime,cpu")
    parser.add_argument("--only", choices=["spine", "digits-table", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only in (None, "spine"):
        spine(options.models.split(","), options.backends.split(","))
    if options.only in (None, "digits-table"):
        digits_table()
    if options.only in (None, "cuda"):
        cuda_table()


if __name__ == "__main__":
    main()
