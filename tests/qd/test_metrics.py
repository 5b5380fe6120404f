import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.utils.metrics import default_qd_metrics

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire


@pytest.mark.parametrize("tasks", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_agrees_with_qdax_on_every_archive(tasks, offset):
    scores = jax.random.normal(jax.random.key(tasks), (40, tasks))
    grid = make_grid([-1.0] * tasks, [1.0] * tasks, 4)
    repertoire = CyclicRepertoire.init(jnp.arange(40), scores, scores, grid)
    ours = qd_metrics(repertoire, offset)
    for k in range(tasks):
        theirs = default_qd_metrics(repertoire.archive(k), offset)
        assert float(ours["coverage"][k]) == pytest.approx(float(theirs["coverage"]) / 100)
        assert float(ours["qd_score"][k]) == pytest.approx(float(theirs["qd_score"]), rel=1e-5)
        assert float(ours["best"][k]) == float(theirs["max_fitness"])
    distinct = np.unique(np.asarray(repertoire.cells))
    assert int(ours["num_elites"]) == (distinct >= 0).sum()
