from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, materialise
from cycleqd_jax.models import kernels
from cycleqd_jax.models.generate import Decoder, DecodeStats
from cycleqd_jax.models.llama import forward, init_params
from cycleqd_jax.models.specs import LeafSpec, LlamaConfig, leaf_table

CONFIG = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=96)
CANDIDATES, NEW_TOKENS = 3, 20
STOPS = [1, 2, 3]


attach = jax.jit(kernels.attach)
full_forward = jax.jit(forward, static_argnums=1)
build = jax.jit(materialise)


@cache
def model() -> Any:
    """Weights large enough that a text does not fall into a loop at once."""
    params = init_params(jax.random.key(0), CONFIG)
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 3 * np.asarray(leaf), params)


@cache
def population() -> tuple[Any, Any, Any]:
    return model(), *jax.jit(directions)()


def directions() -> tuple[Any, Any]:
    """A random basis of two experts and the gains of three candidates."""
    keys = iter(jax.random.split(jax.random.key(100), 99))

    def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
        lead = (CONFIG.num_layers,) if spec.stacked else ()
        if spec.role == "vector":
            return VectorFactors(delta=0.2 * jax.random.normal(next(keys), (*lead, 2, *spec.shape)))
        u, v = (jax.random.normal(next(keys), (*lead, size, 4)) for size in spec.shape)
        return MatrixFactors(u=0.2 * u, v=v, ranks=(2, 2))

    def gains(spec: LeafSpec) -> jax.Array:
        lead = (CANDIDATES, CONFIG.num_layers) if spec.stacked else (CANDIDATES,)
        return jax.random.uniform(next(keys), (*lead, 2 if spec.role == "vector" else 4))

    table = leaf_table(CONFIG)
    return jax.tree.map(factors, table), jax.tree.map(gains, table)


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(4, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist()
        for _ in range(count)
    ]


def naive(params: Any, prompt: list[int], limit: int = NEW_TOKENS) -> list[int]:
    """One full forward pass per token."""
    text: list[int] = []
    padded = np.zeros((1, CONFIG.max_positions), np.int32)
    padded[0, : len(prompt)] = prompt
    while len(text) < limit:
        at = len(prompt) + len(text)
        token = int(np.argmax(full_forward(params, CONFIG, padded)[0, at - 1]))
        if token in STOPS:
            break
        text.append(token)
        if at == CONFIG.max_positions:
            break
        padded[0, at] = token
    return text


def decoder(params: Any = None, **options: Any) -> Decoder:
    settings: dict[str, Any] = {
        "stop_tokens": STOPS,
        "pad_token": 0,
        "max_new_tokens": NEW_TOKENS,
    } | options
    return Decoder(params, CONFIG, **settings)


def test_answers_are_those_of_full_forward_passes() -> None:
    params = model()
    questions = prompts(9)
    answers = decoder(params).decode(questions)
    assert answers == [naive(params, question) for question in questions]
    assert len({len(answer) for answer in answers}) > 2


@pytest.mark.parametrize("mode", ["rows", "candidates"])
def test_rows_of_a_population_equal_each_candidate_alone(mode: Any) -> None:
    base, basis, gains = population()
    questions = prompts(8) * CANDIDATES
    candidates = [c for c in range(CANDIDATES) for _ in range(8)]
    attached = attach(base, basis, gains)
    together = decoder(attached, mode=mode).decode(questions, candidates)
    single = decoder()
    for candidate in range(CANDIDATES):
        own = jax.tree.map(lambda leaf, c=candidate: leaf[c], gains)
        alone = single.decode(questions[:8], params=build(base, basis, own))
        assert together[8 * candidate : 8 * candidate + 8] == alone
    assert together[:8] != together[8:16]


def test_an_answer_does_not_depend_on_its_company() -> None:
    params = model()
    questions = prompts(40)
    engine = decoder(params, max_rows=16, workers=2)
    together = engine.decode(questions)
    assert [engine.decode([question])[0] for question in questions[:6]] == together[:6]
    assert engine.decode(questions[::-1]) == together[::-1]


def test_a_chosen_mode_follows_cost_and_number_of_prompts() -> None:
    attached = attach(*population())
    engine = decoder(attached)
    few, many = prompts(CANDIDATES), prompts(16 * CANDIDATES)
    candidates = list(range(CANDIDATES)) * 16

    def built(questions: list[list[int]]) -> bool:
        jobs = engine._plan(questions, candidates[: len(questions)], attached)
        return all(job.candidate is not None for job in jobs)

    assert not built(few)
    assert built(many) == (jax.default_backend() == "cpu")


def test_new_gains_and_weights_compile_nothing() -> None:
    base, basis, gains = population()
    questions = prompts(30)
    candidates = [i % CANDIDATES for i in range(30)]
    engine = decoder(mode="rows", max_rows=32, workers=1)
    first = engine.decode(questions, candidates, params=attach(base, basis, gains))
    shapes = engine.traces
    # One prefill, a decoding program for each of the sizes (32, 16) x (64), and the repacking.
    assert shapes <= 5
    flipped = jax.tree.map(lambda gain: 1.5 * gain[::-1], gains)
    second = engine.decode(questions, candidates, params=attach(base, basis, flipped))
    assert first != second
    # Other lengths of answers may shrink batches at other times, within the same short list.
    assert engine.traces <= 6


def test_a_large_run_compiles_a_handful_of_programs() -> None:
    engine = decoder(model(), max_rows=64, workers=1)
    engine.decode(prompts(300, longest=60))
    assert engine.traces <= 20


def test_two_workers_compile_each_shape_once() -> None:
    questions = prompts(64)
    one, two = (decoder(model(), max_rows=16, workers=workers) for workers in (1, 2))
    assert one.decode(questions) == two.decode(questions)
    assert one.traces == two.traces


def test_nothing_to_decode_gives_nothing() -> None:
    assert decoder(model()).decode([]) == []


def test_stop_at_once_gives_an_empty_answer() -> None:
    everything = list(range(CONFIG.vocab_size))
    assert decoder(model(), stop_tokens=everything).decode(prompts(3)) == [[], [], []]


def test_without_stop_tokens_every_answer_is_full() -> None:
    answers = decoder(model(), stop_tokens=[], max_new_tokens=9).decode(prompts(3))
    assert [len(answer) for answer in answers] == [9, 9, 9]


def test_the_context_cuts_an_answer() -> None:
    params = model()
    long = prompts(1, seed=3)[0][:1] * (CONFIG.max_positions - 4)
    engine = decoder(params, stop_tokens=[])
    (answer,) = engine.decode([long])
    assert len(answer) == 4
    assert len(engine.decode([[5], long])[0]) == NEW_TOKENS


@pytest.mark.parametrize("length", [0, 96, 200])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"prompt 1: expected 1 to 95 tokens.*found {length}"):
        decoder(model()).decode([[5], [5] * length])


def test_candidates_that_do_not_fit_are_refused() -> None:
    engine = decoder(attach(*population()))
    with pytest.raises(ValueError, match=r"expected one candidate per prompt \(2\), found none"):
        engine.decode([[5], [6]])
    with pytest.raises(ValueError, match=r"expected one candidate per prompt \(2\), found 1"):
        engine.decode([[5], [6]], [0])
    with pytest.raises(ValueError, match=r"prompt 1: expected a candidate in \[0, 3\), found 3"):
        engine.decode([[5], [6]], [0, 3])
    with pytest.raises(ValueError, match=r"prompt 0: expected a candidate in \[0, 1\), found 2"):
        decoder(model()).decode([[5]], [2])
    with pytest.raises(ValueError, match="expected params here or in the constructor"):
        decoder().decode([[5]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_tokens": [48]}, r"stop and pad tokens in \[0, 48\), got 48"),
        ({"pad_token": -1}, "got -1"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_rows": 0}, "at least 1, got .* 0"),
        ({"mode": "fast"}, "expected a mode of .* got 'fast'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(model(), **options)


def test_progress_and_statistics_count_prompts_and_tokens() -> None:
    questions = prompts(20)
    finished: list[int] = []
    engine = decoder(model(), max_rows=16)
    answers = engine.decode(questions, on_finished=finished.append)
    assert finished == [16, 4]
    stats = engine.stats
    assert stats.prompts == 20
    assert stats.prefill_tokens == sum(map(len, questions))
    assert stats.generated_tokens == sum(map(len, answers))
    assert DecodeStats(generated_tokens=6, seconds=2.0).tokens_per_second == 3.0
    assert DecodeStats().tokens_per_second == 0.0
