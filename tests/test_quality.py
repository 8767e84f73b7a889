"""The quality benchmark: twins compute the same, tables say what was lost, steps end as asked."""

from __future__ import annotations

import torch

import optcompiler as oc
from benchmarks.quality import ours, tables
from benchmarks.zoo import nets


def test_twins_compute_what_their_nets_do_with_channels_far_apart():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 32, 32, generator=generator)
    for build in nets.NETS.values():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = build()
        net.train()(x)
        net.eval()
        twin = nets.twin(net)
        with torch.no_grad():
            expected, got = net(x), twin(x)
            block = twin.blocks[1]
            ranges = block.act1(block.conv1(twin.blocks[0](twin.stem(x)))).amax((0, 2, 3))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
        live = ranges[ranges > 0]
        assert live.max() > 100 * live.min()


def result(subject: str, tool: str, score: float | None, **changes) -> dict:
    entry = {"subject": subject, "tool": tool, "setting": "w8a8", "samples": 64, "seed": 0,
             "variant": "", "score": score, "seconds": 2.0, "peak_mb": 10.0}  # fmt: skip
    return entry | changes


RESULTS = [
    result("resnet", "fp32", 90.0, setting="fp32", samples=0),
    result("gpt", "fp32", 2.0, setting="fp32", samples=0),
    result("resnet", "ours", 89.9),
    result("resnet", "ours", 89.7, seed=1),
    result("resnet", "nncf", None),
    result("resnet", "ours", 88.0, samples=8),
    result("gpt", "ours", 2.005),
]


def test_a_table_says_what_was_lost_and_how_far_seeds_lie_apart():
    text = tables.drops(RESULTS)
    assert "| optcompiler | +0.20 ± 0.10 | +2.00 |" in text
    assert "| NNCF | failed | - |" in text
    assert "| optcompiler | +0.0050 |" in text
    assert "| resnet | optcompiler | w8a8 | 64 | 2 | 10 |" in tables.costs(RESULTS)


def test_the_ablation_holds_each_step_and_those_before_it():
    registry = oc.Registry()

    def names(variant: str) -> list[str]:
        return [p.name for p in ours.pipeline(variant, registry) if p.name in ours.TUNING]

    assert names("mse") == []
    assert names("equalize") == ["equalize"]
    assert names("") == names("distill")
    assert names("reconstruct")[-1] == "reconstruct"
    plain = next(p for p in ours.pipeline("min-max", registry) if p.name == "insert-qdq")
    assert plain.options()["observer"] == "minmax"
    rows = [result("resnet", "fp32", 90.0), result("resnet", "ours", 80.0, variant="mse")]
    assert "| resnet, W8A8, 64 samples | +10.00 |" in tables.ablation(rows)
