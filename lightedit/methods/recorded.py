"""Methods rebuilt from the record of a run."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from lightedit.errors import ArgumentError
from lightedit.methods import METHODS
from lightedit.methods.protocol import Method


def method_of(record: Mapping[str, Any]) -> Method:
    """The method whose name and settings `Method.to_dict` gave.

    Raises:
        ArgumentError: the method is not one of the package's, or has other settings.
    """
    name = record.get("name")
    if name not in METHODS:
        raise ArgumentError(f"method {name!r} is not one of {', '.join(METHODS)}, so give it: method=")
    try:
        method: Method = _built(METHODS[name], record)
        return method
    except (TypeError, LookupError) as error:
        raise ArgumentError(f"the settings of {name} are of another version ({error}), so give it: method=") from error


def _built(kind: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    if unknown := values.keys() - names - {"name"}:
        raise LookupError(f"{', '.join(sorted(unknown))}: unknown")
    return kind(**{name: _value(hints[name], value) for name, value in values.items() if name in names})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
        named = [kind for kind in kinds if kind.__name__ == value.get("name", kind.__name__)]
        return _built(named[0], value)
    return tuple(_value(None, part) for part in value) if isinstance(value, list) else value
