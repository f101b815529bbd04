"""Wrong options: one line that names the option as it was typed, what it takes, and the command that explains it."""

import pytest

from lightedit.__main__ import main
from lightedit.commands.parsing import in_words

EDIT = "edit --lm smollm2 --facts f.json --out o"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("edit --lm smollm2 --out o", "--facts is required; for all options: lightedit"),
        ("edit --lm smollm2", "--facts and --out are required; for all options: lightedit"),
        (f"{EDIT} --limit x", "--limit: expected a whole number, got x; for all options: lightedit edit --help"),
        (f"{EDIT} --run.on_collision no", "--run.on_collision: expected one of joint, keep, merge, error, got no; "),
        (f"{EDIT} --foo 3", "--foo 3 is no option; for all options: lightedit edit --help"),
        (f"{EDIT} --config nofile.yaml", "--config: file does not exist: '"),
        (f"{EDIT} --method MEMIT", "--method.layers is required; for all options: lightedit edit --help"),
        (f"{EDIT} --method MEMIT --method.layers abc", "--method.layers: expected a list such as [a,b], got abc; "),
        (f"{EDIT} --method MEMIT --method.layers [1] --method.values.lr x", "--method.values.lr: expected a number,"),
        (f"{EDIT} --method MEMIT --method.layers [1] --method.foo 1", "--method.foo is no option; "),
        (f"{EDIT} --method.layers [1]", "--method: needs --method, one of ROME, MEMIT, "),
        (
            "evaluate --lm a --facts f --evaluation.harness piqa",
            "--evaluation.harness: expected a list such as [a,b], ",
        ),
        ("facts ad --base x", "'ad' is no command; commands are add, replace, remove, list, apply; for all options: "),
        ("edt", "'edt' is no command; commands are demo, edit, facts, "),
        ("", "name a command; for all options: lightedit --help"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(given.split())
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.out == ""
    assert output.err.startswith(f"lightedit: error: {said}"), output.err
    assert output.err.count("\n") == 1 and output.err.endswith("--help\n")


def test_a_message_of_an_unknown_form_is_kept() -> None:
    assert in_words("argument --lm: expected one argument") == "argument --lm: expected one argument"
