import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.runs.records.files import from_json, read_json, to_json, write_json_atomic


def test_arrays_scalars_paths_and_tuples_become_plain_json():
    value = {
        "a": np.arange(3, dtype=np.int32),
        "b": jnp.float32(0.1),
        "c": (np.bool_(True), None),
        "d": Path("x/y"),
        "e": jnp.ones((1, 2)),
    }
    assert to_json(value) == {
        "a": [0, 1, 2],
        "b": float(np.float32(0.1)),
        "c": [True, None],
        "d": "x/y",
        "e": [[1.0, 1.0]],
    }


def test_non_finite_floats_read_back_as_floats(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": [math.inf, -math.inf, 1.5], "y": np.float32("nan")})
    assert '"-Infinity"' in path.read_text()
    back = read_json(path)
    assert back["x"] == [math.inf, -math.inf, 1.5]
    assert math.isnan(back["y"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [0, object()]}}, r"value\.a\.b\[1\]: expected numbers.*found object"),
        ({"a": {3: 1}}, r"value\.a: expected string keys, found 3 \(int\)"),
        ({"name": "NaN"}, r"value\.name: the string 'NaN' is reserved"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        to_json(value)


def test_from_json_inverts_to_json_on_nested_data():
    value = {"a": [1, 2.5, "text", None, {"b": [math.inf, True]}]}
    assert from_json(to_json(value)) == value


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        read_json(path)
