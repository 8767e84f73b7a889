"""Calibration data in all its forms, and what is said of data that does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optcompiler.calibration import load_calibration, split_holdout
from optcompiler.errors import InputError
from optcompiler.program import Port
from optcompiler.signature import Parameter, Signature, Tree


def signature(batch: int | str = "n") -> Signature:
    ports = (Port("x", "FLOAT", (batch, 2)), Port("ids", "INT64", (batch,)))
    parameters = tuple(Parameter(p.name, Tree("tensor", i)) for i, p in enumerate(ports))
    return Signature(parameters, Tree("tensor", 0), ports, ports[:1])


def one_input(batch: int | str = "n") -> Signature:
    port = Port("x", "FLOAT", (batch, 2))
    return Signature((Parameter("x", Tree("tensor", 0)),), Tree("tensor", 0), (port,), (port,))


def pair(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2)).astype(np.float32), np.arange(n)


def sizes(batches) -> list[int]:
    return [len(b["x"]) for b in batches]


def test_batches_may_be_tuples_dicts_tensors_or_a_callable():
    x, ids = pair(3)
    for source in (
        [(x, ids)] * 4,
        [[torch.tensor(x), torch.tensor(ids)]] * 4,
        [{"ids": ids, "x": x}] * 4,
        ((x, ids) for _ in range(4)),
        lambda: iter([(x, ids)] * 4),
    ):
        batches = load_calibration(source, signature())
        assert sizes(batches) == [3] * 4
        assert list(batches[0]) == ["x", "ids"]
        np.testing.assert_array_equal(batches[3]["x"], x)
    assert sizes(load_calibration([x] * 4, one_input())) == [3] * 4
    assert load_calibration(None, signature()) == []


def test_a_model_whose_argument_is_a_dict_takes_dicts():
    ports = (Port("batch_x", "FLOAT", ("n", 2)),)
    tree = Tree("dict", items=(Tree("tensor", 0),), keys=("x",))
    nested = Signature((Parameter("batch", tree),), Tree("tensor", 0), ports, ports)
    x = pair(2)[0]
    for item in ({"x": x}, {"batch": {"x": x}}, {"batch_x": x}, ({"x": x},)):
        assert len(load_calibration([item] * 4, nested)) == 4


def test_a_folder_of_npz_is_read_in_the_order_of_names(tmp_path):
    for i in (2, 0, 1, 3):
        x, ids = pair(1, seed=i)
        np.savez(tmp_path / f"b{i}.npz", x=x, ids=ids)
    batches = load_calibration(tmp_path, signature())
    np.testing.assert_array_equal(batches[2]["x"], pair(1, seed=2)[0])
    assert len(load_calibration(str(tmp_path), signature(), max_samples=2)) == 2


def test_npz_files_with_pickles_or_garbage_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    with pytest.raises(InputError, match=r"batch 0 \(a.npz\) is not an .npz of plain arrays"):
        load_calibration(tmp_path, signature())
    (tmp_path / "a.npz").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"a.npz"):
        load_calibration(tmp_path, signature())
    (tmp_path / "a.npz").unlink()
    with pytest.raises(InputError, match=r"holds no .npz files"):
        load_calibration(tmp_path, signature())
    with pytest.raises(InputError, match="is not a folder"):
        load_calibration(tmp_path / "nowhere", signature())


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ((pair(2)[0],), "calibration batch 1 does not fit: argument 'ids' is missing"),
        ((*pair(2), 1), "calibration batch 1 does not fit: 3 positional arguments"),
        ({"x": pair(2)[0], "labels": 1}, "unknown argument 'labels'"),
        ((pair(2)[0].astype(np.float64), pair(2)[1]), "'x' has dtype float64, float32 expected"),
        ((pair(2)[0].T[:, :1], pair(2)[1]), r"dimension 1 is 1, not 2"),
        ((pair(2)[0], pair(3)[1]), "dimension 'N' is 3 here and 2 in 'x'|dimension N is 3"),
        (
            (pair(2)[0] * np.nan, pair(2)[1]),
            "batch 1: input 'x' holds 4 NaN or infinite values of 4",
        ),
        (("abc", pair(2)[1]), "'x' is a str"),
    ],
)
@pytest.mark.parametrize("batch", ["n", 2])
def test_a_batch_that_does_not_fit_is_named(item, match, batch):
    with pytest.raises(InputError, match=match):
        load_calibration([pair(2), item], signature(batch))


def test_sources_that_are_no_batches_are_refused():
    with pytest.raises(InputError, match="holds no batches"):
        load_calibration([], signature())
    with pytest.raises(InputError, match="is a single Tensor"):
        load_calibration(torch.zeros(2, 2), signature())
    with pytest.raises(InputError, match="is a int"):
        load_calibration(3, signature())


def test_static_batches_are_regrouped_and_the_rest_is_noted():
    notes: list[str] = []
    source = [pair(3, i) for i in range(3)]
    batches = load_calibration(source, signature(2), note=notes.append)
    assert sizes(batches) == [2] * 4
    assert notes == ["calibration: dropped 1 of 9 samples to make batches of 2"]
    np.testing.assert_array_equal(batches[1]["x"][1], source[1][0][0])
    assert sizes(load_calibration(source, signature(1))) == [1] * 9
    assert sizes(load_calibration(source, signature(3))) == [3] * 3
    with pytest.raises(InputError, match="3 samples given, the model takes batches of 8"):
        load_calibration(source[:1], signature(8))


def test_one_large_batch_is_split_so_that_something_can_be_held_out():
    assert sizes(load_calibration([pair(10)], signature())) == [3, 3, 3, 1]
    assert sizes(load_calibration([pair(2)], signature())) == [2]


def test_reading_stops_at_the_limit():
    def endless():
        while True:
            yield pair(3)

    assert sizes(load_calibration(endless, signature(), max_samples=13)) == [3, 3, 3, 3, 1]


def test_inputs_without_a_batch_dimension_are_not_regrouped():
    port = Port("x", "FLOAT", ())
    scalar = Signature((Parameter("x", Tree("tensor", 0)),), Tree("tensor", 0), (port,), (port,))
    assert len(load_calibration([1.0, 2.0], scalar)) == 2


def test_holdout_is_spread_and_deterministic():
    batches = [{"x": np.array([i])} for i in range(8)]
    calibration, holdout = split_holdout(batches)
    assert [int(b["x"][0]) for b in holdout] == [3, 7]
    assert len(calibration) == 6
    assert split_holdout(batches)[1] == holdout
    assert split_holdout(batches[:3]) == (batches[:3], [])
    assert len(split_holdout(batches, 0.5)[1]) == 4
    with pytest.raises(InputError, match="holdout fraction 1"):
        split_holdout(batches, 1)


def test_samples_of_several_lengths_stay_apart():
    port = Port("x", "FLOAT", ("n", "t"))
    of = Signature((Parameter("x", Tree("tensor", 0)),), Tree("tensor", 0), (port,), (port,))
    given = [np.full((5, t), t, np.float32) for t in (3, 4)]
    batches = load_calibration(given, of)
    assert [b["x"].shape for b in batches] == [(3, 3), (2, 3), (3, 4), (2, 4)]
    fixed = Port("x", "FLOAT", (2, "t"))
    notes: list[str] = []
    batches = load_calibration(
        given, Signature(of.parameters, of.result, (fixed,), (fixed,)), note=notes.append
    )
    assert [b["x"].shape for b in batches] == [(2, 3), (2, 3), (2, 4), (2, 4)]
    assert notes == ["calibration: dropped 2 of 10 samples to make batches of 2"]
