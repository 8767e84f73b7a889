"""Sources that make calibration samples: what they make, that it is the same again, what it costs
in memory, and what is said of options that do not fit."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import optcompiler as oc
from optcompiler.calibration import load_calibration
from optcompiler.calibration_sources import CalibrationSource, Given
from optcompiler.errors import InputError
from optcompiler.lock import data_hash
from optcompiler.ops import builtin_table
from optcompiler.program import Program
from optcompiler.progress import Silent
from optcompiler.signature import Signature
from optcompiler.sources import calibration_from_reference
from tests.support import filled_program

NET = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[n,2,6,6] x) => (float[n,3] y)
<float[4,2,3,3] w, float[4] s, float[4] b, float[4] mean, float[4] var, float[4,3] v> {
    [conv] a = Conv <pads=[1,1,1,1]> (x, w)
    [norm] c = BatchNormalization (a, s, b, mean, var)
    [relu] d = Relu (c)
    [pool] e = GlobalAveragePool (d)
    [flat] f = Flatten (e)
    [head] y = MatMul (f, v)
}
"""


def network(text: str = NET) -> Program:
    """Filled with seeded weights, and with statistics of inputs that are nothing like noise."""
    if "BatchNormalization" not in text:
        return filled_program(text)
    plain = {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}
    seen = 0.3 * images(64).cumsum(3) + np.float32([[[0.8]], [[-0.5]]])
    mean, variance = read_by_norm(filled_program(NET, **plain), seen)
    return filled_program(text, mean=mean, var=variance)


def given_of(program: Program, seed: int = 0) -> Given:
    signature = Signature.of_program(program)
    return Given(program, signature, builtin_table(), seed, Silent())


def made(source: CalibrationSource, given: Given) -> list[dict[str, np.ndarray]]:
    return [dict(b) for b in load_calibration(source, given.signature, given=given)]


def joined(batches: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([b[name] for b in batches])


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2, 6, 6)).astype(np.float32)


# -- synthetic --------------------------------------------------------------------------------


def read_by_norm(program: Program, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from optcompiler.executor import interpret

    values = interpret(program, {"x": x}, ["a"])["a"]
    return values.mean((0, 2, 3)).numpy(), values.var((0, 2, 3)).numpy()


def test_what_a_normalisation_reads_comes_to_the_statistics_that_it_has_kept():
    program = network()
    given = given_of(program)
    x = joined(made(oc.synthetic(32, steps=300), given), "x")
    noise = images(32)
    assert x.shape == (32, 2, 6, 6)

    kept_mean, kept_variance = (program.weights()[n].numpy() for n in ("mean", "var"))

    def far(values: np.ndarray) -> float:
        mean, variance = read_by_norm(program, values)
        off = (mean - kept_mean) ** 2 / kept_variance
        return float((off + (np.sqrt(variance / kept_variance) - 1) ** 2).mean())

    assert far(x) < 0.05 * far(noise)


def test_without_statistics_more_classes_are_chosen_than_by_noise():
    text = NET.replace("[norm] c = BatchNormalization (a, s, b, mean, var)", "c = Identity (a)")
    text = text.replace("float[4] s, float[4] b, float[4] mean, float[4] var, ", "")
    head = 4 * np.float32([[3, -1, -1], [-1, 3, -1], [-1, -1, 3], [0, 0, 0]])
    program = filled_program(text, v=head)
    x = joined(made(oc.synthetic(24, steps=200), given_of(program)), "x")

    def chosen(values: np.ndarray) -> set[int]:
        return set(program.to_torch()(torch.from_numpy(values))[0].argmax(1).tolist())

    assert chosen(images(24)) < chosen(x)
    assert np.abs(x).max() <= 3.0


def test_the_same_seed_gives_the_same_samples_and_another_does_not():
    program = network()

    def digest(seed: int, compile_seed: int = 0) -> str:
        return data_hash(made(oc.synthetic(8, steps=5, seed=seed), given_of(program, compile_seed)))

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1), digest(0, 1)}) == 3


def test_the_range_of_inputs_is_taken_from_the_statistics():
    program = network()
    text = NET.replace("Conv <pads=[1,1,1,1]> (x, w)", "Conv <pads=[1,1,1,1]> (z, w)")
    text = text.replace("    [conv] a", "    m = Sub (x, c0)\n    z = Div (m, k)\n    [conv] a")
    text = text.replace("float[4] s,", "float c0, float k, float[4] s,")
    weights = {name: tensor.numpy() for name, tensor in program.weights().items()}
    wide = filled_program(text, **weights, c0=np.float32(127), k=np.float32(42))
    x = joined(made(oc.synthetic(8, steps=2), given_of(wide)), "x")
    assert x.max() > 64
    x = joined(made(oc.synthetic(8, steps=2), given_of(program)), "x")
    assert x.max() < 4


def test_limits_hold():
    given = given_of(network())
    x = joined(made(oc.synthetic(8, steps=30, limits=(0.0, 2.0)), given), "x")
    assert x.min() >= -1e-6
    assert x.max() <= 2 + 1e-6


def test_a_model_of_batch_one_gets_batches_of_one():
    program = network(NET.replace("float[n,", "float[1,"))
    batches = made(oc.synthetic(5, steps=3), given_of(program))
    assert [b["x"].shape[0] for b in batches] == [1] * 5


def test_a_model_without_anything_to_go_by_gets_noise():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[n,4] x, bool[n] b) => (float[n,4] y) {
        [number] c = Floor (x)
        [axes] one = Constant <value_ints=[1]> ()
        [column] k = Unsqueeze (b, one)
        [zero] z = Sub (c, c)
        [picked] y = Where (k, c, z)
    }
    """
    (first, second) = (made(oc.synthetic(40), given_of(Program.from_text(text))) for _ in range(2))
    assert joined(first, "x").std() > 0.5
    assert joined(first, "b").all()
    assert data_hash(first) == data_hash(second)


ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[n,t] ids, int64[n,t] where, int64[n,t] second, int64[n,t] mask) => (float[n,t,4] y)
<float[50,4] words, float[64,4] places, float[2,4] kinds> {
    [words_of] a = Gather (words, ids)
    [places_of] b = Gather (places, where)
    [kinds_of] c = Gather (kinds, second)
    [numbers] m = Cast <to=1> (mask)
    [axes] one = Constant <value_ints=[2]> ()
    [column] k = Unsqueeze (m, one)
    [sum1] d = Add (a, b)
    [sum2] e = Add (d, c)
    [masked] y = Mul (e, k)
}
"""


def test_integers_are_known_by_what_reads_them():
    text = ENCODER.replace("float[64,4] places", "float[40,4] places")
    batches = made(oc.synthetic(64, length=12), given_of(filled_program(text)))
    ids, mask = joined(batches, "ids"), joined(batches, "mask")
    assert ids.shape == (64, 12)
    assert ids.max() > 40
    assert ids.max() < 50
    assert ids.min() >= 0
    assert (joined(batches, "where") == np.arange(12)).all()
    assert not joined(batches, "second").any()
    assert set(np.unique(mask)) == {0, 1}
    assert mask[:, 0].all()
    assert (np.diff(mask, axis=1) <= 0).all()
    assert not ids[mask == 0].any()


DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[n,6] ids) => (float[n,6,5] y)
<float[5,5] next> {
    [table] y = Gather (next, ids)
}
"""


def test_a_causal_language_model_writes_its_own_samples():
    following = np.full((5, 5), -30, np.float32)
    for token in range(5):
        following[token, (token + 2) % 5] = 30
    program = filled_program(DECODER, next=following)
    ids = joined(made(oc.synthetic(20), given_of(program)), "ids")
    assert (ids[:, 1:] == (ids[:, :-1] + 2) % 5).all()
    assert len(set(ids[:, 0])) > 1


def test_options_out_of_range_are_refused():
    for make, match in (
        (lambda: oc.synthetic(0), "count is 0"),
        (lambda: oc.synthetic(kind="sound"), "kind 'sound'"),
        (lambda: oc.synthetic(limits=(1.0, 0.0)), r"limits are \(1.0, 0.0\)"),
        (lambda: oc.select([], count=20, pool=10), "20 samples of a pool of 10"),
        (lambda: oc.select([], method="best"), "method 'best'"),
        (lambda: oc.augment([], mix=2), "mix is 2"),
        (lambda: oc.augment([], kind="sound"), "kind 'sound'"),
    ):
        with pytest.raises(InputError, match=match):
            make()


# -- select -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["herding", "k-center", "k-means", "random"])
@pytest.mark.parametrize("again", [True, False])
def test_selected_samples_are_of_the_pool_and_distinct(method: str, again: bool):
    given = given_of(network())
    pool = images(100)
    source = [(pool[i : i + 7],) for i in range(0, 100, 7)]
    chosen = oc.select(source if again else iter(source), count=12, pool=90, method=method)
    x = joined(made(chosen, given), "x")
    rows = [int(np.flatnonzero((pool == one).all((1, 2, 3)))[0]) for one in x]
    assert len(set(rows)) == 12
    assert max(rows) < 90


def test_k_center_takes_what_is_rare():
    """Two samples of a hundred are ten times as large."""
    given = given_of(network())
    pool = images(100)
    pool[[40, 70]] *= 10
    source = [(pool[i : i + 10],) for i in range(0, 100, 10)]
    x = joined(made(oc.select(source, count=5, method="k-center"), given), "x")
    assert (np.abs(x).max((1, 2, 3)) > 15).sum() == 2


def test_herded_samples_have_the_mean_of_the_pool():
    program = network()
    given = given_of(program)
    pool = images(200) * np.linspace(0.2, 3, 200, dtype=np.float32).reshape(-1, 1, 1, 1)

    def off(method: str, seed: int) -> float:
        chosen = oc.select([(pool,)], count=8, method=method, seed=seed)
        run = program.to_torch()
        with torch.no_grad():
            one, whole = (run(torch.from_numpy(x))[0].mean(0)
                          for x in (joined(made(chosen, given), "x"), pool))  # fmt: skip
        return float((one - whole).square().sum())

    assert off("herding", 0) < 0.5 * np.mean([off("random", seed) for seed in range(5)])


def test_select_keeps_no_more_of_a_generator_than_it_draws_from():
    given = given_of(network())
    made(oc.select(stream(40), count=4, pool=40), given)
    least = peak_of(lambda: made(oc.select(stream(200), count=4, pool=200), given))
    most = peak_of(lambda: made(oc.select(stream(2000), count=4, pool=2000), given))
    assert most < 1.1 * least


# -- augment ----------------------------------------------------------------------------------


def test_originals_come_first_and_changed_ones_stay_in_their_range():
    given = given_of(network())
    pool = images(10)
    x = joined(made(oc.augment([(pool,)], count=50), given), "x")
    assert x.shape == (50, 2, 6, 6)
    np.testing.assert_array_equal(x[:10], pool)
    assert not any((pool == one).all((1, 2, 3)).any() for one in x[10:])
    assert x.min() >= pool.min()
    assert x.max() <= pool.max()


def test_shifts_and_flips_alone_move_pixels():
    given = given_of(network())
    pool = images(1)
    plain = oc.augment([(pool,)], count=20, noise=0, mix=0, shift=0, flip=True)
    x = joined(made(plain, given), "x")
    both = {one.tobytes() for one in x}
    assert both == {pool[0].tobytes(), np.ascontiguousarray(pool[0][..., ::-1]).tobytes()}
    x = joined(made(oc.augment([(pool,)], count=20, noise=0, mix=0, shift=1), given), "x")
    assert set(x.ravel()) <= set(pool.ravel())


def test_augmenting_is_lazy_and_the_same_again():
    given = given_of(network())
    source = oc.augment([(images(4),)], count=10**9)
    first = next(iter(source.batches(given)))
    assert first["x"].shape[0] <= 4
    few = oc.augment([(images(4),)], count=40)
    assert data_hash(made(few, given)) == data_hash(made(few, given))
    assert data_hash(made(few, given)) != data_hash(made(few, given_of(network(), 1)))


def test_tokens_and_their_masks_are_cut_alike():
    given = given_of(filled_program(ENCODER))
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (6, 12))
    mask = (np.arange(12) < rng.integers(4, 12, (6, 1))).astype(np.int64)
    ids *= mask
    batch = {"ids": ids, "where": np.broadcast_to(np.arange(12), (6, 12)).copy(),
             "second": np.zeros_like(ids), "mask": mask}  # fmt: skip
    kinds = {"where": "keep", "second": "keep"}
    batches = made(oc.augment([batch], count=40, kind=kinds), given)
    changed = joined(batches, "ids")
    assert ((changed != 0) == (joined(batches, "mask") != 0)).all()
    assert set(changed[6:, 0]) <= set(ids[:, 0])
    assert (joined(batches, "where") == np.arange(12)).all()


def test_kinds_that_do_not_fit_the_inputs_are_refused():
    given = given_of(network())
    for kind, match in (
        ({"z": "image"}, "names input 'z'"),
        ("tokens", "holds floats; its kind cannot be 'tokens'"),
    ):
        with pytest.raises(InputError, match=match):
            made(oc.augment([(images(2),)], kind=kind), given)


# -- sources of sources, compiles, the command line -------------------------------------------


def test_sources_nest_and_say_what_they_are():
    given = given_of(network())
    source = oc.select(oc.augment([(images(8),)], count=60), count=6)
    assert joined(made(source, given), "x").shape[0] == 6
    options = source.options()
    assert options["made_by"] == "select"
    assert options["source"]["made_by"] == "augment"
    assert options["source"]["source"] == "data"
    with pytest.raises(InputError, match="select makes samples for a model"):
        load_calibration(source, given.signature)


def test_the_manifest_names_the_source_and_a_locked_compile_makes_it_again(tmp_path):
    options = {
        "target": "onnxruntime", "precision": "int8", "calibration": oc.synthetic(16, steps=4),
        "budget": oc.Budget(max_damage=float("inf")), "passes": ["simplify", "insert-qdq"],
    }  # fmt: skip
    with oc.compile(network(), timing=False, **options) as first:
        first.save(tmp_path / "one")
        assert first.manifest["options"]["calibration"]["made_by"] == "synthetic"
        assert first.manifest["options"]["calibration_samples"] == 16
    with oc.compile(network(), locked=tmp_path / "one", **options) as second:
        assert second.manifest == first.manifest
    options["calibration"] = oc.synthetic(16, steps=4, seed=1)
    with pytest.raises(InputError, match="calibration seed is 1, locked is 0"):
        oc.compile(network(), locked=tmp_path / "one", **options)


def test_the_command_line_names_sources(tmp_path):
    np.savez(tmp_path / "a.npz", x=images(4))
    found = calibration_from_reference("synthetic:count=64,limits=0+1")
    assert found == oc.synthetic(64, limits=(0.0, 1.0))
    assert calibration_from_reference("synthetic") == oc.synthetic()
    found = calibration_from_reference(f"select:count=2,source=augment:count=9,source={tmp_path}")
    assert (found.count, found.source.count, found.source.source) == (2, 9, tmp_path)
    for text, match in (
        ("synthetic:colour=1", "no option 'colour'; it has count, kind"),
        ("synthetic:count=many", "count='many'"),
        ("augment:count=9", "end it with source=REF"),
        ("select", "end it with source=REF"),
    ):
        with pytest.raises(InputError, match=match):
            calibration_from_reference(text)


# -- memory -----------------------------------------------------------------------------------


def stream(count: int) -> Iterator[tuple[np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield (rng.standard_normal((1, 2, 6, 6)).astype(np.float32),)


def peak_of(action) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_stream_of_samples_is_read_as_far_as_it_is_kept():
    given = given_of(network())
    least = peak_of(lambda: load_calibration(stream(100), given.signature, max_samples=64))
    most = peak_of(lambda: load_calibration(stream(10_000), given.signature, max_samples=64))
    assert most < 1.1 * least
    endless = stream(10**9)
    assert sum(len(b["x"]) for b in load_calibration(endless, given.signature)) == 512


def test_one_batch_of_many_samples_is_not_kept_for_the_few_that_are_used():
    given = given_of(network())
    (batch,) = load_calibration([(images(3),), (images(5000),)], given.signature, max_samples=3)
    assert batch["x"].shape[0] == 3 or batch["x"].base is None
    batches = load_calibration(iter([(images(5000),)]), given.signature, max_samples=3)
    assert all(b["x"].base is None or b["x"].base.shape[0] == 3 for b in batches)


def test_the_number_of_samples_is_the_users():
    options = {"target": "onnxruntime", "precision": "fp32", "passes": ["simplify"]}
    for wanted, expected in ((20, 20), (None, 600)):
        with oc.compile(
            network(), timing=False, calibration=oc.augment([(images(8),)], count=600),
            calibration_samples=wanted, **options,
        ) as done:  # fmt: skip
            assert done.manifest["options"]["calibration_samples"] == expected
    with pytest.raises(InputError, match="0 samples are asked for"):
        oc.compile(network(), calibration=[(images(8),)], calibration_samples=0, **options)
