"""The command line's parser: wrong options end in one line that names the option, what it takes and where help is."""

import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser

from lightedit.methods import METHODS

_UNION = "Does not validate against any of the Union subtypes"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "pathlib.Path": "a path",
    "pathlib._local.Path": "a path",
    "collections.abc.Sequence": "a list such as [a,b]",
    "list": "a list such as [a,b]",
    "tuple": "a list such as [a,b]",
}
_ABSTRACT = f"needs --method, one of {', '.join(METHODS)}"


class Parser(ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        prefix = ""
        if parser.prog == self.prog and self._subcommands_action is None and " " not in command:
            prefix, command = "method.", "lightedit edit"  # the parser of a method's own options
        print(f"lightedit: error: {in_words(message, prefix)}; for all options: {command} --help", file=sys.stderr)
        sys.exit(2)


def in_words(message: str, prefix: str = "") -> str:
    """What the parser says of wrong options, in the words of whoever typed them.

    Args:
        message: what the parser says.
        prefix: what stands before the options' names on the command line.

    >>> in_words("the following arguments are required: edit.lm, edit.out")
    '--lm and --out are required'
    >>> in_words('Parser key "settings.window":\\n  Expected a <class \\'int\\'>. Got value: abc')
    '--settings.window: expected a whole number, got abc'
    """
    if match := re.match(r"the following arguments are required: (.*)", message, re.DOTALL):
        options = [f"--{prefix}{name.strip().split('.')[-1]}" for name in match[1].split(",")]
        return f"{' and '.join(filter(None, [', '.join(options[:-1]), options[-1]]))} {_are(options)} required"
    if match := re.match(r"argument subcommand: invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL):
        return f"{match[1]} is no command; commands are {match[2].replace(chr(39), '')}"
    if match := re.match(r'Parser key "([^"]*)":\s*(.*)', message, re.DOTALL):
        return f"--{prefix}{match[1]}: {_reason(match[2])}"
    if match := re.match(r"unrecognized arguments: --(.*)", message, re.DOTALL):
        return f"--{prefix}{match[1]} is no option"
    if match := re.match(r"[Oo]ption '([^']*)' is not accepted", message):
        return f"--{prefix}{match[1]} is no option"
    if match := re.match(r'expected "(?:.*\.)?subcommand" to be one of', message):
        return "name a command"
    return _reason(message)


def of_union(error: ValueError) -> str | None:
    """What the parser says of an option that may be left out, such as --method; None if the error is another."""
    return _reason(str(error)) if str(error).startswith(_UNION) else None


def _reason(text: str) -> str:
    """Why a value is wrong; of several kinds that an option takes, why it is not the first one."""
    lines = [line.strip() for line in text.strip().splitlines()]
    given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None)
    if lines and lines[0].startswith(_UNION):
        lines = [line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines
        lines = lines[:1]
    reason = " ".join(lines)
    if match := re.match(r"Expected a typing.Literal\[(.*)\]\. Got value: (.*)$", reason):
        return f"expected one of {match[1].replace(chr(39), '')}, got {match[2]}"
    if "is abstract" in reason and "lightedit.Method" in reason:
        return _ABSTRACT
    if match := re.match(r"Expected a <class '([^']*)'>(?:\. Got value: (.*))?$", reason, re.DOTALL):
        return f"expected {_KINDS.get(match[1], f'a {match[1]}')}, got {match[2] if match[2] is not None else given}"
    return reason[:1].lower() + reason[1:]


def _are(options: list[str]) -> str:
    return "is" if len(options) == 1 else "are"
