"""One policy from the types of a mixture run: regret from samples, forms, distillation."""

from prefloop.aggregating.evaluating import Drawing, evaluate_by_annotator, ranking_by_annotator
from prefloop.aggregating.forms import FORMS, Imitation, answers_of, distil, distil_by_kl
from prefloop.aggregating.loading import Types, load_types
from prefloop.aggregating.people import accuracy_by_annotator, known_weights, posterior
from prefloop.aggregating.regret import Answered, Solved, answer, regret_section, solve
from prefloop.aggregating.sections import annotators_section

__all__ = [
    "FORMS",
    "Answered",
    "Drawing",
    "Imitation",
    "Solved",
    "Types",
    "accuracy_by_annotator",
    "annotators_section",
    "answer",
    "answers_of",
    "distil",
    "distil_by_kl",
    "evaluate_by_annotator",
    "known_weights",
    "load_types",
    "posterior",
    "ranking_by_annotator",
    "regret_section",
    "solve",
]
