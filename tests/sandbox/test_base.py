"""Jobs and limits refuse what makes no sense."""

import pytest

from cycleqd_jax.sandbox import Job, Limits


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "x" * 300, "."])
def test_paths_outside_the_directory_are_named(path):
    with pytest.raises(ValueError, match=r"Job\.files: .*expected a path inside"):
        Job("bash", "true", files={path: ""})


@pytest.mark.parametrize("files", [{"a": "", "a/b": ""}, {"a/b": "", "a": ""}, {"a": "", "a/": ""}])
def test_a_path_is_a_file_or_a_directory(files):
    with pytest.raises(ValueError, match="'a' is a file and a directory"):
        Job("bash", "true", files=files)


def test_unknown_kind():
    with pytest.raises(ValueError, match="found 'perl'"):
        Job("perl", "")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_positive(value):
    with pytest.raises(ValueError, match=r"Limits\.seconds: expected a positive number"):
        Limits(seconds=value)
