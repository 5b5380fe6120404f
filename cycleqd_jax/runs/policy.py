"""The library's own engine as a task's policy: conversations in, text of many candidates out."""

from collections.abc import Sequence
from typing import Any

from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.tasks.base import Message, Request

# Conversations kept in rendered form: first turns recur, later ones are mostly met once.
_REMEMBERED = 100_000


class PopulationPolicy:
    """Answers requests with a decoder whose weights hold a whole population.

    Args:
        decoder: decodes rows of many candidates in one batch.
        tokenizer: a Hugging Face tokenizer with a chat template.

    Call `use` before each rollout.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "expected a tokenizer with a chat template, found none in "
                f"{tokenizer.name_or_path}: add chat_template.jinja to the base's folder"
            )
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._rendered: dict[tuple[Message, ...], list[int]] = {}
        self._params: Any = None
        self._population = False

    def use(self, params: Any, *, population: bool) -> None:
        """Speak with these weights: one model's, or a population's (with gains attached)."""
        self._params, self._population = params, population

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request, in order."""
        if len(self._rendered) > _REMEMBERED:
            self._rendered = {}
        self._render({request.messages for request in requests} - self._rendered.keys())
        rows = self._decoder.decode(
            [self._rendered[request.messages] for request in requests],
            [request.candidate for request in requests] if self._population else None,
            params=self._params,
        )
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self._decoder.stops.cut(text) for text in texts]

    def _render(self, conversations: set[tuple[Message, ...]]) -> None:
        # The same problems come back every generation: a conversation is rendered once.
        if not conversations:
            return
        wanted = sorted(conversations)
        chats = [[message._asdict() for message in messages] for messages in wanted]
        tokens = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        self._rendered.update(zip(wanted, tokens, strict=True))
