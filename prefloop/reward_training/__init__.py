"""Reward models, trained here: losses, backbones, ensembles, and what they are worth.

losses    Bradley-Terry, Plackett-Luce      encoder  heads on a frozen sentence encoder
members   draws, doubtful labels            causal   heads on causal models, by the one trainer
measures  accuracy, calibration, length     run      all of it, in a run folder
"""

from prefloop.reward_training.causal import CausalBackbone
from prefloop.reward_training.encoder import EncoderBackbone
from prefloop.reward_training.losses import LOSSES, BradleyTerry, PlackettLuce
from prefloop.reward_training.measures import Measured, measure, pairs_of
from prefloop.reward_training.members import doubts, draws
from prefloop.reward_training.run import RewardTraining, judged

__all__ = [
    "LOSSES",
    "BradleyTerry",
    "CausalBackbone",
    "EncoderBackbone",
    "Measured",
    "PlackettLuce",
    "RewardTraining",
    "doubts",
    "draws",
    "judged",
    "measure",
    "pairs_of",
]
