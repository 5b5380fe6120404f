"""Our models in lm-evaluation-harness; the live comparison is with the harness's own backend."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, materialise
from cycleqd_jax.models import llama
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.specs import LeafSpec, leaf_table

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[lm-eval]'")

from cycleqd_jax.runs.language.harness import PopulationLM

LENGTH = 64
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(begin: bool) -> Any:
    """Byte-level BPE of a few merges, so that every text is legal and pieces join over spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["The question is what the answer was. Paris"] * 20, trainer)
    names = {"eos_token": "</s>", "pad_token": "<pad>"}
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        names["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def draw(kind: Callable[[LeafSpec], Any], config: LlamaConfig) -> Any:
    return jax.tree.map(kind, leaf_table(config))


class Family:
    """A random base, a basis of two experts, and three candidates."""

    def __init__(self, begin: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.tokenizer = byte_tokenizer(begin)
        self.config = LlamaConfig(
            len(self.tokenizer), 32, 48, 2, 4, 2, 8, max_positions=LENGTH, eos_ids=(1,), pad_id=2
        )

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        def weights(spec: LeafSpec) -> jax.Array:
            shape = spec.full_shape(self.config.num_layers)
            std = spec.init_std
            values = np.ones(shape, np.float32) if std is None else np.float32(3 * std)
            return jnp.asarray(values if std is None else values * normal(*shape))

        def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
            lead = (self.config.num_layers,) if spec.stacked else ()
            if spec.role == "vector":
                return VectorFactors(delta=0.1 * normal(*lead, 2, *spec.shape))
            u, v = (normal(*lead, side, 2) for side in spec.shape)
            return MatrixFactors(u=np.float32(0.1) * u, v=v, ranks=(1, 1))

        def gains(spec: LeafSpec) -> np.ndarray:
            lead = (3, self.config.num_layers) if spec.stacked else (3,)
            return rng.random((*lead, 2)).astype(np.float32)

        kinds: Sequence[Callable[[LeafSpec], Any]] = (weights, factors, gains)
        self.base, self.basis, self.gains = (draw(kind, self.config) for kind in kinds)

    def candidate(self, number: int) -> Any:
        gains = jax.tree.map(lambda leaf: leaf[number], self.gains)
        return jax.jit(materialise)(self.base, self.basis, gains)


@pytest.fixture(scope="module")
def bred() -> Family:
    return Family()


@pytest.fixture(scope="module")
def single(bred: Family) -> PopulationLM:
    return PopulationLM(bred.config, bred.tokenizer, bred.base)


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def by_definition(bred: Family, context: Sequence[int], continuation: Sequence[int]) -> float:
    text = [*context, *continuation]
    tokens = np.zeros((1, 2 * LENGTH), int)
    tokens[0, : len(text)] = text
    logits = jax.jit(llama.forward, static_argnums=1)(bred.base, bred.config, jnp.asarray(tokens))
    logs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    at = np.arange(len(continuation)) + len(context) - 1
    return float(logs[at, list(continuation)].sum())


def test_contexts_and_continuations_are_cut_as_the_harness_cuts_them(
    bred: Family, single: PopulationLM
) -> None:
    encode = bred.tokenizer.encode
    long = "what is the question of Paris?" * 8
    last = encode(" was")[1:]
    cases = {
        ("the answer", " was Paris"): (encode("the answer"), encode(" was Paris")[1:]),
        # The space belongs to the word behind it.
        ("the answer ", "was"): (encode("the answer"), encode(" was")[1:]),
        ("", "Zürich 🙂"): ([0], encode("Zürich 🙂")[1:]),
        # A text that begins with the first token gets no second one.
        ("<s>the", " answer"): (encode("the"), encode(" answer")[1:]),
        # The last token is predicted and not read: LENGTH tokens before it.
        (long, " was"): ([*encode(long), *last][-LENGTH - 1 : -len(last)], last),
    }
    (model,) = single.models
    found = model.loglikelihood([ask(*texts) for texts in cases])
    for (value, _), (context, continuation) in zip(found, cases.values(), strict=True):
        assert value == pytest.approx(by_definition(bred, context, continuation), abs=1e-4)


def test_windows_of_a_long_text_predict_every_token_once(
    bred: Family, single: PopulationLM
) -> None:
    text = "The question is what the answer was. Zürich! " * 8
    tokens = bred.tokenizer.encode(text)
    assert 2 * LENGTH < len(tokens) < 3 * LENGTH
    whole = [0, *tokens]
    expected = sum(
        by_definition(bred, whole[first : first + 1], whole[first + 1 : first + 1 + LENGTH])
        for first in (0, LENGTH)
    )
    # The rest has as much context as the window takes.
    rest = len(tokens) - 2 * LENGTH
    expected += by_definition(bred, tokens[-LENGTH - 1 : -rest], tokens[-rest:])
    (model,) = single.models
    assert model.loglikelihood_rolling([ask(text)])[0] == pytest.approx(expected, abs=1e-3)


def test_candidates_answer_together_as_each_alone(bred: Family) -> None:
    together = PopulationLM(bred.config, bred.tokenizer)
    trained = together.use(attach(bred.base, bred.basis, bred.gains))
    assert len(trained) == 3
    pairs = [ask("the question", word) for word in (" is", " Paris", " what")]
    asked = [ask("The answer", {"until": ["e", "</s>"], "max_gen_toks": 12})]
    likely = [model.loglikelihood(pairs) for model in trained]
    rolled = [model.loglikelihood_rolling([ask("the question was")]) for model in trained]
    texts = [model.generate_until(asked) for model in trained]
    # One batch for all of them, and no second one.
    traces = together.scorer.traces, together.decoder.stats.prompts
    assert traces == (1, 3)
    assert trained[1].loglikelihood(pairs) == likely[1]
    assert (together.scorer.traces, together.decoder.stats.prompts) == traces
    alone = PopulationLM(bred.config, bred.tokenizer)
    for candidate in range(3):
        (model,) = alone.use(bred.candidate(candidate))
        for ours, theirs in zip(likely[candidate], model.loglikelihood(pairs), strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
            assert ours[1] == theirs[1]
        other = model.loglikelihood_rolling([ask("the question was")])
        assert rolled[candidate] == pytest.approx(other, abs=1e-4)
        assert texts[candidate] == model.generate_until(asked)
    assert len({values[0][0] for values in likely}) == 3


def test_repeats_are_drawn_anew_and_again_alike(bred: Family, single: PopulationLM) -> None:
    options = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    asked = [ask("The answer", options)] * 4
    (model,) = single.models
    texts = model.generate_until(asked)
    assert len(set(texts)) > 1
    single.forget()
    assert model.generate_until(asked) == texts
    (other,) = PopulationLM(bred.config, bred.tokenizer, bred.base, seed=1).models
    assert other.generate_until(asked) != texts


def test_what_cannot_be_answered_is_refused(bred: Family, single: PopulationLM) -> None:
    (model,) = single.models
    for options, message in (
        ({"num_beams": 4}, "num_beams=4 is not implemented"),
        ({"do_sample": True}, "temperature above 0"),
        ({"max_gen_toks": LENGTH}, f"expected 1 to {LENGTH - 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_until([ask("a", options)])
    with pytest.raises(ValueError, match="continuation of 1 to 64 tokens"):
        model.loglikelihood([ask("a", "")])
    with pytest.raises(ValueError, match="max_length: expected 1 to 64"):
        PopulationLM(bred.config, bred.tokenizer, max_length=65)
    (unready,) = PopulationLM(bred.config, bred.tokenizer, bred.base).use(bred.base)
    unready._population.release()
    with pytest.raises(ValueError, match="call `use` first"):
        unready.loglikelihood([ask("a", "b")])


def test_a_template_without_a_system_role_is_asked_without_it(single: PopulationLM) -> None:
    (model,) = single.models
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(chat) == "[user]Hi[assistant]"
    assert model.chat_template(True) == TEMPLATE
    assert "/" not in model.tokenizer_name


@pytest.mark.slow
@pytest.mark.parametrize("begin", [True, False])
def test_answers_are_those_of_the_harness_backend_for_transformers(
    begin: bool, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    from lm_eval.models.huggingface import HFLM

    bred = Family(begin)
    folder = save_model(tmp_path / "model", bred.config, bred.base, tokenizer=bred.tokenizer)
    theirs = HFLM(str(folder), device="cpu", batch_size=1, dtype="float32")
    (ours,) = PopulationLM.load(folder).models
    rng = np.random.default_rng(3)
    letters = [*"abcdehilnorstwTLP   .\n?", "é", "日", "🙂", "</s>", "<s>"]

    def text(least: int, most: int) -> str:
        return "".join(rng.choice(letters, rng.integers(least, most)))

    contexts = ["", "", *(text(1, 20) for _ in range(40)), *(text(60, 200) for _ in range(20))]
    contexts += [context + " " for context in contexts[2:12]]
    pairs = [(context, " " + text(1, 12)) for context in contexts]
    # A piece that swallows a continuation whole leaves nothing to score, for which both raise.
    pairs = [(a, b) for a, b in pairs if not a or len(theirs._encode_pair(a, b)[1])]
    requests = [ask(*pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    assert len(found) > 60
    assert max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)) <= 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    requests = [ask(text(1, 300)) for _ in range(10)]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-4)
    stops: list[Any] = [["e", "\n"], ["</s>"], "a", ["Th", "t "], [text(2, 4)]]
    requests = [
        ask(text(1, 100), {"until": stops[i % 5], "max_gen_toks": 8 + i, "do_sample": False})
        for i in range(15)
    ]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
