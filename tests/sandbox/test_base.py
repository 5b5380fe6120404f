"""Jobs and limits refuse what makes no sense."""

import pytest

from cycleqd_jax.sandbox import Job, Limits


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "x" * 300, "."])
def test_paths_outside_the_directory_are_named(path):
    with pytest.raises(ValueError, match=r"Job\.files: .*expected a path inside"):
        Job("bash", "true", files={path: ""})


def test_unknown_kind():
    with pytest.raises(ValueError, match="found 'perl'"):
        Job("perl", "")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_positive(value):
    with pytest.raises(ValueError, match=r"Limits\.seconds: expected a positive number"):
        Limits(seconds=value)
