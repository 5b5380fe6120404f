"""The library's own engine as a task's policy: conversations in, text of many candidates out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.generate import GREEDY, Decoder
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.tasks.base import Message, Request

# Conversations kept in rendered form: first turns recur, later ones are mostly met once.
_REMEMBERED = 100_000


class Conversations:
    """Conversations as the tokens of a model, ready for its next answer.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "expected a tokenizer with a chat template, found none in "
                f"{tokenizer.name_or_path}: add chat_template.jinja to the base's folder"
            )
        self._tokenizer = tokenizer
        self._rendered: dict[tuple[Message, ...], list[int]] = {}

    def render(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of every request's conversation."""
        if len(self._rendered) > _REMEMBERED:
            self._rendered = {}
        # The same problems come back every generation: a conversation is rendered once.
        wanted = sorted({request.messages for request in requests} - self._rendered.keys())
        if wanted:
            chats = [[message._asdict() for message in messages] for messages in wanted]
            tokens = self._tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            self._rendered.update(zip(wanted, tokens, strict=True))
        return [self._rendered[request.messages] for request in requests]


class PopulationPolicy:
    """Answers requests with a decoder whose weights hold a whole population.

    Args:
        decoder: decodes rows of many candidates in one batch.
        tokenizer: a Hugging Face tokenizer with a chat template.
        sampling: how words are chosen; where they are drawn, with the seeds of the requests.

    It speaks inside of `using`, or after `use`.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, sampling: Sampling = GREEDY) -> None:
        self._conversations = Conversations(tokenizer)
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._params: Any = None
        self._population = False

    def use(self, params: Any, *, population: bool) -> None:
        """Speak with these weights: one model's, or a population's (with gains attached)."""
        self._params, self._population = params, population

    @contextmanager
    def using(self, params: Any, *, population: bool) -> Iterator[None]:
        """Speak with these weights for a while, and let go of them before others are made."""
        self.use(unstack_layers(params), population=population)
        del params
        try:
            yield
        finally:
            self._params = None

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request, in order."""
        rows = self._decoder.decode(
            self._conversations.render(requests),
            [request.candidate for request in requests] if self._population else None,
            params=self._params,
            sampling=self._sampling,
            seeds=[request.seed for request in requests] if self._sampling.temperature else None,
        )
        # A population says the same again and again.
        distinct = list(dict.fromkeys(map(tuple, rows)))
        texts = self._tokenizer.batch_decode(distinct, skip_special_tokens=True)
        text_of = dict(zip(distinct, map(self._decoder.stops.cut, texts), strict=True))
        return [text_of[tuple(row)] for row in rows]
