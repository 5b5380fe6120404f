"""Policies without a model: a function that speaks, and the ideal agent."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cycleqd_jax.tasks.base import Message, Problem, Request


@dataclass(frozen=True)
class ScriptedPolicy:
    """Answers every request by a function of it.

    Attributes:
        speak: request → text.
    """

    speak: Callable[[Request], str]

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request, in order."""
        return [self.speak(request) for request in requests]


def ideal_policy(problems: Iterable[Problem]) -> ScriptedPolicy:
    """The agent that says what the problems' ideal answers are, turn by turn.

    Every candidate is ideal. A conversation is recognised by how it begins, so problems of several
    tasks may come together. After its last answer the agent says nothing more.

    Raises:
        ValueError: asked about a conversation that begins like no demonstration.
    """
    known: dict[tuple[Message, ...], Problem] = {}
    for problem in problems:
        talk = problem.demonstration
        # Answers, and the observations between them, stand at the end.
        known[talk[: len(talk) - 2 * len(problem.answers) + 1]] = problem
    lengths = sorted({len(opening) for opening in known})

    def speak(request: Request) -> str:
        for length in lengths:
            problem = known.get(request.messages[:length])
            if problem is not None:
                turn = (len(request.messages) - length) // 2
                return problem.ideal_answer(turn, request.messages[-1].content)
        raise ValueError(
            "ideal policy: expected a conversation that begins like a demonstration of one of "
            f"{len(known)} problems, found {request.messages[:1]}"
        )

    return ScriptedPolicy(speak)
