"""Rewards by name, as the command line gives them."""

from pathlib import Path

from prefloop.expression import parse
from prefloop.rewards.rules import Brevity, Questions, Vader, function_named
from prefloop.rewards.scoring import Reward
from prefloop.rewards.trained import RewardModel

RULES = {"vader": Vader, "brevity": Brevity, "questions": Questions}


def load_reward(name: str) -> Reward:
    """The reward that `name` stands for.

    Args:
        name: a rule (vader, brevity, questions); `module:function` of a Python function
            (prompt, response) -> number; the run folder of `prefloop reward`; the folder or hub
            name of a sequence classifier; or an expression such as
            `RewardModel(path="run", penalty=1.0)`.

    Raises:
        UserError: nothing by that name, or something that cannot be loaded as a reward.
    """
    if name.lower() in RULES:
        return RULES[name.lower()]()
    if ":" in name and "(" not in name and not Path(name).exists():
        return function_named(name)
    if name.endswith(")"):
        made = parse(name, (*RULES.values(), RewardModel))
        return made.load() if isinstance(made, RewardModel) else made
    return RewardModel(path=name).load()
