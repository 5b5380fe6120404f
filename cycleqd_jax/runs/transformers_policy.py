"""A `transformers` model as a task's policy, to compare engines; needs ``torch``."""

from collections.abc import Sequence
from typing import Any

from cycleqd_jax.runs.policy import Conversations
from cycleqd_jax.tasks.base import Request


class TransformersPolicy:
    """Answers the requests of one model.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        stop_tokens: end an answer and are not part of it.
        max_new_tokens: the longest answer.
        temperature: 0 is greedy; else a word is drawn with the request's seed. The draws are
            torch's: other words than those of our engine for the same seed.
        max_rows: conversations that are answered together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop_tokens: Sequence[int],
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        max_rows: int = 64,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._conversations = Conversations(tokenizer)
        self._stops = list(stop_tokens)
        self._max_new = max_new_tokens
        self._temperature = temperature
        # Rows that share a batch would share the draws.
        self._max_rows = 1 if temperature else max_rows

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request, in order.

        Raises:
            ValueError: a request is for another candidate than 0, or leaves no room for a word.
        """
        for request in requests:
            if request.candidate != 0:
                raise ValueError(f"expected one model, candidate 0, found {request.candidate}")
        prompts = self._conversations.render(requests)
        rows: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), self._max_rows):
            chosen = order[first : first + self._max_rows]
            answers = self._generate([prompts[i] for i in chosen], requests[chosen[0]].seed)
            for i, answer in zip(chosen, answers, strict=True):
                rows[i] = answer
        return list(self._tokenizer.batch_decode(rows, skip_special_tokens=True))

    def _generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        limit = self._model.config.max_position_embeddings
        width = max(map(len, prompts))
        if width >= limit:
            raise ValueError(f"expected conversations of less than {limit} tokens, found {width}")
        # Filled up on the left, where attention is masked: answers begin at one place.
        padding = self._stops[0]
        tokens = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        drawn = {"temperature": self._temperature, "top_k": 0} if self._temperature else {}
        settings = GenerationConfig(
            max_new_tokens=self._max_new,
            do_sample=bool(self._temperature),
            eos_token_id=self._stops,
            pad_token_id=padding,
            **drawn,
        )
        device = self._model.device
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self._model.generate(
                tokens.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        answers = []
        for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in self._stops), len(row))
            answers.append(row[: min(end, limit - len(prompt))])
        return answers
