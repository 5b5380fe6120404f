"""What JSON took from MBPP+'s arguments: tuples, sets and complex numbers, put back by problem.

EvalPlus published the arguments as JSON, and with its scorer a list of the problems whose functions
take something else. The list and its rules are restated here from `mbpp_deserialize_inputs`
(evalplus 0.3.1, Apache-2.0), shape by shape.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

Arguments = list[Any]


def restore(number: int, arguments: Arguments) -> tuple[Any, ...]:
    """The arguments of one call of problem `Mbpp/number` as its function takes them.

    Raises:
        ValueError, TypeError, IndexError, AttributeError: they have not the shape that this
            problem's arguments have.
    """
    return tuple(_RULE_OF.get(number, list)(arguments))


def _all_tuples(arguments: Arguments) -> Arguments:
    return [tuple(argument) for argument in arguments]


def _lists_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(row) for row in argument] for argument in arguments]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(row) for row in argument) for argument in arguments]


def _first_list_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(row) for row in arguments[0]], arguments[1]]


def _first_tuple(arguments: Arguments) -> Arguments:
    return [tuple(arguments[0]), *arguments[1:]]


def _second_tuple(arguments: Arguments) -> Arguments:
    return [arguments[0], tuple(arguments[1])]


def _sets_or_empty_dicts(arguments: Arguments) -> Arguments:
    # As published: whatever is not a list with something in it becomes an empty dictionary.
    return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]


def _real_and_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _one_complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _tuple_with_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(x) if isinstance(x, list) else x for x in arguments[0])]


def _dictionary_of_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


def _tuples_all_the_way(value: Any) -> Any:
    return tuple(map(_tuples_all_the_way, value)) if isinstance(value, list) else value


_RULES: tuple[tuple[Callable[[Arguments], Any], tuple[int, ...]], ...] = (
    (_all_tuples, (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596,
                   616, 630, 726, 740, 744, 809)),
    (_lists_of_tuples, (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)),
    (_first_list_of_tuples, (75, 413, 444, 753)),
    (_second_tuple, (106, 750)),
    (_sets_or_empty_dicts, (115,)),
    (_real_and_complex, (124,)),
    (_first_tuple, (250, 307, 405, 446, 617, 720, 763, 808)),
    (_one_complex, (252,)),
    (_tuples_of_tuples, (259, 401, 445)),
    (_tuple_with_tuples, (278,)),
    (_dictionary_of_tuples, (722,)),
    (_tuples_all_the_way, (580, 615, 791)),
)  # fmt: skip
_RULE_OF = MappingProxyType({number: rule for rule, numbers in _RULES for number in numbers})
