"""Models and whole populations as models of EleutherAI's lm-evaluation-harness (package `lm_eval`).

The harness asks one model at a time, for all of a task's requests at once. `PopulationLM` answers a
request for every candidate together and remembers the answers; each candidate is an `LM` of its own
that picks its share. Whoever of them is evaluated first has the batch computed, the others find it
done. Tokens, truncation and stopping are those of the harness's own backend for `transformers`
(`HFLM` with batches of one, whose answers do not depend on the order of the requests).
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.likelihood import Scorer
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.stops import StopStrings
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.progress import Progress

try:
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise ImportError(
        "tasks of lm-evaluation-harness need lm_eval: pip install 'cycleqd-jax[lm-eval]'"
    ) from missing

_REMEMBERED_TEXTS = 100_000
# Options of `transformers` that change nothing at these values; at others they are not implemented.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}
_SAMPLING = ("top_k", "top_p")


class PopulationLM(TemplateLM):
    """Answers requests of the harness for every candidate of a population at once.

    It is not itself an `LM` to evaluate: an answer is a tuple with one entry a candidate. Those to
    evaluate are `models`. Nothing is kept of a request but its answers, until `use` or `forget`.

    Args:
        config: the models'.
        tokenizer: a Hugging Face tokenizer, the models'.
        params: weights to begin with; see `use`.
        max_length: most tokens of a text; `config.max_positions` by default, and at most that.
        max_gen_toks: the longest answer where a task names none.
        add_bos_token: whether texts begin with the tokenizer's first token; None leaves it to the
            tokenizer. A text that begins with it already gets no second one.
        prefix_token_id: what stands before a text that has no context; by default the tokenizer's
            begin-of-text token, or else its end-of-text token.
        chat_template_args: further arguments of the chat template.
        seed: of sampled answers. An answer follows from seed, request and weights, and is drawn
            with the same noise in every candidate.
        scorer: computes log-likelihoods (default: one with its own defaults).
        max_rows: the largest batch of texts that are generated.

    Raises:
        ValueError: a `max_length` beyond `config.max_positions`, or a tokenizer without end.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: Any,
        params: Any = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        scorer: Scorer | None = None,
        max_rows: int = 256,
    ) -> None:
        super().__init__()
        if max_length is not None and not 0 < max_length <= config.max_positions:
            raise ValueError(
                f"max_length: expected 1 to {config.max_positions}, the model's max_positions, "
                f"found {max_length}"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: expected a tokenizer with an end-of-text token "
                "(eos_token), found none"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length or config.max_positions
        self.max_gen_toks = max_gen_toks
        self.scorer = scorer or Scorer(config)
        stops = tuple(dict.fromkeys((*config.eos_ids, tokenizer.eos_token_id)))
        self.decoder = Decoder(
            None, config, stop_tokens=stops, pad_token=stops[0], max_rows=max_rows
        )
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id
        self._template_args = dict(chat_template_args or {})
        self._seed = seed
        self._answers: dict[Hashable, tuple[Any, ...]] = {}
        self._encoded = lru_cache(_REMEMBERED_TEXTS)(self._encode)
        self._params: Any = None
        if params is not None:
            self.use(params)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "PopulationLM":
        """One model from its Hugging Face folder; `options` are those of the constructor.

        Raises:
            ValueError: the folder is no model that this library reads.
        """
        config, params = load_model(folder)
        return cls(config, load_tokenizer(folder), params, **options)

    def use(self, params: Any) -> list["CandidateLM"]:
        """Answer with these weights from now on: one model's, or kernels of a population.

        Returns:
            One `LM` a candidate. Those of earlier weights must not be asked any more.
        """
        self.release()
        self._params = unstack_layers(params)
        return self.models

    def release(self) -> None:
        """Let go of weights and answers: nothing can be asked before the next `use`."""
        self.forget()
        self._params = None

    @property
    def models(self) -> list["CandidateLM"]:
        """The candidates, each to be evaluated by the harness."""
        return [CandidateLM(self, candidate) for candidate in range(self._count)]

    def forget(self) -> None:
        """Drop all answers."""
        self._answers.clear()

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        if self._prefix is not None:
            return self._prefix
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer in the harness's own cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, with the special tokens that the harness asks for."""
        return list(self._encoded(string, add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; a template without a system role is asked without it."""

        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )

        try:
            return apply(chat_history)
        except jinja2.exceptions.TemplateError:
            return apply([message for message in chat_history if message["role"] != "system"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """For each (context, continuation) a (log-likelihood, is greedy) a candidate.

        Raises:
            ValueError: a continuation that gets no token of its own, or more than `max_length`.
        """
        compute = super().loglikelihood
        return self._remember(
            [("loglikelihood", *request.args) for request in requests],
            lambda new: compute([requests[i] for i in new], disable_tqdm=True),
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[Any]:
        """For each (text,) its log-likelihood a candidate, in windows of `max_length` tokens."""

        def compute(new: Sequence[int]) -> list[tuple[float, ...]]:
            windows: list[Any] = []
            owners: list[int] = []
            for i in new:
                (text,) = requests[i].args
                found = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                windows += [(None, *make_disjoint_window(window)) for window in found]
                owners += [i] * (len(windows) - len(owners))
            totals = {i: [0.0] * self._count for i in new}
            for i, answers in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                for candidate, (value, _) in enumerate(answers):
                    totals[i][candidate] += value
            return [tuple(totals[i]) for i in new]

        keys = [("loglikelihood_rolling", *request.args) for request in requests]
        return self._remember(keys, compute)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """For each (context, options) the text that follows, a candidate.

        Equal requests of one call are repeats and are sampled anew.

        Raises:
            ValueError: options that are not implemented, sampling without a temperature, or no
                room for `max_gen_toks` tokens.
        """
        keys: list[Hashable] = []
        seen: dict[Hashable, int] = {}
        for request in requests:
            context, options = request.args
            key = (context, json.dumps(options, sort_keys=True, default=str))
            seen[key] = seen.get(key, -1) + 1
            keys.append(("generate_until", *key, seen[key]))

        def compute(new: Sequence[int]) -> list[tuple[str, ...]]:
            groups: dict[_Options, list[int]] = {}
            for i in new:
                options = self._options(requests[i].args[1])
                groups.setdefault(options, []).append(i)
            texts: dict[int, tuple[str, ...]] = {}
            for options, members in groups.items():
                contexts = [requests[i].args[0] for i in members]
                seeds = [self._seed_of(keys[i]) for i in members]
                texts |= zip(members, self._generate(contexts, options, seeds), strict=True)
            return [texts[i] for i in new]

        return self._remember(keys, compute)

    def _remember(
        self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[tuple[Any, ...]]]
    ) -> list[tuple[Any, ...]]:
        """The answers of all keys; `compute` gets the places of those that are not known yet."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        new = [i for key, i in first.items() if key not in self._answers]
        if new:
            if self._params is None:
                raise ValueError("PopulationLM: expected weights, found none: call `use` first")
            self._answers |= zip((keys[i] for i in new), compute(new), strict=True)
        return [self._answers[key] for key in keys]

    @property
    def _count(self) -> int:
        return kernels.num_candidates(self._params) or 1

    def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None:
            begin = self.tokenizer.decode(self.prefix_token_id)
            special = False if has_bos_prefix(string, begin) else special
        chosen = {} if special is None else {"add_special_tokens": special}
        return tuple(self.tokenizer.encode(string, **chosen))

    def _encode_prompt(self, context: str) -> list[int]:
        special = False if has_bos_prefix(context, self.tokenizer.bos_token) else self._add_bos
        chosen = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer(context, **chosen)["input_ids"] or [self.prefix_token_id]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Any]:
        pairs = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"expected a continuation of 1 to {self.max_length} tokens (max_length) behind "
                    f"its context, found {len(continuation)} in {_shown(texts)}"
                )
            # What is too long loses its beginning; the last token is predicted, not read.
            whole = [*context, *continuation][-(self.max_length + 1) :]
            pairs.append((whole[: -len(continuation)], whole[-len(continuation) :]))
        with Progress("log-likelihoods", len(pairs), transient=True) as progress:
            found = self.scorer.score(
                pairs,
                self._params,
                lambda share: progress.advance(round(share * len(pairs)) - progress.completed),
            )
        return [
            tuple(zip(values.tolist(), greedy.tolist(), strict=True))
            for values, greedy in zip(found.log_probability.T, found.greedy.T, strict=True)
        ]

    def _options(self, given: Mapping[str, Any]) -> "_Options":
        options = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until"), eos=end)
        longest, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = float(options.pop("temperature", 0.0))
        cuts = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
        for name, value in options.items():
            if value is not None and value != _NEUTRAL.get(name):
                raise ValueError(f"generation option {name}={value!r} is not implemented")
        if sampled and temperature <= 0:
            raise ValueError(
                f"do_sample: expected a temperature above 0 with it, found {temperature}"
            )
        if not 0 < longest < self.max_length:
            raise ValueError(
                f"max_gen_toks: expected 1 to {self.max_length - 1}, less than max_length, "
                f"found {longest}"
            )
        sampling = Sampling(temperature, **cuts) if sampled else Sampling()
        return longest, tuple(stop for stop in until if stop), sampling

    def _generate(
        self, contexts: Sequence[str], options: "_Options", seeds: Sequence[int]
    ) -> list[tuple[str, ...]]:
        longest, until, sampling = options
        prompts = [self._encode_prompt(c)[-(self.max_length - longest) :] for c in contexts]
        candidates = [c for c in range(self._count) for _ in prompts]
        with Progress("answers", len(candidates), transient=True) as progress:
            rows = self.decoder.decode(
                prompts * self._count,
                candidates,
                self._params,
                progress.advance,
                sampling=sampling,
                seeds=[*seeds] * self._count,
                max_new_tokens=longest,
                stops=StopStrings(until, self.tokenizer.decode),
            )
        texts = [
            postprocess_generated_text(text, list(until), None)
            for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ]
        return [tuple(texts[i :: len(prompts)]) for i in range(len(prompts))]

    def _seed_of(self, key: Hashable) -> int:
        digest = hashlib.blake2b(repr((self._seed, key)).encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1


class CandidateLM(LM):
    """One candidate of a `PopulationLM`, as the harness's evaluator takes it."""

    def __init__(self, population: PopulationLM, candidate: int) -> None:
        super().__init__()
        self._population = population
        self._candidate = candidate
        # What the harness looks up to describe a model.
        self.tokenizer = population.tokenizer
        self.eot_token_id = population.eot_token_id
        self.max_length = population.max_length

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood, and whether it is greedy."""
        return self._mine(self._population.loglikelihood(requests))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each (text,)."""
        return self._mine(self._population.loglikelihood_rolling(requests))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each (context, options)."""
        return self._mine(self._population.generate_until(requests))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return self._population.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template."""
        return self._population.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer in the harness's own cache of requests."""
        return self._population.tokenizer_name

    def _mine(self, answers: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [answer[self._candidate] for answer in answers]


# Longest answer, stop strings, sampling.
_Options = tuple[int, tuple[str, ...], Sampling]


def _shown(texts: tuple[str, str] | None) -> str:
    if texts is None:
        return "a window of a text"
    context, continuation = texts
    return f"{continuation[:80]!r} after {context[-80:]!r}"
