"""Who scores: rules, reward models, what a policy prefers, a Python function.

To add a rule: write the dataclass in `rules.py`, name it in `naming.py` and in
`tests/test_rewards.py`.
"""

from prefloop.rewards.models import Implicit, RewardModel, load_reward_model
from prefloop.rewards.naming import load_reward
from prefloop.rewards.rules import Brevity, Function, Questions, Vader
from prefloop.rewards.scoring import Reward, score

__all__ = [
    "Brevity",
    "Function",
    "Implicit",
    "Questions",
    "Reward",
    "RewardModel",
    "Vader",
    "load_reward",
    "load_reward_model",
    "score",
]
