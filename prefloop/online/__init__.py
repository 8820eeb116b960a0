"""Online preference optimization: sample, score, select, train, measure; again with what came out.

sources      where a round's comparisons come from       recipes     the named methods
exploration  XPO's bonus
answers      who answers: the policy, or a server        labels      who judges
loop         the rounds, on disk                         section     the report's page
"""

from prefloop.online.answers import from_server, refuse_changing
from prefloop.online.exploration import XPO
from prefloop.online.labels import ByScores, Labels, Waiting, refuse_scores
from prefloop.online.loop import REFERENCES, Asking, Learning, Measuring, Online
from prefloop.online.recipes import RECIPES, Recipe
from prefloop.online.sources import SOURCES, Source, ThresholdPairs, source_of

__all__ = [
    "RECIPES",
    "REFERENCES",
    "SOURCES",
    "XPO",
    "Asking",
    "ByScores",
    "Labels",
    "Learning",
    "Measuring",
    "Online",
    "Recipe",
    "Source",
    "ThresholdPairs",
    "Waiting",
    "from_server",
    "refuse_changing",
    "refuse_scores",
    "source_of",
]
