"""EM over hidden annotator types around the trainer: one policy a type, on one base model."""

from prefloop.mixture.choosing import choose_types
from prefloop.mixture.evidence import EVIDENCE, Evidence, Halves, HeldOut, Trained
from prefloop.mixture.rounds import Fitted, Mixture, run_em
from prefloop.mixture.starts import STARTS, Clusters, Dirichlet, Given, LinearRewards, Start
from prefloop.mixture.steps import LIKELIHOODS, Steps
from prefloop.mixture.training import MixtureTraining, refuse_divided
from prefloop.mixture.votes import Votes, informative, refuse_unlearnable, with_annotators

__all__ = [
    "EVIDENCE",
    "LIKELIHOODS",
    "STARTS",
    "Clusters",
    "Dirichlet",
    "Evidence",
    "Fitted",
    "Given",
    "Halves",
    "HeldOut",
    "LinearRewards",
    "Mixture",
    "MixtureTraining",
    "Start",
    "Steps",
    "Trained",
    "Votes",
    "choose_types",
    "informative",
    "refuse_divided",
    "refuse_unlearnable",
    "run_em",
    "with_annotators",
]
