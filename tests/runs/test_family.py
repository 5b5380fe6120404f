"""The family of tiny models: made once, found again, readable by everybody."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model
from cycleqd_jax.runs import family as family_module
from cycleqd_jax.runs.family import Family, FamilyConfig, family_folders, make_family
from cycleqd_jax.tasks.coding import CodingTask
from cycleqd_jax.tasks.registry import make_tasks

TASKS = ("coding", "database", "shell")


def test_a_family_is_made_once(
    family: Family, tiny: FamilyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_module, "train", _fail)
    assert make_family(family.base.parent.parent, tiny, make_tasks(TASKS)) == family


@pytest.mark.slow
def test_a_lost_expert_is_trained_again_alone(tiny: FamilyConfig, tmp_path: Path) -> None:
    whole = make_family(tmp_path, tiny, make_tasks(TASKS))
    before = {name: load_model(path)[1] for name, path in whole.experts.items()}
    base = load_model(whole.base)[1]
    for params in before.values():
        assert not jax.tree.all(jax.tree.map(np.array_equal, params, base))
    shutil.rmtree(whole.experts["shell"])
    kept = {path: path.stat().st_mtime_ns for path in whole.base.parent.rglob("*.safetensors")}
    assert make_family(tmp_path, tiny, make_tasks(TASKS)) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = load_model(whole.experts["shell"])[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, before["shell"], again))


def test_the_family_loads_in_transformers_with_the_same_logits(family: Family) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from cycleqd_jax.models.llama import forward

    tokens = np.arange(4, 36).reshape(2, 16)
    for folder in (family.base, *family.experts.values()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.numpy()
        architecture, params = load_model(folder)
        ours = np.asarray(forward(params, architecture, jnp.asarray(tokens)))
        assert np.abs(ours - theirs).max() <= 2e-4


def test_another_generator_or_setting_is_another_family(tiny: FamilyConfig, tmp_path: Path) -> None:
    class Louder(CodingTask):
        def problems(self, *args: Any, **kwargs: Any) -> Any:
            drawn = super().problems(*args, **kwargs)
            return [dataclasses.replace(p, prompt=p.prompt.upper()) for p in drawn]

    coding, *others = make_tasks(TASKS)
    one = family_folders(tmp_path, tiny, [coding, *others])
    assert family_folders(tmp_path, tiny, make_tasks(TASKS)) == one
    changed = [
        family_folders(tmp_path, tiny, [Louder(), *others]),
        family_folders(tmp_path, dataclasses.replace(tiny, seed=1), [coding, *others]),
    ]
    assert len({family.base.parent for family in (one, *changed)}) == 3


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called again")
