"""Settings of a run by name: what there is, from which dataclass, and YAML files that give them.

A setting is a field of `RunConfig`, of `Watch` or of `Command`; nothing is listed twice. A file
holds them flat, as ``config.json`` does, which is such a file itself.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring

from cycleqd_jax.qd.presets import DEFAULT, PRESETS, Preset
from cycleqd_jax.runs.console import parse_experts
from cycleqd_jax.runs.records.folder import check_format


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        kind: its type, as annotated.
        help: what it means, from the docstring of its class.
        default: the value without it; ``dataclasses.MISSING`` where it has to be given.
    """

    kind: Any
    help: str
    default: Any


def settings_of(owner: type) -> dict[str, Setting]:
    """Name → setting, for every field of a dataclass.

    Raises:
        ValueError: a field that the docstring does not explain.
    """
    hints = get_type_hints(owner)
    said = {p.arg_name: p.description for p in parse_docstring(owner.__doc__ or "").params}
    found = {}
    for field in dataclasses.fields(owner):
        if not said.get(field.name):
            raise ValueError(f"{owner.__name__}.{field.name}: expected a line under Attributes")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = " ".join((said[field.name] or "").replace("``", "").split())
        found[field.name] = Setting(hints[field.name], text, default)
    return found


def read_settings(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Read the settings of a YAML (or JSON) file, each in its type.

    Raises:
        ValueError: no such file, no YAML, a setting nobody knows (the nearest known name is said)
            or a value of another type; all of them at once. Or the ``config.json`` of a run of
            another version of the library.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, found something else: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{path}: expected settings, `NAME: VALUE` a line, found {type(data).__name__}"
        )
    if "format" in data:  # a run's config.json
        data = check_format(path, data)
    return convert_settings(data, known, str(path))


def convert_settings(
    data: Mapping[str, Any], known: Mapping[str, Setting], where: str
) -> dict[str, Any]:
    """Bring values to the types of their settings; arguments and errors as of `read_settings`.

    ``experts`` may be a mapping or, as in ``config.json``, a list of names and folders; ``preset``
    a name or a mapping of its choices, where ``name`` says which preset the others change.
    """
    wrong: list[str] = unknown_names(data, known, where)
    found: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            continue
        try:
            if name == "experts":
                found[name] = _experts(value)
            elif name == "preset":
                found[name] = _preset(value, where)
            else:
                found[name] = convert(value, known[name].kind)
        except ValueError as error:
            message = str(error)
            wrong.append(message if message.startswith(where) else f"{where}: {name}: {message}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return found


def unknown_names(names: Iterable[Any], known: Iterable[str], where: str) -> list[str]:
    """A line for every name that is not known, with the one that was probably meant."""
    known = list(known)
    lines = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1, cutoff=0.0)
            lines.append(f"{where}: unknown setting {name!r}; the nearest is {near[0]!r}")
    return lines


def named_preset(name: str) -> Preset:
    """A preset of `PRESETS`, whose grid the experts' scores decide: its ranges are of its tasks.

    Raises:
        ValueError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return dataclasses.replace(PRESETS[name], ranges=None)


def convert(value: Any, kind: Any) -> Any:
    """A value that YAML read, in the type of its annotation; never rounded, never guessed.

    Raises:
        ValueError: it is of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(value, parts)
    if origin is Literal:
        if value in parts and type(value) is type(parts[0]):
            return value
        raise ValueError(f"expected one of {', '.join(map(str, parts))}, found {value!r}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list, found {value!r}")
        if parts[-1] is Ellipsis:
            return tuple(convert(item, parts[0]) for item in value)
        if len(value) != len(parts):
            raise ValueError(f"expected {len(parts)} values, found {value!r}")
        return tuple(convert(item, part) for item, part in zip(value, parts, strict=True))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is type(None) and value is None:
        return None
    truth = isinstance(value, bool)  # Python counts it as a whole number
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not truth):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    raise ValueError(f"expected {names.get(kind, 'a text')}, found {value!r}")


def _one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The first type that the value has; ``float | int`` is a float, however it is written."""
    wrong = []
    for kind in sorted(kinds, key=lambda kind: kind is not float):
        try:
            return convert(value, kind)
        except ValueError as error:
            if not (kind is int and float in kinds):
                wrong.append(str(error))
    expected = " or ".join(text.removeprefix("expected ").split(", found")[0] for text in wrong)
    raise ValueError(f"expected {expected}, found {value!r}")


def _experts(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(
        isinstance(item, Mapping) and item.keys() == {"name", "folder"} for item in value
    ):
        pairs = [(item["name"], item["folder"]) for item in value]
    else:
        raise ValueError(f"expected NAME: FOLDER, a line each, found {value!r}")
    if not all(isinstance(text, str) and text for pair in pairs for text in pair):
        raise ValueError(f"expected NAME: FOLDER, a line each, found {value!r}")
    return parse_experts([f"{name}={folder}" for name, folder in pairs])


def _preset(value: Any, where: str) -> Preset:
    if isinstance(value, str):
        return named_preset(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a preset's name or its choices, found {value!r}")
    choices = dict(value)
    start = dataclasses.replace(DEFAULT, ranges=None)
    if "name" in choices:
        start = named_preset(str(choices.pop("name")))
    changed = convert_settings(choices, settings_of(Preset), f"{where}: preset")
    return dataclasses.replace(start, **changed)
