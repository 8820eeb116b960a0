"""The scale of a reward, fitted to a file of votes."""

from pathlib import Path

import torch

from prefloop import data
from prefloop.selection import Scale, calibrated_scale
from prefloop.types import UserError


def scale_of_votes(votes: Path) -> Scale:
    """The scale that makes the votes of a file likeliest, see `selection.calibrated_scale`.

    Args:
        votes: rows with `rank` (who won) and `scores` (of the reward that selects).
    """
    rows = data.read(votes)
    for row in rows:
        if row.rank is None or row.scores is None:
            lacks = "rank" if row.rank is None else "scores"
            raise UserError(
                f"{row.place}: a vote needs rank and scores, and this row has no {lacks}. Score "
                "the votes with: prefloop score --reward REWARD"
            )
    width = max(len(row.responses) for row in rows)
    rewards = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    rank = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        rewards[at, : len(row.responses)] = torch.tensor(row.scores, dtype=torch.float64)
        rank[at, : len(row.responses)] = torch.tensor([value or 0 for value in row.rank or ()])
    return calibrated_scale(rewards, rank)
