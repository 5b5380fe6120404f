"""A model family made on the spot: a tiny Llama base and one fine-tuned expert per skill.

It stands in for downloads: the result is a folder of ordinary Hugging Face models that the rest of
the library loads like any other. The base is pretrained on plain text of all skills (it knows what
solutions look like, not that it should answer), an expert is fine-tuned on conversations of one.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.llama import init_params
from cycleqd_jax.models.specs import LlamaConfig
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.progress import Progress, track
from cycleqd_jax.runs.records.files import write_json_atomic
from cycleqd_jax.tasks.base import Problem, Task
from cycleqd_jax.training.corpus import bucket_rows
from cycleqd_jax.training.sft import TrainConfig, train
from cycleqd_jax.training.tokenizer import render_conversations, train_tokenizer

# A few thousand problems hold every word there is.
_TOKENIZER_PROBLEMS = 6000
_FINGERPRINT_PROBLEMS = 64

Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class FamilyConfig:
    """What the family is made of; equal configs and equal tasks share one folder of the cache.

    Attributes:
        tasks: names of the skills, one expert each.
        vocab_size: of the tokenizer.
        width: of the hidden state; the MLP is three times as wide.
        layers: number of layers.
        heads: query heads; there are half as many key heads.
        problems: training problems per skill.
        difficulty: of the problems.
        chats: share of the base's problems that it sees as conversations rather than documents.
            With none the base does not know the format, and merges of experts fall apart.
        replay: share of an expert's rows that come from the base's mixture. With none an expert
            forgets the other skills so thoroughly that no merge recovers them.
        base: training of the base.
        expert: training of each expert, but for its length.
        expert_steps: updates of each expert, in the order of the tasks: skills are not equally
            hard.
        seed: of the problems and the initial weights.
    """

    tasks: tuple[str, ...]
    vocab_size: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    problems: int = 6000
    difficulty: int = 1
    chats: float = 0.01
    replay: float = 0.2
    base: TrainConfig = field(default_factory=lambda: TrainConfig(2000, 32, 3e-3))
    expert: TrainConfig = field(default_factory=lambda: TrainConfig(0, 32, 1e-3))
    expert_steps: tuple[int, ...] = (150, 400, 400)
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """Where the models of a family lie.

    Attributes:
        base: the base's folder.
        experts: task name → the folder of its expert.
    """

    base: Path
    experts: dict[str, Path]


def family_folders(cache: Path, config: FamilyConfig, tasks: Sequence[Task]) -> Family:
    """Name the folders of a family, whether they exist or not."""
    folder = cache / f"family-{_fingerprint(config, tasks)}"
    return Family(folder / "base", {task: folder / f"expert-{task}" for task in config.tasks})


def make_family(cache: Path, config: FamilyConfig, tasks: Sequence[Task]) -> Family:
    """Train what the cache does not hold yet, and return the folders.

    A model is saved as soon as it is trained, so that an interrupted start loses one at most.
    """
    family = family_folders(cache, config, tasks)
    missing = {name: path for name, path in family.experts.items() if not path.exists()}
    if family.base.exists() and not missing:
        return family
    family.base.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(family.base.parent / "family.json", asdict(config), sort_keys=True)
    problems = {
        task.name: _problems(config, task, config.problems)
        for task in track(tasks, "training problems")
    }
    every = [problem for drawn in problems.values() for problem in drawn]
    random.Random(config.seed).shuffle(every)
    if family.base.exists():
        tokenizer = load_tokenizer(family.base)
    else:
        tokenizer = train_tokenizer(_texts(every[:_TOKENIZER_PROBLEMS]), config.vocab_size)
    mixture = _mixture(tokenizer, every, config.chats)
    if not family.base.exists():
        architecture = _architecture(config, tokenizer)
        params = init_params(jax.random.key(config.seed), architecture)
        params = _train("base", params, architecture, mixture, tokenizer, config.base)
        save_model(family.base, architecture, params, tokenizer=tokenizer)
    for name, folder in missing.items():
        own = render_conversations(tokenizer, [p.demonstration for p in problems[name]])
        again = mixture[: round(len(own) * config.replay / (1 - config.replay))]
        architecture, params = load_model(family.base)
        steps = config.expert_steps[config.tasks.index(name)]
        settings = replace(config.expert, steps=steps)
        params = _train(f"expert {name}", params, architecture, [*own, *again], tokenizer, settings)
        save_model(folder, architecture, params, like=family.base)
    return family


def _problems(config: FamilyConfig, task: Task, count: int) -> Sequence[Problem]:
    return task.problems("train", count, seed=config.seed, difficulty=config.difficulty)


def _fingerprint(config: FamilyConfig, tasks: Sequence[Task]) -> str:
    """A short name that changes with the settings and with what the tasks teach."""
    # A sample of the problems: a changed generator must not find the models of the former one,
    # whose training text may hold what is now a test.
    count = min(_FINGERPRINT_PROBLEMS, config.problems)
    sample = [[repr(p) for p in _problems(config, task, count)] for task in tasks]
    text = json.dumps([asdict(config), sample], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _texts(problems: Sequence[Problem]) -> list[str]:
    return [
        text
        for problem in problems
        for text in (problem.prompt, problem.document, *problem.answers, *problem.observations)
    ]


def _mixture(tokenizer: Any, problems: Sequence[Problem], chats: float) -> list[Row]:
    """Rows of the base's training: documents, and a share of conversations; every token counts."""
    count = round(chats * len(problems))
    talks = render_conversations(tokenizer, [p.demonstration for p in problems[:count]])
    documents = tokenizer([problem.document for problem in problems[count:]])["input_ids"]
    texts = [tokens for tokens, _ in talks]
    texts += [[*document, tokenizer.eos_token_id] for document in documents]
    # Conversations stand first; a share of the rows from the front must be a fair sample.
    random.Random(len(texts)).shuffle(texts)
    return [(tokens, [1] * len(tokens)) for tokens in texts]


def _architecture(config: FamilyConfig, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=max(1, config.heads // 2),
        head_dim=config.width // config.heads,
        tie_embeddings=True,
        max_positions=512,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )


def _train(
    name: str,
    params: Any,
    architecture: LlamaConfig,
    rows: Sequence[Row],
    tokenizer: Any,
    settings: TrainConfig,
) -> Any:
    corpora = bucket_rows(rows, tokenizer.pad_token_id)
    with Progress(f"train {name}", settings.steps) as progress:
        return train(
            jax.tree.map(jnp.asarray, params),
            architecture,
            corpora,
            settings,
            lambda done, loss: progress.advance(done - progress.completed, note=f"loss {loss:.3f}"),
        )
