"""Texts that end an answer wherever they appear, however the tokenizer cuts them."""

from collections.abc import Callable, Sequence

# Tokens of a tail that may stand for no character of their own: special ones, parts of a character.
_SLACK = 8


class StopStrings:
    """Finds the token that completes a stop string.

    Args:
        strings: texts that end an answer, none of them empty.
        detokenize: token ids → text, such as a tokenizer's `decode`.

    Raises:
        ValueError: an empty string, or strings without `detokenize`.
    """

    def __init__(
        self, strings: Sequence[str], detokenize: Callable[[Sequence[int]], str] | None
    ) -> None:
        if "" in strings:
            raise ValueError("stop_strings: expected texts, found an empty one")
        if strings and detokenize is None:
            raise ValueError("stop_strings: expected detokenize with them, found none")
        self.strings = tuple(strings)
        self._detokenize = detokenize
        self._longest = max(map(len, strings), default=0)

    def end(self, tokens: Sequence[int], new: int) -> int | None:
        """How many tokens remain when the last `new` ones complete a stop string, else None.

        The token that completes the string is kept; `cut` takes the rest from the text.
        """
        if not self.strings or not new or not self._contains(tokens, len(tokens), new):
            return None
        ends = range(len(tokens) - new + 1, len(tokens) + 1)
        return next((end for end in ends if self._contains(tokens, end, 1)), None)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        found = [text.index(string) for string in self.strings if string in text]
        return text[: min(found)] if found else text

    def _contains(self, tokens: Sequence[int], end: int, new: int) -> bool:
        """Whether a stop string ends in the last `new` of the first `end` tokens (or just before).

        A character takes several tokens only in part, so a tail of as many tokens as the string has
        characters is enough.
        """
        assert self._detokenize is not None
        tail = self._detokenize(tokens[max(0, end - new - self._longest - _SLACK) : end])
        return any(string in tail for string in self.strings)
