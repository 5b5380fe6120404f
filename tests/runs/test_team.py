"""A team's folder that was damaged: always the same error, with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cycleqd_jax.runs.results.export import ModelCard
from cycleqd_jax.runs.results.release import PastRun
from cycleqd_jax.runs.results.team import TeamError, export_team, load_team


@pytest.fixture(scope="module")
def written(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = PastRun(finished).open()
    zeros = workspace.layout.zeros()
    members = {"none": zeros, "all": jax.tree.map(np.ones_like, zeros)}
    folder = tmp_path_factory.mktemp("team") / "team"
    return export_team(folder, workspace, members, card=ModelCard("m", "b", {}), facts={})


def edit(**changes: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def other_type(file: Path) -> None:
    """The same bytes, read as whole numbers."""
    save_file({name: array.view(np.int32) for name, array in load_file(file).items()}, file)


def without_one(file: Path) -> None:
    save_file(dict(list(load_file(file).items())[1:]), file)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("team.json", lambda file: file.write_text("{"), "expected JSON, found something else"),
        ("team.json", lambda file: file.write_text("[]"), "expected a JSON object, found list"),
        ("team.json", edit(format=0), "expected the format 1, found 0"),
        ("team.json", edit(members=None), "expected members with their digests, found None"),
        ("team.json", edit(members={}), "expected members with their digests, found {}"),
        ("team.json", edit(members={"none": "x"}), "expected the digest x, found"),
        ("base/config.json", Path.unlink, "the team's base is damaged: .*expected the file"),
        ("base/model.safetensors", lambda file: file.write_bytes(b"x"), "base is damaged"),
        ("basis.safetensors", Path.unlink, "damaged"),
        ("basis.safetensors", without_one, "damaged .expected the checksum"),
        ("members/all.safetensors", Path.unlink, "expected the gains of a member"),
        ("members/all.safetensors", without_one, "expected the gains of a member"),
        ("members/all.safetensors", other_type, "expected float32 .*, found int32"),
    ],
)
def test_any_damage_is_one_error(
    written: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    assert load_team(written).members == ("none", "all")
    whole = (written / file).read_bytes()
    try:
        damage(written / file)
        with pytest.raises(TeamError, match=message) as caught:
            load_team(written)
        assert str(written) in str(caught.value)
    finally:
        (written / file).write_bytes(whole)
