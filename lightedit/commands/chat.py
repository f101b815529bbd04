"""`lightedit chat`: ask a model in the terminal, with its edits and without them."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightedit as le
from lightedit.data.words import counted
from lightedit.errors import ArgumentError

_HELP = (
    "A line is answered. An empty line, or /on and /off, switches the edits; /both answers with them and without them; "
    "/chat serves lines in the chat template, /plain continues them as text; /quit ends."
)


def chat(
    lm: str,
    edits: list[Path] | None = None,
    chat: bool = False,
    plain: bool = False,
    max_new_tokens: int = 60,
    top_k: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Ask a model in the terminal, with edits switched on and off: lightedit chat smollm2 --edits edits/first.

    Each line is a question of its own; earlier lines are forgotten. It is served as the facts of the edits are: in the
    model's chat template, or as text that the model continues. Without edits, a model with a chat template answers in
    it. An empty line, /on and /off switch the edits, /both answers with and without them, /chat and /plain change how
    lines are served, /quit ends. Lines may also come from a pipe.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file; may stand before all options without --lm.
        edits: folders of saved edits, one after the other, which are applied in that order.
        chat: serve lines in the chat template, whatever the edits' facts.
        plain: continue lines as they are, without the chat template, whatever the edits' facts.
        max_new_tokens: most tokens of an answer.
        top_k: sample from this many most probable tokens; by default the most probable one is taken.
        seed: seed of the sampling.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if chat and plain:
        raise ArgumentError("--chat and --plain exclude each other; give one of them")
    saved = [le.Edit.load(folder) for folder in edits or []]
    model = le.LanguageModel.load(lm, dtype, device)
    for one in saved:
        one.check_model(model)
    switch = _Switch(model, saved)
    has_template = bool(model.tokenizer.chat_template) and not model.answers.apart
    if chat and not has_template:
        raise ArgumentError(f"--chat: {model.name} serves no chat template; leave it out")
    in_facts = {fact.chat for edit in saved for fact in edit.facts} or {has_template}
    in_template = chat or (not plain and in_facts == {True})
    print(f"{model.name} {_served(model, in_template)}. {_HELP}")
    print(switch)
    for line in _lines(switch):
        command = _command(line)
        if command == "quit":
            break
        if command in ("chat", "plain"):
            in_template = command == "chat" and has_template
            print(
                _served(model, in_template)
                if in_template == (command == "chat")
                else f"{model.name} has no chat template"
            )
            continue
        if command is not None:
            switch.set(command)
            print(_HELP if command == "help" else switch)
            continue
        for on in switch.asked:
            switch.turn(on)
            said = _answer(model, line, in_template, max_new_tokens, top_k, seed)
            print(f"[{'edited' if on else 'unedited'}] {said}" if saved else said, flush=True)


def _served(model: le.LanguageModel, in_template: bool) -> str:
    if model.answers.apart:
        return f"is {model.answers.described} and answers each line"
    return "answers in its chat template" if in_template else "continues lines as plain text"


class _Switch:
    """Which answers are wanted, and whether the model carries the edits."""

    def __init__(self, lm: le.LanguageModel, edits: Sequence[le.Edit]) -> None:
        self.lm, self.edits = lm, edits
        self.asked: tuple[bool, ...] = (bool(edits),)
        self._on = False

    def __str__(self) -> str:
        if not self.edits:
            return "no edits were given"
        facts = sum(len(edit.facts) for edit in self.edits)
        return f"edits of {counted(facts)}: {self.state}"

    @property
    def state(self) -> str:
        """on, off or both."""
        return "both" if len(self.asked) == 2 else "on" if self.asked[0] else "off"

    def set(self, command: str) -> None:
        """Choose the answers by a command: on, off, both, or switch for the other of on and off."""
        if command == "switch":
            command = "off" if self.state == "on" else "on"
        if self.edits and command != "help":
            self.asked = {"on": (True,), "off": (False,), "both": (True, False)}[command]

    def turn(self, on: bool) -> None:
        """Apply the edits in order, or revert them in reverse order."""
        if on != self._on:
            for edit in self.edits if on else reversed(self.edits):
                if on:
                    edit.apply(self.lm)
                else:
                    edit.revert(self.lm)
        self._on = on


def _lines(switch: _Switch) -> Iterator[str]:
    """Lines of standard input, without white space around them. A person sees what is on."""
    while True:
        try:
            yield input(f"{switch.state}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def _command(line: str) -> str | None:
    """The command in a line: on, off, both, switch, chat, plain, quit or help; None for a question."""
    if not line.startswith("/"):
        return None if line else "switch"
    return line[1:] if line in ("/on", "/off", "/both", "/chat", "/plain", "/quit") else "help"


def _answer(
    lm: le.LanguageModel, line: str, in_template: bool, max_new_tokens: int, top_k: int | None, seed: int
) -> str:
    """The model's answer on one line of the terminal's; an error of this line alone is said, not raised."""
    try:
        return lm.complete(line, chat=in_template, max_new_tokens=max_new_tokens, top_k=top_k, seed=seed).strip()
    except le.LightEditError as error:
        return f"error: {error}"
