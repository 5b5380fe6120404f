"""CycleQD on models that are not language models: small classifiers of handwritten digits.

    python experiments/digits.py [--seed N] [--out PICTURE]

A base sees every digit a little, an expert sees only its own group of digits and forgets the
others. CycleQD breeds the experts: one archive a group, the whole search one `lax.scan`.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from qdax.core.map_elites import MAPElites
from rich.console import Console
from sklearn.datasets import load_digits

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.spectral import (
    decompose,
    expert_gains,
    gain_layout,
    materialise,
    uniform_gains,
)
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.qd.aggregation import aggregate, best_elites
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import grid_from_experts
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector
from cycleqd_jax.runs.results.report import results_table
from cycleqd_jax.runs.watching.pictures import ArchivePicture, plot_archives

GROUPS = {"0 to 3": (0, 1, 2, 3), "4 to 6": (4, 5, 6), "7 to 9": (7, 8, 9)}
ROLES = {"w1": "matrix", "b1": "vector", "w2": "matrix", "b2": "vector"}
GENERATIONS, CHILDREN, BINS = 300, 64, 12

Params = dict[str, Any]
Images = Float[Array, "images pixels"]
Labels = Int[Array, " images"]


def init(key: jax.Array, hidden: int = 64) -> Params:
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, hidden)) / 8.0,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, 10)) / jnp.sqrt(hidden),
        "b2": jnp.zeros(10),
    }


def logits(params: Params, images: Images) -> Float[Array, "images digits"]:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: Params, images: Images, labels: Labels) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return losses.mean()


@partial(jax.jit, static_argnames="steps")
def train(params: Params, images: Images, labels: Labels, steps: int) -> Params:
    optimiser = optax.adam(3e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, images, labels), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), None, length=steps)[0][0]


def accuracies(params: Params, images: Images, labels: Labels) -> Float[Array, " groups"]:
    """Share of right answers for each group of digits."""
    right = jnp.argmax(logits(params, images), axis=-1) == labels
    members = [jnp.isin(labels, jnp.asarray(group)) for group in GROUPS.values()]
    return jnp.stack([jnp.sum(right & own) / jnp.sum(own) for own in members])


@dataclass(frozen=True)
class Problem:
    """A family of classifiers and the images to judge them on.

    Attributes:
        base: parameters of the base.
        experts: parameters of one expert a group.
        search: images and labels that the search sees.
        test: images and labels for the table alone.
    """

    base: Params
    experts: list[Params]
    search: tuple[Images, Labels]
    test: tuple[Images, Labels]


def make_problem(seed: int) -> Problem:
    """Train base and experts on a third of the images; the other thirds are held out."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    (x, y), search, test = [
        (jnp.asarray(digits.data[part] / 16.0, jnp.float32), jnp.asarray(digits.target[part]))
        for part in np.array_split(order, 3)
    ]
    base = train(init(jax.random.key(seed)), x, y, 8)
    owns = [jnp.isin(y, jnp.asarray(group)) for group in GROUPS.values()]
    return Problem(base, [train(base, x[own], y[own], 30) for own in owns], search, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits.png"), help="the picture")
    args = parser.parse_args()
    problem = make_problem(args.seed)
    base, experts = problem.base, problem.experts

    # The genotype: gains on the singular directions of what the experts learnt.
    basis, _ = decompose([task_vector(expert, base) for expert in experts], ROLES, base=base)
    layout = gain_layout(basis)
    gains = jax.vmap(partial(expert_gains, layout))(jnp.arange(len(experts)))

    def score(genotypes: Any, key: jax.Array) -> tuple[Any, Any, dict[str, Any]]:
        models = jax.vmap(materialise, in_axes=(None, None, 0))(base, basis, genotypes)
        scores = jax.vmap(accuracies, in_axes=(0, None, None))(models, *problem.search)
        return scores, scores, {}

    init_key, scan_key = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), 1))
    expert_scores, _, _ = score(gains, init_key)
    algorithm = MAPElites(
        scoring_function=score,
        emitter=CycleQDEmitter(
            selector=EliteSelector(),
            crossover=linear_crossover(std=0.3),
            mutation=expert_svd_mutation(layout, w_max=0.3),
            batch_size=CHILDREN,
            num_archives=len(GROUPS),
        ),
        metrics_function=qd_metrics,
        repertoire_init=CyclicRepertoire.init,
    )
    cells = grid_from_experts(expert_scores, BINS)
    repertoire, state, _ = algorithm.init(gains, cells, init_key)
    (repertoire, _, _), history = jax.lax.scan(
        algorithm.scan_update, (repertoire, state, scan_key), None, length=GENERATIONS
    )

    slots = np.flatnonzero(repertoire.occupied)
    winner = slots[int(np.argmax(np.asarray(repertoire.scores).mean(axis=1)[slots]))]
    heads = best_elites(repertoire)
    quality = repertoire.scores[heads, jnp.arange(len(GROUPS))]
    rows = {f"expert {name}": expert_gains(layout, e) for e, name in enumerate(GROUPS)}
    rows |= {f"merge/uniform λ={lam}": uniform_gains(layout, lam) for lam in (0.33, 0.5, 0.8)}
    rows["cycleqd/best"] = repertoire.gather(jnp.asarray(winner))
    rows["cycleqd/aggregate"] = aggregate(repertoire.gather(heads), quality)
    models = {"base": base} | {n: materialise(base, basis, g) for n, g in rows.items()}
    table = {}
    for name, model in models.items():
        found = map(float, accuracies(model, *problem.test))
        table[name] = dict(zip(GROUPS, found, strict=True))
    console = Console()
    console.print(results_table(table, list(GROUPS)))
    cover = ", ".join(f"{share:.0%}" for share in history["coverage"][-1])
    console.print(f"{GENERATIONS * CHILDREN} children; cells filled: {cover}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_archives(
        args.out,
        ArchivePicture.of(
            repertoire,
            list(GROUPS),
            experts=dict(zip(GROUPS, np.asarray(expert_scores), strict=True)),
            best=np.asarray(repertoire.scores)[winner],
            generations=GENERATIONS,
        ),
    )
    console.print(f"archives: {args.out}")


if __name__ == "__main__":
    main()
