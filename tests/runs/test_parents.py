"""Models are recognised, and their licences read from their folders."""

from pathlib import Path

import pytest

from cycleqd_jax.runs.records.parents import ParentsError, check_parents, licence_of, record_parents


def test_a_changed_model_is_named(tmp_path: Path) -> None:
    record, folders = tmp_path / "parents.json", {"base": "b", "coding": "c"}
    digests = {"base": "1", "coding": "2"}
    with pytest.raises(ParentsError, match="no such file, so nobody knows"):
        check_parents(record, folders, digests)
    record_parents(record, folders, digests)
    check_parents(record, folders, digests)
    check_parents(record, {"base": "moved", "coding": "c"}, digests)  # a place is no difference
    with pytest.raises(ParentsError, match=r"(?s)other weights.*  coding: c\n"):
        check_parents(record, folders, {**digests, "coding": "3"})


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "unknown"),
        ({"README.md": "---\ntags: [a]\nlicense: apache-2.0\n---\n# x"}, "apache-2.0"),
        ({"README.md": "---\nlicense: 'mit'\n---\n", "LICENSE": "Other"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3\n---\n"}, "llama3"),
        ({"README.md": "license: mit, says the text"}, "unknown"),
        ({"LICENSE.txt": "\n   Apache License\n Version 2"}, "Apache License (LICENSE.txt)"),
    ],
)
def test_a_licence_is_what_the_folder_states(
    tmp_path: Path, files: dict[str, str], licence: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence
