"""One whole generation on the quickstart's family: ours against the published pipeline in torch.

    python benchmarks/generation.py [--generations 3] [--json FILE]

Ours is a run's own loop (`runs.search.Search`) with the quickstart's settings: 16 children are
bred, play 32 problems of each of the three tasks, and are offered to all archives, with logs and a
checkpoint as in a run (every tenth generation: a tenth of its time is counted). The peer is the
published pipeline (Kuroki et al., arXiv 2410.14735) written from its description, full weights in
torch, one child after the other: it loads two parents from disk, merges their task vectors, adds
the scaled directions of one expert, puts the weights into a `transformers` model, plays the same
problems with `generate` (all live episodes of the child in one batch, greedy, with a KV cache, on
all cores), and offers the child to every archive; a child that enters one is written to disk.

Both do the same work. The peer is given what ours drew (parents, merge weights, scales), so its
children are the same models; the transcripts of all episodes (ours of a second play, not timed),
the scores and the archives are compared. Drawing costs the peer nothing. Both play in the same
sandbox. Of what a run remembers there of programs that were run before (`sandbox.MemoSandbox`),
which is ours, the peer plays every generation twice: with the memory that ours had when it began
the generation, and with none, as published.

Generation 1, in which both warm up and ours compiles, is not counted. From then on they take turns,
ours once and the peer twice a generation; the medians count. The limit is the arithmetic that
cannot be avoided, at the rate of a large product measured in the same run: every matrix once for
every token of every episode's conversation, the head once for every token that was chosen.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from child import Peer, triplets
from measuring import matmul_rate, row, write_rows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from cycleqd_jax.cache import default_cache
from cycleqd_jax.merging.expert_svd import draw_expert_gains
from cycleqd_jax.merging.spectral import MatrixFactors, is_factors
from cycleqd_jax.models.cache import stack_layers
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.specs import leaf_table
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.policy import Conversations
from cycleqd_jax.runs.quickstart import quickstart_config
from cycleqd_jax.runs.records.folder import RunFolder
from cycleqd_jax.runs.records.lineage import Birth, read_births
from cycleqd_jax.runs.records.transcripts import read_transcripts, transcript_file
from cycleqd_jax.runs.results.release import PastRun
from cycleqd_jax.runs.search import Search
from cycleqd_jax.runs.transformers_policy import TransformersPolicy
from cycleqd_jax.runs.watching.monitor import Monitor
from cycleqd_jax.runs.watching.watch import Watch
from cycleqd_jax.runs.workspace import Workspace, open_workspace
from cycleqd_jax.sandbox import MemoSandbox, Sandbox, open_sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.rollout import rollout
from cycleqd_jax.tasks.transcript import Transcript, Turn

LENT, PUBLISHED = "published pipeline, our memory lent", "published pipeline, torch"
PHASES = ("child", "decode", "environments", "archive", "rest", "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--generations", type=int, default=3, help="that are measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cache_compilations(default_cache())
    config = quickstart_config(default_cache(), generations=1 + options.generations)
    workspace = open_workspace(config, default_cache())
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        bare = open_sandbox(config.sandbox)
        with MemoSandbox(bare) as sandbox:
            evaluator = Evaluator(workspace, sandbox)
            recorder = Evaluator(workspace, sandbox, out / "transcripts")
            with RunFolder.open(out, config.to_json()) as folder:
                pipeline = Pipeline(workspace, folder, Path(scratch) / "models")
                turns = Turns(workspace, folder, evaluator, recorder, sandbox, bare, pipeline)
                Search(workspace, evaluator, folder, turns).run()
                turns.finish()
    write_rows(options.json, report(turns, workspace))


class Turns(Monitor):
    """Times the generations of a search, and lets the peer do each one after it.

    Attributes:
        ours: seconds of the phases of every generation, the first one not among them.
        peers: the same for the peer, with our memory of programs and without.
        first: seconds of generation 1, which compiles.
        played: what happened in every generation of ours.
        compiled: programs that were compiled after generation 1.
        episodes: how many were compared, those of the peer's two plays apart.
        different: how many of them were not the same to the letter.
    """

    def __init__(
        self,
        workspace: Workspace,
        folder: RunFolder,
        evaluator: Evaluator,
        recorder: Evaluator,
        sandbox: MemoSandbox,
        bare: Sandbox,
        pipeline: "Pipeline",
    ) -> None:
        super().__init__(Watch(), folder, workspace.config.tasks, workspace.config.to_json())
        self._workspace, self._evaluator, self._recorder = workspace, evaluator, recorder
        self._sandbox, self._bare, self._pipeline = sandbox, bare, pipeline
        self._run = folder
        self.ours: list[dict[str, float]] = []
        self.peers: dict[str, list[dict[str, float]]] = {LENT: [], PUBLISHED: []}
        self.played: list[list[Transcript]] = []
        self.first = 0.0
        self.compiled = 0
        self.episodes, self.different = 0, 0

    def watching(self, done: int, generations: int) -> "Turns":
        super().watching(done, generations)
        self._begin()
        return self

    def step(self, row: Mapping[str, Any], repertoire: CyclicRepertoire, *rest: Any) -> bool:
        stop = super().step(row, repertoire, *rest)
        seconds = time.perf_counter() - self._started
        generation = row["generation"]
        if generation == 1:
            self.first = seconds
            self._pipeline.play(generation, repertoire, self._bare, children=1)
        else:
            phases = [row["seconds"][name] for name in ("emit", "model", "sandbox", "add")]
            own = [*phases, seconds - sum(phases), 0.0]
            self.ours.append(dict(zip(PHASES, own, strict=True)))
            self.compiled += self._evaluator.decoder.traces - self._traces
            played = self._play_again(generation)
            self._sandbox.forget(but=self._known)
            totals = []
            for name, sandbox in ((LENT, self._sandbox), (PUBLISHED, self._bare)):
                phases_of_peer, transcripts = self._pipeline.play(generation, repertoire, sandbox)
                self.peers[name].append(phases_of_peer)
                self._compare(generation, played, transcripts)
                totals.append(f"{sum(phases_of_peer.values()):.2f} s")
            print(
                f"generation {generation}: ours {seconds:.2f} s, peer {' and '.join(totals)}",
                flush=True,
            )
        self._begin()
        return stop

    def finish(self) -> None:
        """Count the checkpoint that the run has ended with."""
        config = self._workspace.config
        for phases in self.ours:
            phases["checkpoint"] = (time.perf_counter() - self._started) / config.checkpoint_every

    def _begin(self) -> None:
        self._known = self._sandbox.known()
        self._traces = self._evaluator.decoder.traces
        self._started = time.perf_counter()

    def _play_again(self, generation: int) -> list[Transcript]:
        """What happens in ours, which must come to the same scores."""
        phase = f"generation-{generation:06d}"
        births = read_births(self._run.lineage_file)
        ids = [birth.id for birth in births if birth.generation == generation]
        gains = PastRun(self._run.path).rebuild(self._workspace, ids)
        problems = self._pipeline.problems
        scores = self._recorder.population(gains, problems, phase=phase).scores
        logged = [list(births[id].scores.values()) for id in ids]
        if not np.array_equal(scores, np.asarray(logged, np.float32)):
            raise SystemExit(f"{phase}: ours scores its children otherwise when they play again")
        played = read_transcripts(transcript_file(self._run.path / "transcripts", phase))
        self.played.append(played)
        return played

    def _compare(
        self, generation: int, ours: Sequence[Transcript], theirs: Sequence[Transcript]
    ) -> None:
        found = {(t.task, t.problem, t.candidate): t for t in theirs}
        if len(found) != len(ours):
            raise SystemExit(
                f"generation {generation}: ours played {len(ours)} episodes, the peer {len(found)}"
            )
        self.episodes += len(ours)
        self.different += sum(found[t.task, t.problem, t.candidate] != t for t in ours)


class Pipeline:
    """The published pipeline: children as full weights, one after the other.

    Args:
        workspace: base, basis, tasks and settings of the run.
        folder: the run whose draws are followed.
        models: where the elites' weights are, a folder each.

    Attributes:
        problems: that every child plays.
    """

    def __init__(self, workspace: Workspace, folder: RunFolder, models: Path) -> None:
        config = workspace.config
        self._workspace, self._folder, self._models = workspace, folder, models
        models.mkdir()
        self.problems = workspace.problems("search", config.problems, config.seed)
        self._peer = Peer(Path(config.base), (), {})
        self._factors = [expert_factors(workspace, e) for e in range(len(config.experts))]
        self._model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32).eval()
        self._policy = TransformersPolicy(
            self._model,
            workspace.tokenizer,
            stop_tokens=workspace.architecture.eos_ids,
            max_new_tokens=config.max_new_tokens,
            max_rows=len(config.tasks) * config.problems,
        )

    def play(
        self,
        generation: int,
        repertoire: CyclicRepertoire,
        sandbox: Sandbox,
        children: int | None = None,
    ) -> tuple[dict[str, float], list[Transcript]]:
        """Breed and score the children of a generation again; seconds of the phases, transcripts.

        Args:
            generation: which one.
            repertoire: ours after it, which the peer's archives must equal.
            sandbox: where programs run.
            children: only the first ones; the archives are then not compared.
        """
        run = PastRun(self._folder.path)
        everyone = read_births(self._folder.lineage_file)
        born = [birth for birth in everyone if birth.generation == generation][:children]
        self._write_parents(run, born)
        draws = [self._draws(birth) for birth in born]
        archives = Archives(self._workspace, everyone)
        for birth in everyone:
            if birth.generation < generation:
                archives.add(birth.id, list(birth.scores.values()))

        seconds = dict.fromkeys(PHASES, 0.0)
        transcripts: list[Transcript] = []
        for number, (birth, (weights, scales)) in enumerate(zip(born, draws, strict=True)):
            start = time.perf_counter()
            self._peer.parents = [self._models / str(id) for id in birth.parents]
            self._peer.factors = self._factors[self._expert(birth)]
            child = self._peer.build(weights, lambda name, rank, s=scales: s[name], False)
            missing, unknown = self._model.load_state_dict(child, strict=False)
            assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)  # noqa: PT018
            bred = time.perf_counter()
            played = rollout(
                self._workspace.tasks,
                self.problems,
                1,
                self._policy,
                sandbox,
                seed=f"{self._workspace.config.seed}/generation-{generation:06d}",
                first_candidate=number,
                on_episode=transcripts.append,
            )
            scored = time.perf_counter()
            if archives.add(birth.id, played.scores[0].tolist()):
                save_file(child, self._models / f"child-{birth.id}.safetensors")
            seconds["child"] += bred - start
            seconds["decode"] += played.seconds["model"]
            seconds["environments"] += scored - bred - played.seconds["model"]
            seconds["archive"] += time.perf_counter() - scored
        if children is None and archives.ids() != ids_of(repertoire):
            raise SystemExit(f"generation {generation}: the archives differ")
        return seconds, transcripts

    def _expert(self, birth: Birth) -> int:
        return list(self._workspace.config.experts).index(birth.operator["expert"])

    def _write_parents(self, run: PastRun, born: Sequence[Birth]) -> None:
        """The weights of the elites, which earlier generations of the peer would have left."""
        wanted = {id for birth in born for id in birth.parents}
        new = [id for id in sorted(wanted) if not (self._models / str(id)).exists()]
        if not new:
            return
        gains = run.rebuild(self._workspace, new)
        for place, id in enumerate(new):
            own = jax.tree.map(lambda leaf, place=place: leaf[place], gains)
            params = self._workspace.model(own)
            save_model(self._models / str(id), self._workspace.architecture, params)

    def _draws(self, birth: Birth) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What ours drew for a child: two merge weights, and scales by tensor."""
        workspace, expert = self._workspace, self._expert(birth)
        key = jax.random.wrap_key_data(jnp.asarray(birth.operator["keys"], jnp.uint32))[1]
        layout = workspace.layout
        strength = workspace.config.preset.mutation_strength
        drawn = jax.tree.leaves(draw_expert_gains(key, layout, expert, strength))
        scales: dict[str, torch.Tensor] = {}
        for spec, leaf, gains in zip(
            jax.tree.leaves(leaf_table(workspace.architecture)), layout.leaves, drawn, strict=True
        ):
            if leaf.role == "matrix":
                own = np.array(gains[..., leaf.blocks[expert]])
                names = spec.hf_names(workspace.architecture.num_layers)
                scales |= zip(names, torch.from_numpy(own).reshape(len(names), -1), strict=True)
        return torch.tensor(birth.operator["weights"]), scales


def expert_factors(workspace: Workspace, expert: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """U, S, V of an expert's task vector by tensor, as many directions as ours keeps."""
    factors: dict[str, tuple[torch.Tensor, ...]] = {}
    table = leaf_table(workspace.architecture)
    basis = jax.tree.leaves(stack_layers(workspace.basis), is_leaf=is_factors)
    leaves = workspace.layout.leaves
    for spec, leaf, node in zip(jax.tree.leaves(table), leaves, basis, strict=True):
        if not isinstance(node, MatrixFactors):
            continue
        u, v = (np.asarray(side[..., leaf.blocks[expert]]) for side in (node.u, node.v))
        names = spec.hf_names(workspace.architecture.num_layers)
        u, v = (side.reshape(len(names), *side.shape[-2:]) for side in (u, v))
        for name, *sides in zip(names, u, v, strict=True):
            factors[name] = triplets(*sides, spec.transpose)
    return factors


class Archives:
    """Archives as dictionaries: cell -> (quality, id)."""

    def __init__(self, workspace: Workspace, everyone: Sequence[Birth]) -> None:
        experts = [list(b.scores.values()) for b in everyone if b.generation == 0]
        grid = workspace.config.preset.build_grid(np.asarray(experts, np.float32))
        self._edges = np.asarray(grid.edges)
        self._cells: list[dict[tuple[int, ...], tuple[float, int]]] = [{} for _ in self._edges]

    def add(self, id: int, scores: Sequence[float]) -> bool:
        """Offer a child to every archive; whether one took it."""
        bins = [int(np.searchsorted(e, s)) for e, s in zip(self._edges, scores, strict=True)]
        entered = False
        for k, cells in enumerate(self._cells):
            cell = tuple(bin for other, bin in enumerate(bins) if other != k)
            if cell not in cells or scores[k] > cells[cell][0]:
                cells[cell] = scores[k], id
                entered = True
        return entered

    def ids(self) -> list[list[int]]:
        """Of every archive's elites, sorted."""
        return [sorted(id for _, id in cells.values()) for cells in self._cells]


def ids_of(repertoire: CyclicRepertoire) -> list[list[int]]:
    """Of every archive's elites, sorted."""
    ids, cells = np.asarray(repertoire.extra_scores["id"]), np.asarray(repertoire.cells)
    return [sorted(ids[archive[archive >= 0]].tolist()) for archive in cells]


def report(turns: Turns, workspace: Workspace) -> list[dict[str, Any]]:
    """Print what was measured and return the rows."""
    columns = {"ours": turns.ours, **turns.peers}
    phases = {
        name: {phase: statistics.median(g[phase] for g in found) for phase in PHASES}
        for name, found in columns.items()
    }
    whole = {
        name: statistics.median(sum(g.values()) for g in found) for name, found in columns.items()
    }
    children = workspace.config.children
    work = statistics.median(operations(workspace, played) for played in turns.played)
    rate = matmul_rate()
    print(
        f"{turns.episodes} episodes of {len(turns.ours)} generations in both: "
        f"{turns.different} differ; generation 1 of ours took {turns.first:.1f} s, "
        f"{turns.compiled} programs were compiled after it"
    )
    print(f"{'seconds a generation':22s}" + "".join(f"{name:>37s}" for name in columns))
    for phase in PHASES:
        print(f"{phase:22s}" + "".join(f"{phases[name][phase]:37.3f}" for name in columns))
    print(f"{'all':22s}" + "".join(f"{whole[name]:37.3f}" for name in columns))
    rows = []
    for name in turns.peers:
        found = row(
            "generation, quickstart family",
            60 * children / whole["ours"],
            60 * children / whole[name],
            name,
            "children/min",
            60 * children * rate / work,
            more_is_better=True,
            seconds={"ours": phases["ours"], "peer": phases[name]},
            different_episodes=turns.different / turns.episodes,
        )
        print(
            f"{found['ours']:.0f} children a minute against {found['peer']:.0f} of the {name}: "
            f"{found['ratio']:.2f} times as many"
        )
        rows.append(found)
    print(
        f"limit {rows[0]['limit']:.0f}: {work / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s take "
        f"{work / rate:.2f} s, {work / rate / phases['ours']['decode']:.0%} of what ours decodes in"
    )
    return rows


def operations(workspace: Workspace, played: Sequence[Transcript]) -> float:
    """Multiplications and additions that episodes need: every conversation read and said once."""
    config, tokenizer = workspace.architecture, workspace.tokenizer
    turns = [[step for step in one.steps if isinstance(step, Turn)] for one in played]
    # The last turn's messages hold what was said in the turns before.
    read = Conversations(tokenizer).render([Request(0, spoken[-1].messages) for spoken in turns])
    answers = tokenizer([turn.answer for spoken in turns for turn in spoken])["input_ids"]
    last = tokenizer([spoken[-1].answer for spoken in turns])["input_ids"]
    table = jax.tree.leaves(leaf_table(config).layers)
    body = sum(np.prod(spec.full_shape(config.num_layers)) for spec in table)
    head = config.hidden_size * config.vocab_size
    through = sum(map(len, read)) + sum(map(len, last))
    # The token that ends an answer is chosen too.
    chosen = sum(map(len, answers)) + len(answers)
    return 2.0 * float(body * through + head * chosen)


if __name__ == "__main__":
    main()
