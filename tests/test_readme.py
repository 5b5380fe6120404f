"""What the README says runs: its Python blocks work as they stand, its commands exist."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_parts_of_the_readme_breed() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    space: dict = {}
    for block in blocks:
        exec(block, space)
    genotypes = {"w": jnp.eye(3)}
    scores = jnp.asarray([[0.9, 0.1, 0.2], [0.1, 0.8, 0.3], [0.2, 0.1, 0.7]])
    repertoire = CyclicRepertoire.init(genotypes, scores, scores, make_grid([0] * 3, [1] * 3, 5))
    emitter = space["emitter"]
    key = jax.random.key(0)
    state = emitter.init(key, repertoire, genotypes, scores, scores, {})
    children, _ = emitter.emit(repertoire, state, key)
    assert children["w"].shape == (16, 3)
    assert jnp.isfinite(children["w"]).all()


def test_the_scripts_of_the_readme_exist() -> None:
    scripts = set(re.findall(r"python (\S+\.py)", README))
    assert scripts == {"experiments/quickstart.py", "experiments/evolve.py"}
    assert all((ROOT / script).is_file() for script in scripts)
