"""Fields of records: texts, lists and answers with aliases, found by dotted path."""

from typing import Any

from lightedit.data.fact import FactError, cut_subject

Pairs = tuple[tuple[str, str], ...]
"""(prompt, right answer) pairs."""


def lookup(record: Any, path: str) -> Any:
    """The value at a dotted path of a nested record, None if there is none. A number is an index into a list.

    >>> lookup({"edits": [{"subject": "France"}]}, "edits.0.subject")
    'France'
    """
    for key in path.split("."):
        if isinstance(record, list) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        elif isinstance(record, dict):
            record = record.get(key)
        else:
            return None
    return record


def text(record: dict[str, Any], path: str) -> str:
    """The text at a dotted path, stripped. Of a list of answers or aliases, the first.

    Raises:
        FactError: there is none, or it is no text.
    """
    value = lookup(record, path)
    if value is None:
        raise FactError(f"{path}: missing")
    return _first(value, path)


def _first(value: Any, path: str) -> str:
    while isinstance(value, list):
        if not value:
            raise FactError(f"{path}: the list is empty; its first entry is the answer")
        value = next((entry for entry in value if not _is_blank(entry)), value[0])
    if not isinstance(value, str):
        raise FactError(f"{path}: expected text, got {value!r}")
    return value.strip()


def optional_text(record: dict[str, Any], *paths: str) -> str | None:
    """The text at the first of the paths that holds one; None if none does. Null, NaN and blank texts count as none."""
    for path in paths:
        value = lookup(record, path)
        if not _is_blank(value):
            return _first(value, path)
    return None


def texts(record: dict[str, Any], *paths: str) -> tuple[str, ...]:
    """The texts of the first of the paths that holds any: one text, or a list of them. Blank ones are left out."""
    for path in paths:
        value = lookup(record, path)
        if not _is_blank(value):
            entries = value if isinstance(value, list) else [value]
            return tuple(_first(entry, path) for entry in entries if not _is_blank(entry))
    return ()


def pairs(record: dict[str, Any], prompts: str, answers: str) -> Pairs:
    """The prompts at one path with their answers at another; empty without prompts.

    Either both are texts (an answer may be a list of aliases), or both are lists of the same length. A prompt without
    an answer is left out, because nothing can be scored on it.

    Raises:
        FactError: a prompt or an answer is no text, or there are more of one than of the other.
    """
    asked, answered = lookup(record, prompts), lookup(record, answers)
    if _is_blank(asked):
        return ()
    if not isinstance(asked, list):
        asked, answered = [asked], [answered]
    elif not isinstance(answered, list) or len(answered) != len(asked):
        count = len(answered) if isinstance(answered, list) else 1
        raise FactError(f"{answers}: {count} answers to the {len(asked)} prompts of {prompts}; give each prompt one")
    return tuple(
        (_first(prompt, prompts), _first(answer, answers))
        for prompt, answer in zip(asked, answered, strict=True)
        if not _is_blank(answer)
    )


def groups(record: dict[str, Any], path: str, prompts: str = "prompt", answers: str = "ground_truth") -> Pairs:
    """The pairs of all named groups at a path: each group is an object with prompts and answers, or a list of such.

    Raises:
        FactError: there is something else, or see `pairs`.
    """
    found = lookup(record, path)
    if _is_blank(found):
        return ()
    if not isinstance(found, dict):
        raise FactError(f"{path}: expected groups by name, got {found!r}")
    members = [
        (f"{path}.{name}", member)
        for name, group in found.items()
        for member in (group if isinstance(group, list) else [group])
    ]
    questions: Pairs = ()
    for where, member in members:
        if not isinstance(member, dict):
            raise FactError(f"{where}: expected objects with {prompts} and {answers}, got {member!r}")
        try:
            questions += pairs(member, prompts, answers)
        except FactError as error:
            raise FactError(f"{where}.{error}") from error
    return questions


def neighborhood(questions: Pairs) -> dict[str, Any]:
    """The fields of `Fact` for questions whose answers must not change."""
    answers = tuple(answer for _, answer in questions)
    found: dict[str, Any] = {"neighborhood_prompts": tuple(prompt for prompt, _ in questions)}
    if len(set(answers)) == 1:
        return found | {"neighborhood_target": answers[0]}
    return found | {"neighborhood_answers": answers}


def unlike(true: str | None, new: str) -> str | None:
    """The true target, or None if it is the new one: a fact that the data set takes from the world as it is."""
    return None if true is None or true.casefold() == new.casefold() else true


def prompt_and_subject(record: dict[str, Any], path: str, any_case: bool = False) -> dict[str, Any]:
    """The fields `prompt` and `subject` of a fact, from the prompt at a path, which holds `{}` or the subject.

    Raises:
        FactError: the prompt holds neither, or the subject several times.
    """
    prompt = text(record, path)
    if record.get("subject") is None:
        return {"prompt": prompt, "subject": None}
    template, written = cut_subject(prompt, text(record, "subject"), any_case)
    return {"prompt": template, "subject": written}


def _is_blank(value: Any) -> bool:
    """Whether a value stands for none: null, NaN (which pandas writes), blank text, an empty list, a list of such."""
    if isinstance(value, list):
        return all(map(_is_blank, value))
    return value is None or value != value or (isinstance(value, str) and not value.strip())
