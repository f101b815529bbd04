"""Every flag of every command, so that none appears or vanishes unseen, and how flags are given."""

import pytest
from jsonargparse import auto_cli, capture_parser, set_parsing_settings

from lightedit.__main__ import commands, with_booleans
from lightedit.methods import Method

FACTS = {"--facts", "--format"}
ALWAYS = {"--help", "--config", "--print_config"}
MODEL = {"--lm", "--dtype", "--device"}
METHOD = {"--method", "--method.help"}
RUN = {
    f"--run{name}"
    for name in (
        "",
        ".on_collision",
        ".collision_similarity",
        ".max_tokens",
        ".facts_per_round",
        ".facts_per_chunk",
        ".validate_every",
        ".outcomes",
        ".progress_bar",
    )
}
EVALUATION = {
    f"--evaluation{name}"
    for name in ("", ".batch_size", ".generate", ".text", ".harness", ".harness_limit", ".progress_bar")
}
SERVED = {"--chat", "--end_turn", "--separator"}
HEALTH = {
    f"--health{name}" for name in ("", ".max_kl", ".max_perplexity_ratio", ".max_update_norm", ".on_limit", ".every")
}
FLAGS = {
    "demo": {"--facts", "--out"},
    "edit": {*MODEL, *METHOD, *RUN, *EVALUATION, *HEALTH, *SERVED, *FACTS, "--out", "--covariance", "--limit",
             "--evaluate", "--health_text", "--log", "--overwrite", "--restart"},
    "facts add": {*SERVED, *FACTS, "--base"},
    "facts replace": {"--base", "--fact", "--target", "--by"},
    "facts remove": {"--base", "--fact"},
    "facts list": {"--base"},
    "facts apply": {*MODEL, *METHOD, *RUN, "--base", "--covariance"},
    "tune": {*MODEL, *FACTS, "--out", "--limit", "--overwrite", "--settings", "--settings.facts", "--settings.depths",
             "--settings.lr", "--settings.clamps", "--settings.shares", "--settings.seed"},
    "train-editor": {*MODEL, *METHOD, *SERVED, *FACTS, "--out", "--limit", "--overwrite", "--restart",
                     *(f"--settings{name}" for name in ("", ".steps", ".batch_size", ".locality_texts",
                       ".validate_every", ".validation", ".patience", ".minutes", ".seed", ".progress_bar"))},
    "trace": {*MODEL, *SERVED, *FACTS, "--out", "--limit", "--fact_figures", "--overwrite", "--restart",
              *(f"--settings{name}" for name in ("", ".samples", ".noise", ".noise_level", ".distribution", ".replace",
                ".seed", ".kinds", ".window", ".severed", ".tokens", ".answer", ".only_known", ".published",
                ".tokens_per_pass", ".progress_bar"))},
    "hidden-states": {*MODEL, *FACTS, "--out", "--limit", "--edits", "--overwrite", "--restart", "--chat",
                      *(f"--settings{name}" for name in ("", ".top", ".mlp_input", ".after_norm", ".published",
                        ".tokens_per_pass", ".progress_bar"))},
    "localization": {*MODEL, *SERVED, *FACTS, "--out", "--limit", "--methods", "--methods.help", "--forcing",
                     "--forcing.help", "--covariance", "--overwrite", "--restart",
                     *(f"--settings{name}" for name in ("", ".problems", ".layers", ".windows", ".effect_window",
                       ".largest_effect", ".samples", ".noise", ".noise_level", ".seed", ".same_noise",
                       ".min_probability", ".continuation_tokens", ".reversal_tokens", ".essence_texts",
                       ".essence_tokens", ".overall", ".facts_per_chunk", ".progress_bar"))},
    "neurons": {*MODEL, *SERVED, *FACTS, "--out", "--limit", "--overwrite", "--restart",
                *(f"--settings{name}" for name in ("", ".layers", ".only_known", ".published", ".tokens_per_pass",
                  ".progress_bar", ".search", *(f".search.{name}" for name in ("points", "threshold", "share", "adjust",
                  "common", "prompts", "contexts", "contexts.prefixes", "contexts.bare_weight", "contexts.seed",
                  "contexts.separate"))))},
    "covariance": {*MODEL, *METHOD, "--out", "--layers", "--text", "--tokens", "--sequence_length", "--seed"},
    "evaluate": {*MODEL, *METHOD, *EVALUATION, *SERVED, *FACTS, "--edit", "--limit", "--out", "--compare",
                 "--held_out", "--references", "--protocol", "--covariance", "--facts_per_chunk", "--restart"},
    "export": {*MODEL, "--edits", "--out", "--form"},
    "sweep": {*MODEL, *RUN, *EVALUATION, *SERVED, *FACTS, "--methods", "--methods.help", "--out", "--counts",
              "--facts_per_round", "--grid", "--skip", "--limit", "--covariance"},
    "report": {"--runs", "--out", "--overwrite"},
    "chat": {*MODEL, "--edits", "--chat", "--plain", "--max_new_tokens", "--top_k", "--seed"},
    "env": {"--models"},
}  # fmt: skip


def test_every_command_is_here() -> None:
    assert FLAGS.keys() == commands().keys()


@pytest.mark.parametrize("command", list(FLAGS))
def test_a_command_has_these_flags_and_each_has_a_help(command: str) -> None:
    set_parsing_settings(subclasses_enabled=[Method])
    parser = capture_parser(lambda: auto_cli(commands()[command], as_positional=False))
    actions = [action for action in parser._actions if action.option_strings]
    flags = {option for action in actions for option in action.option_strings if option.startswith("--")}
    assert {flag for flag in flags if not flag.endswith("+")} == ALWAYS | FLAGS[command]
    without = [action.option_strings[0] for action in actions if not action.help]
    assert without == []


def test_flags_that_are_true_or_false_stand_alone() -> None:
    assert with_booleans(["evaluate", "--compare", "--out", "x", "--evaluation.generate"]) == [
        "evaluate", "--compare=true", "--out", "x", "--evaluation.generate=true",
    ]  # fmt: skip
    assert with_booleans(["edit", "--evaluate", "false", "--method.write_attention", "--restart=false"]) == [
        "edit", "--evaluate", "false", "--method.write_attention=true", "--restart=false",
    ]  # fmt: skip
    assert with_booleans(["facts", "apply", "--run.outcomes", "--base", "x"])[2] == "--run.outcomes=true"
    assert with_booleans(["edit", "--out"]) == ["edit", "--out"]  # what lacks its value is for the parser to refuse
