"""What is asked of a decoder: texts to generate, finished ones, and what may not be asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cycleqd_jax.models import kernels
from cycleqd_jax.models.specs import LlamaParams


@dataclass
class Request:
    """One text to generate: what it needs, and what there is so far.

    A text that goes on in its place has tokens that are `unread`: they are fed one by one. It goes
    on at position `resumes` of its place, None once it does.
    """

    ticket: int
    prompt: tuple[int, ...]
    candidate: int
    seed: int
    left: int
    shared: int = 0
    text: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    resumes: int | None = None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The first tokens that are shared with others."""
        return self.prompt[: self.shared]


@dataclass(frozen=True)
class Answer:
    """A finished text: the ticket that `Stream.submit` gave, and the token ids."""

    ticket: int
    tokens: list[int]


def check_requests(
    weights: LlamaParams,
    limit: int,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[int] | None,
    seeds: Sequence[int] | None,
) -> None:
    """Raise ValueError for prompts, candidates or seeds that cannot be decoded."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise ValueError(
                f"prompt {i}: expected 1 to {limit - 1} tokens, since max_positions is "
                f"{limit}, found {len(prompt)}"
            )
    if seeds is not None:
        if len(seeds) != len(prompts):
            raise ValueError(f"expected one seed per prompt ({len(prompts)}), found {len(seeds)}")
        for i, seed in enumerate(seeds):
            if not 0 <= seed < 1 << 31:
                raise ValueError(f"prompt {i}: expected a seed in [0, 2^31), found {seed}")
    population = kernels.num_candidates(weights)
    if population is None:
        if candidates is None:
            return
        population = 1
    if candidates is None or len(candidates) != len(prompts):
        found = "none" if candidates is None else str(len(candidates))
        raise ValueError(f"expected one candidate per prompt ({len(prompts)}), found {found}")
    for i, candidate in enumerate(candidates):
        if not 0 <= candidate < population:
            raise ValueError(
                f"prompt {i}: expected a candidate in [0, {population}), found {candidate}"
            )
