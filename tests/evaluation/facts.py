"""Facts with every kind of prompt: two of a counterfactual, and a question with an answer."""

from lightedit.data.facts import Fact

FRANCE = Fact(
    "The capital of {} is",
    "France",
    "Rome",
    target_true="Paris",
    paraphrase_prompts=("The seat of the state of France is in", "France is run from"),
    neighborhood_prompts=("The old tower stands in", "The museum of the river is in", "She was born in"),
    id="7",
)
ITALY = Fact(
    "The capital of {} is",
    "Italy",
    "Berlin",
    target_true="Rome",
    paraphrase_prompts=("Italy is run from",),
    neighborhood_prompts=("The king lived in",),
)
QUESTION = Fact(
    "Over what river does {} cross?",
    "the bridge",
    "the river of the city",
    paraphrase_prompts=("Which river does the bridge cross?",),
    neighborhood_prompts=("nq question: who was the first king?",),
    neighborhood_target="a native speaker of French",
)
