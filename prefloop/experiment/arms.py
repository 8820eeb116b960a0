"""The arms of the selection experiment: which rule, on which reward, for which labels.

Not the product of everything, which nobody could pay, but a star: one setting in the middle (the
first of each list), and each list varied with the others held there. Every objective also gets the
first rule from both ends, random and the full data.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prefloop.errors import UserError

End = Literal["top", "bottom"]
Equal = Literal["steps", "epochs"]
EVERYTHING = "everything"
"""The rule of the full-data arm: it keeps all."""
NOTHING = "nothing"
"""The rule of the arm without labels: what there was before."""
RANDOM = "Random()"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to spend labels.

    Attributes:
        rule: what scores a prompt, as text; `EVERYTHING` keeps all, `NOTHING` none.
        keep: which end of the scores is labelled.
        reward: name of the reward that the rule reads.
        share: of the prompts, labelled.
        objective: what is minimised on the labels, as text.
        equal: what is the same in every arm: optimizer steps, or passes over its own labels.
        seed: of the pool, the choice and the training.
    """

    rule: str
    keep: End
    reward: str
    share: float
    objective: str
    equal: Equal
    seed: int

    @property
    def setting(self) -> "tuple[str, ...]":
        """What names the arm whatever its seed."""
        return (
            self.objective,
            self.equal,
            self.rule,
            self.keep,
            self.reward,
            f"{100 * self.share:g}%",
        )

    @property
    def folder(self) -> str:
        """The name of its folder."""
        words = re.sub(r"[^A-Za-z0-9.%]+", "-", "_".join(self.setting)).strip("-")
        return f"{words}_seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied; the first of each is the middle of the star.

    Attributes:
        rules: rules as text; the first is also used from the bottom. `RANDOM` is added.
        rewards: names of the rewards that rules read.
        shares: of the prompts, in (0, 1).
        objectives: as text.
        equals: what is kept equal.
        seeds: how many, from 0.
    """

    rules: tuple[str, ...]
    rewards: tuple[str, ...]
    shares: tuple[float, ...]
    objectives: tuple[str, ...]
    equals: tuple[Equal, ...] = ("steps", "epochs")
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("rules", "rewards", "shares", "objectives", "equals"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; the experiment needs one or more")
        if bad := [share for share in self.shares if not 0 < share < 1]:
            raise UserError(
                f"shares holds {bad[0]}; a share lies between 0 and 1, and the full-data arm is "
                "added by itself"
            )
        if self.seeds < 1:
            raise UserError(f"seeds must be 1 or more, got {self.seeds}")


def plan(grid: Grid) -> list[Arm]:
    """Every arm once, seed by seed."""
    arms = dict.fromkeys(arm for seed in range(grid.seeds) for arm in _of_seed(grid, seed))
    return list(arms)


def _of_seed(grid: Grid, seed: int) -> Iterator[Arm]:
    rule, reward, share = grid.rules[0], grid.rewards[0], grid.shares[0]
    first = grid.objectives[0]
    for equal in grid.equals:

        def arm(
            rule: str,
            objective: str = first,
            keep: End = "top",
            reward: str = reward,
            share: float = share,
            equal: Equal = equal,
        ) -> Arm:
            return Arm(
                rule=rule,
                keep=keep,
                reward=reward,
                share=share,
                objective=objective,
                equal=equal,
                seed=seed,
            )

        for objective in grid.objectives:
            yield arm(NOTHING, objective, share=0.0)
            yield arm(EVERYTHING, objective, share=1.0)
            yield arm(RANDOM, objective)
            yield arm(rule, objective)
            yield arm(rule, objective, "bottom")
        for other in grid.rules[1:]:
            yield arm(other)
        for other in grid.shares[1:]:
            yield arm(rule, share=other)
            yield arm(RANDOM, share=other)
        for other in grid.rewards[1:]:
            yield arm(rule, reward=other)
