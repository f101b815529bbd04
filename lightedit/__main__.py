"""The `lightedit` command: a table of typed functions."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import transformers
from jsonargparse import auto_cli, set_parsing_settings

from lightedit.commands.chat import chat
from lightedit.commands.covariance import covariance
from lightedit.commands.demo import demo
from lightedit.commands.edit import edit
from lightedit.commands.env import env
from lightedit.commands.evaluate import evaluate
from lightedit.commands.export import export
from lightedit.commands.facts import add, apply, remove, replace, show
from lightedit.commands.hidden_states import hidden_states
from lightedit.commands.localization import localization
from lightedit.commands.neurons import neurons
from lightedit.commands.parsing import Parser, of_union
from lightedit.commands.report import report
from lightedit.commands.stream import stream
from lightedit.commands.sweep import sweep
from lightedit.commands.trace import trace
from lightedit.commands.train_editor import train_editor
from lightedit.commands.train_model import train_model
from lightedit.commands.tune import tune
from lightedit.errors import ArgumentError, LightEditError, RunFailedError
from lightedit.methods import METHODS, Method

_HELP = "_help"  # what jsonargparse calls the help of a group

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "edit": edit,
    "facts": {
        _HELP: "Keep facts that change over time in a folder, and write all of them into a model.",
        "add": add,
        "replace": replace,
        "remove": remove,
        "list": show,
        "apply": apply,
    },
    "tune": tune,
    "train-editor": train_editor,
    "trace": trace,
    "hidden-states": hidden_states,
    "localization": localization,
    "neurons": neurons,
    "train-model": train_model,
    "stream": stream,
    "covariance": covariance,
    "evaluate": evaluate,
    "export": export,
    "sweep": sweep,
    "report": report,
    "chat": chat,
    "env": env,
}

EXIT_CODES = (
    "Exit status: 0 if all that was asked is done; 2 for wrong input, or a file that cannot be read or written; 3 if "
    "less was done than asked, such as an edit that is saved, but has a fact that does not hold or was ended by a "
    "limit, or a sweep of which a run failed; 130 after an interruption. Another status, with a traceback, is a bug."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `EXIT_CODES` says how it ends. A warning is one line on standard error."""
    warnings.formatwarning = lambda message, *_, **__: f"lightedit: warning: {message}\n"
    set_parsing_settings(subclasses_enabled=[Method])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = _with_options(given)
    try:
        _check_method(given)
        arguments = with_booleans(given)
        auto_cli(COMMANDS, arguments, as_positional=False, parser_class=Parser, prog="lightedit", epilog=EXIT_CODES)
    except RunFailedError as error:
        print(f"lightedit: {error}", file=sys.stderr)
        sys.exit(3)
    except (LightEditError, OSError) as error:  # OSError: such as a full disk, which is not a bug
        if os.environ.get("LIGHTEDIT_TRACEBACK"):
            raise
        print(f"lightedit: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        if (reason := of_union(error)) is None:
            raise
        print(f"lightedit: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = {
            "tune": "the same command goes on after the trials that are finished",
            "train-editor": "the same command goes on after the last validation",
            "edit": "the same command goes on after the rounds and scores that are finished",
            "facts": "the base is kept; facts apply goes on after the values that are found",
            "trace": "the same command goes on after the facts that are finished",
            "hidden-states": "the same command goes on after the prompts that are finished",
            "localization": "the same command goes on after the edits that are finished",
            "neurons": "the same command goes on after the facts that are finished",
            "stream": "the same command goes on where the stream was last stored",
            "sweep": "the same command goes on after the runs, values and scores that are finished",
            "evaluate": "with --out the same command goes on after the scores that are finished, else nothing is kept",
        }
        state = kept.get(given[0] if given else "", "nothing was written")
        print(f"lightedit: interrupted; {state}", file=sys.stderr)
        sys.exit(130)


def _with_options(given: list[str]) -> list[str]:
    """The arguments, with an option before those that may stand without: runs of `report`, the model of `chat`, edits.

    >>> _with_options(["chat", "smollm2", "--edits", "a", "b", "--plain"])
    ['chat', '--lm=smollm2', '--edits+=a', '--edits+=b', '--plain']
    """
    if given[:1] == ["report"]:
        runs = _leading(given[1:])
        return ["report", *[f"--runs+={run}" for run in runs], *given[1 + len(runs) :]]
    if given[:1] == ["chat"]:
        model = _leading(given[1:])
        given = ["chat", *[f"--lm={name}" for name in model], *given[1 + len(model) :]]
    if given[:1] in (["chat"], ["hidden-states"]) and "--edits" in given:
        place = given.index("--edits")
        folders = _leading(given[place + 1 :])
        if not folders[:1] or not folders[0].startswith("["):
            given[place : place + 1 + len(folders)] = [f"--edits+={folder}" for folder in folders]
    return given


def _leading(arguments: Sequence[str]) -> list[str]:
    """The arguments before the first option."""
    return list(takewhile(lambda argument: not argument.startswith("-"), arguments))


def commands() -> dict[str, Any]:
    """Every command by its words, such as "edit" and "facts add"."""
    found: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        if isinstance(command, dict):
            found |= {f"{name} {word}": one for word, one in command.items() if word != _HELP}
        else:
            found[name] = command
    return found


def with_booleans(given: Sequence[str]) -> list[str]:
    """The arguments, with =true appended to each boolean flag without a value, such as --compare.

    >>> with_booleans(["evaluate", "--compare", "--facts", "f.jsonl"])
    ['evaluate', '--compare=true', '--facts', 'f.jsonl']
    """
    known = commands()
    function = known.get(" ".join(given[:1])) or known.get(" ".join(given[:2]))
    if function is None:
        return list(given)
    flags = set(_flags(function))
    return [
        f"{argument}=true" if argument in flags and following not in ("true", "false") else argument
        for argument, following in pairwise([*given, ""])
    ]


def _flags(function: Any) -> Iterator[str]:
    """The boolean options of a command."""
    for name, kind in get_type_hints(function).items():
        if name in signature(function).parameters:
            yield from _flags_of(f"--{name}", kind)


def _flags_of(option: str, kind: Any) -> Iterator[str]:
    if kind is bool:
        yield option
    kinds: Iterable[Any] = get_args(kind) or (kind,)
    for one in kinds:
        if one is Method:
            for method in METHODS.values():
                yield from _flags_of(option, method)
        elif is_dataclass(one):
            hints = get_type_hints(one)
            for field in fields(one):
                yield from _flags_of(f"{option}.{field.name}", hints[field.name])


def _check_method(given: Sequence[str]) -> None:
    """Raise ArgumentError for an unknown method's name, which the parser would take for a path."""
    for option, value in pairwise(part for argument in given for part in argument.split("=", 1)):
        if option == "--method" and value not in METHODS and "." not in value and not Path(value).exists():
            raise ArgumentError(f"--method {value} is not known; methods are {', '.join(METHODS)}")


if __name__ == "__main__":
    main()
