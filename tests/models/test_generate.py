import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import materialise
from cycleqd_jax.models import kernels
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.generate import Decoder, DecodeStats
from cycleqd_jax.models.llama import forward
from cycleqd_jax.models.programs import STEPS
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.specs import LlamaConfig, roles

CONFIG = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=96)
CANDIDATES, NEW_TOKENS = 3, 20
STOPS = [1, 2, 3]


attach = jax.jit(kernels.attach)
full_forward = jax.jit(forward, static_argnums=1)
build = jax.jit(materialise)


@pytest.fixture(scope="module")
def model(make_params: Callable[..., Any]) -> Any:
    """Weights large enough that a text does not fall into a loop at once."""
    return make_params(CONFIG, scale=3.0)


@pytest.fixture(scope="module")
def population(model: Any, make_population: Callable[..., Any]) -> tuple[Any, Any, Any]:
    return model, *make_population(CONFIG, (2, 2), CANDIDATES, 0.2)


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


@pytest.fixture(scope="module")
def shared(model: Any) -> Decoder:
    """One decoder for all tests that ask for nothing special: its programs are compiled once."""
    return decoder(model, max_rows=16, workers=1)


def test_answers_are_those_of_full_forward_passes(model: Any, shared: Decoder) -> None:
    questions = prompts(9)
    answers = shared.decode(questions)
    assert answers == [naive(model, question) for question in questions]
    assert len({len(answer) for answer in answers}) > 2


@pytest.mark.parametrize("mode", ["rows", "candidates"])
def test_rows_of_a_population_equal_each_candidate_alone(mode: Any, population: Any) -> None:
    base, basis, gains = population
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


def test_an_answer_does_not_depend_on_its_company(shared: Decoder) -> None:
    questions = prompts(40)
    together = shared.decode(questions)
    assert [shared.decode([question])[0] for question in questions[:6]] == together[:6]
    assert shared.decode(questions[::-1]) == together[::-1]


@pytest.mark.slow
def test_stacked_weights_equal_each_candidate_alone(population: Any) -> None:
    base, basis, gains = population
    models = [
        build(base, basis, jax.tree.map(lambda leaf, c=c: leaf[c], gains))
        for c in range(CANDIDATES)
    ]
    # Candidates with different numbers of prompts, more than there are places.
    candidates = [0] * 11 + [2] * 3 + [1] * 5
    questions = prompts(len(candidates))
    engine = decoder(kernels.stack(models, roles(CONFIG)), max_rows=12)
    answers = engine.decode(questions, candidates)
    attached = attach(base, basis, gains)
    assert answers == decoder(attached, mode="rows").decode(questions, candidates)
    assert len({tuple(answer) for answer in answers}) > CANDIDATES


SAMPLED = Sampling(temperature=1.0, top_p=0.95)


def test_a_sampled_answer_follows_from_its_seed_alone(shared: Decoder) -> None:
    questions = prompts(6) * 5
    seeds = list(range(30))
    together = shared.decode(questions, sampling=SAMPLED, seeds=seeds)
    order = np.random.default_rng(1).permutation(30)
    shuffled = shared.decode(
        [questions[i] for i in order], sampling=SAMPLED, seeds=[seeds[i] for i in order]
    )
    assert shuffled == [together[i] for i in order]
    alone = [shared.decode([questions[i]], sampling=SAMPLED, seeds=[seeds[i]])[0] for i in (3, 17)]
    assert alone == [together[3], together[17]]
    assert len({tuple(answer) for answer in together}) > 20


def test_sampling_from_one_token_is_greedy(shared: Decoder) -> None:
    questions = prompts(9)
    one = shared.decode(questions, sampling=Sampling(temperature=0.7, top_k=1), seeds=range(9))
    assert one == shared.decode(questions)


def test_other_sampling_settings_compile_nothing(shared: Decoder) -> None:
    # One chunk for all rows: other settings end other rows early, and so make other shapes.
    questions, new = prompts(6) * 5, 1 + STEPS
    shared.decode(questions, sampling=SAMPLED, max_new_tokens=new)
    before = shared.traces
    other = Sampling(temperature=0.5, top_k=7, top_p=0.8)
    shared.decode(questions, sampling=other, max_new_tokens=new)
    assert shared.traces == before


def test_a_stop_string_ends_an_answer(model: Any, shared: Decoder) -> None:
    def text(tokens: Any) -> str:
        return "".join(chr(60 + token) for token in tokens)

    questions = prompts(12)
    plain = [text(answer) for answer in shared.decode(questions)]
    stop = max(plain, key=len)[5:8]
    engine = decoder(model, max_rows=16, stop_strings=[stop], detokenize=text)
    answers = [text(answer) for answer in engine.decode(questions)]
    expected = [whole[: whole.index(stop) + 3] if stop in whole else whole for whole in plain]
    assert answers == expected != plain
    assert stop not in "".join(map(engine.stops.cut, answers))


@pytest.mark.slow
def test_a_shared_prefix_is_prefilled_once_per_candidate(
    population: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = attach(*population)
    system = np.random.default_rng(3).integers(4, CONFIG.vocab_size, 40).tolist()
    questions = [[*system, *question] for question in prompts(6, longest=9)] * CANDIDATES
    candidates = [c for c in range(CANDIDATES) for _ in range(6)]
    engine = decoder(attached, mode="rows", max_rows=8, workers=1)
    prefixes: list[tuple[int, int]] = []
    widths: list[int] = []
    compute, enter = engine._programs.prefix, engine._programs.enter

    def counted(weights: Any, tokens: Any, rows: Any) -> Any:
        prefixes.append(tokens.shape)
        return compute(weights, tokens, rows)

    def watched(weights: Any, entering: Any, *rest: Any) -> Any:
        widths.append(entering.tokens.shape[1])
        return enter(weights, entering, *rest)

    monkeypatch.setattr(engine._programs, "prefix", counted)
    monkeypatch.setattr(engine._programs, "enter", watched)
    answers = engine.decode(questions, candidates)
    # Three candidates, in the bucket of four.
    assert prefixes == [(4, 32)]
    assert max(widths) <= 32
    # One row of each candidate at a time shares nothing.
    apart = decoder(attached, mode="rows", max_rows=8, workers=1)
    for i in range(6):
        mine = list(range(i, 6 * CANDIDATES, 6))
        alone = apart.decode([questions[j] for j in mine], [candidates[j] for j in mine])
        assert alone == [answers[j] for j in mine]


def test_a_chosen_mode_follows_cost_and_number_of_prompts(population: Any) -> None:
    attached = attach(*population)
    engine = decoder(attached)
    few, many = prompts(CANDIDATES), prompts(16 * CANDIDATES)
    candidates = list(range(CANDIDATES)) * 16

    def built(questions: list[list[int]]) -> bool:
        return engine._builds(attached, questions, candidates[: len(questions)])

    assert not built(few)
    assert built(many) == (jax.default_backend() == "cpu")


def test_new_gains_and_weights_compile_nothing(population: Any) -> None:
    base, basis, gains = population
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


@pytest.mark.slow
def test_a_large_run_compiles_a_handful_of_programs(model: Any) -> None:
    engine = decoder(model, max_rows=32, workers=1)
    engine.decode(prompts(150, longest=40))
    # Widths 16, 32 and 48: a prefill and an insertion each; 32, 64 and 96 slots and 16 rows at the
    # end: a chunk and a repacking each; the first batch, and insertions at other cache sizes.
    assert engine.traces <= 18
    engine.decode(prompts(300, longest=40, seed=1))
    assert engine.traces <= 24


def test_two_workers_compile_each_shape_once(model: Any, shared: Decoder) -> None:
    questions = prompts(64)
    pair = decoder(model, max_rows=16, workers=2)
    assert pair.decode(questions) == shared.decode(questions)
    # Prompts of up to 16 and of up to 32 tokens are prefilled; the cache starts at 32 or 64 slots
    # and may grow by one unit.
    assert pair.traces <= 6


def test_nothing_to_decode_gives_nothing(shared: Decoder) -> None:
    assert shared.decode([]) == []


def test_stop_at_once_gives_an_empty_answer(model: Any) -> None:
    everything = list(range(CONFIG.vocab_size))
    assert decoder(model, stop_tokens=everything).decode(prompts(3)) == [[], [], []]


def test_the_context_or_the_limit_cuts_an_answer_without_stop_tokens(model: Any) -> None:
    long = [7] * (CONFIG.max_positions - 4)
    answers = decoder(model, stop_tokens=[], max_new_tokens=9).decode([[5], long, [6, 8]])
    assert [len(answer) for answer in answers] == [9, 4, 9]


@pytest.mark.parametrize("length", [0, 96, 200])
def test_prompts_that_do_not_fit_are_refused(length: int, model: Any) -> None:
    with pytest.raises(ValueError, match=f"prompt 1: expected 1 to 95 tokens.*found {length}"):
        decoder(model).decode([[5], [5] * length])


def test_candidates_that_do_not_fit_are_refused(model: Any, population: Any) -> None:
    engine = decoder(attach(*population))
    with pytest.raises(ValueError, match=r"expected one candidate per prompt \(2\), found none"):
        engine.decode([[5], [6]])
    with pytest.raises(ValueError, match=r"expected one candidate per prompt \(2\), found 1"):
        engine.decode([[5], [6]], [0])
    with pytest.raises(ValueError, match=r"prompt 1: expected a candidate in \[0, 3\), found 3"):
        engine.decode([[5], [6]], [0, 3])
    with pytest.raises(ValueError, match=r"prompt 0: expected a candidate in \[0, 1\), found 2"):
        decoder(model).decode([[5]], [2])
    with pytest.raises(ValueError, match=r"expected one seed per prompt \(1\), found 2"):
        decoder(model).decode([[5]], seeds=[1, 2])
    with pytest.raises(ValueError, match=r"prompt 0: expected a seed in \[0, 2\^31\), found -1"):
        decoder(model).decode([[5]], seeds=[-1])
    with pytest.raises(ValueError, match="expected params here or in the constructor"):
        decoder().decode([[5]])
    with pytest.raises(ValueError, match="max_new_tokens of at least 1, got 0"):
        decoder(model).decode([[5]], max_new_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_tokens": [48]}, r"stop and pad tokens in \[0, 48\), got 48"),
        ({"pad_token": -1}, "got -1"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_rows": 0}, "at least 1, got .* 0"),
        ({"workers": 0}, "workers of at least 1, got 0"),
        ({"mode": "fast"}, "expected a mode of .* got 'fast'"),
        ({"stop_strings": ["x"]}, "expected detokenize with them, found none"),
        ({"stop_strings": [""]}, "expected texts, found an empty one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(model, **options)


def test_progress_and_statistics_count_prompts_and_tokens(shared: Decoder) -> None:
    questions = prompts(20)
    finished: list[int] = []
    before = shared.stats
    answers = shared.decode(questions, on_finished=finished.append)
    assert sum(finished) == 20
    assert len(finished) > 1
    stats = shared.stats
    assert stats.prompts - before.prompts == 20
    assert stats.prefill_tokens - before.prefill_tokens == sum(map(len, questions))
    assert stats.generated_tokens - before.generated_tokens == sum(map(len, answers))
    assert DecodeStats(generated_tokens=6, seconds=2.0).tokens_per_second == 3.0
    assert DecodeStats().tokens_per_second == 0.0


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(
    make_params: Callable[..., Any], tmp_path: Any
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    count, new = 64, 64
    config = dataclasses.replace(CONFIG, vocab_size=96, tie_embeddings=True, pad_id=0)
    # Logits well apart: a text must not hang on the last bit of a product.
    params = make_params(config, scale=4.0)
    save_model(tmp_path / "model", config, params)
    peer = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    rng = np.random.default_rng(7)
    questions = [rng.integers(4, 96, rng.integers(3, 31)).tolist() for _ in range(count)]
    width = max(map(len, questions))
    ids = torch.tensor([[0] * (width - len(q)) + q for q in questions])
    mask = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in questions])
    with torch.inference_mode():
        out = peer.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
    engine = Decoder(
        params, config, stop_tokens=[], pad_token=0, max_new_tokens=new, max_rows=32, workers=1
    )
    answers = engine.decode(questions)
    assert answers == out[:, width:].tolist()
    assert len({token for answer in answers for token in answer}) > 20
