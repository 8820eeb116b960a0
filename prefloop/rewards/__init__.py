"""Who scores: rules, reward models, what a policy prefers, a Python function.

models    classifiers of transformers, implicit reward       rules     functions of one response
encoders  texts -> vectors, cached      heads   features -> reward, on a frozen encoder
causal    the reward on the last token of a causal model     trained   run folder -> ensemble

To add a rule: write the dataclass in `rules.py`, name it in `naming.py` and in
`tests/test_rewards.py`.
"""

from prefloop.rewards.models import Classifier, Implicit, load_reward_model
from prefloop.rewards.naming import load_reward
from prefloop.rewards.rules import Brevity, Function, Questions, Vader
from prefloop.rewards.scoring import EnsembleReward, Reward, score
from prefloop.rewards.trained import Ensemble, RewardModel, load_trained

__all__ = [
    "Brevity",
    "Classifier",
    "Ensemble",
    "EnsembleReward",
    "Function",
    "Implicit",
    "Questions",
    "Reward",
    "RewardModel",
    "Vader",
    "load_reward",
    "load_reward_model",
    "load_trained",
    "score",
]
