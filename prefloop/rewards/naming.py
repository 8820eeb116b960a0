"""Rewards by name, as the command line gives them."""

from pathlib import Path

from prefloop.rewards.models import load_reward_model
from prefloop.rewards.rules import Brevity, Questions, Vader, function_named
from prefloop.rewards.scoring import Reward

RULES = {"vader": Vader, "brevity": Brevity, "questions": Questions}


def load_reward(name: str) -> Reward:
    """The reward that `name` stands for.

    Args:
        name: a rule (vader, brevity, questions), `module:function` of a Python function
            (prompt, response) -> number, or the folder or hub name of a reward model.

    Raises:
        UserError: nothing by that name, or something that cannot be loaded as a reward.
    """
    if name.lower() in RULES:
        return RULES[name.lower()]()
    if ":" in name and not Path(name).exists():
        return function_named(name)
    return load_reward_model(name)
