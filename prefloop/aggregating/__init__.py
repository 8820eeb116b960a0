"""One policy from the types of a mixture run: regret from samples, forms, distillation."""

from prefloop.aggregating.forms import FORMS, Imitation, answers_of, distil
from prefloop.aggregating.loading import Types, load_types
from prefloop.aggregating.people import accuracy_by_annotator, known_weights, posterior
from prefloop.aggregating.regret import Answered, Solved, answer, regret_section, solve

__all__ = [
    "FORMS",
    "Answered",
    "Imitation",
    "Solved",
    "Types",
    "accuracy_by_annotator",
    "answer",
    "answers_of",
    "distil",
    "known_weights",
    "load_types",
    "posterior",
    "regret_section",
    "solve",
]
