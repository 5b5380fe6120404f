"""The library's own engine as a task's policy: conversations in, text of many candidates out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.generate import GREEDY, Decoder
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.talk import Talk
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
    """Speaks with a decoder whose weights hold a whole population (`tasks.base.Speaker`).

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

    def converse(
        self, heard: Callable[[Any, Any], None], failed: Callable[[Exception], None]
    ) -> "Spoken":
        """Begin to speak with the weights that are in use; see `Speaker`."""
        # A run can be repeated: in other types, what is said would depend on when it is asked.
        keep = self._decoder.config.dtype == "float32"
        return Spoken(
            self._decoder.talk(heard, failed, self._params, sampling=self._sampling, keep=keep),
            self._conversations,
            self._say,
            candidates=self._population,
            seeds=self._sampling.temperature > 0.0,
        )

    def _say(self, answers: Sequence[Sequence[int]]) -> list[str]:
        # A population says the same again and again.
        distinct = list(dict.fromkeys(map(tuple, answers)))
        texts = self._tokenizer.batch_decode(distinct, skip_special_tokens=True)
        text_of = dict(zip(distinct, map(self._decoder.stops.cut, texts), strict=True))
        return [text_of[tuple(row)] for row in answers]


class Spoken:
    """The conversations of a rollout with one population (`tasks.base.Conversation`)."""

    def __init__(
        self,
        talk: Talk,
        conversations: Conversations,
        say: Callable[[Sequence[Sequence[int]]], list[str]],
        *,
        candidates: bool,
        seeds: bool,
    ) -> None:
        self._talk = talk
        self._conversations = conversations
        self._candidates, self._seeds = candidates, seeds
        self.texts = say
        self.end, self.close = talk.end, talk.close

    def ask(self, who: Sequence[Any], requests: Sequence[Request]) -> None:
        """Ask for the next messages of episodes."""
        self._talk.ask(
            who,
            self._conversations.render(requests),
            [request.candidate for request in requests] if self._candidates else None,
            [request.seed for request in requests] if self._seeds else None,
        )
