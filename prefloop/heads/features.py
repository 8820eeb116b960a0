"""Answers as numbers: the leading directions of their vectors, and their length."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefloop.rewards.encoders import SentenceEncoder, embed


def answer_features(
    encoder: SentenceEncoder | None, directions: int
) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> (A, D): leading directions of their vectors, then the log of 1 + their words.

    Each feature has mean 0 and spread 1 over the answers.

    Args:
        encoder: a frozen sentence encoder; None leaves the length alone.
        directions: how many principal directions are kept, at most as many as there are.
    """

    def features(texts: Sequence[str]) -> Tensor:
        words = torch.tensor([float(len(text.split())) for text in texts]).log1p().unsqueeze(-1)
        table = words
        if encoder is not None:
            vectors = embed(encoder, texts)
            centred = vectors - vectors.mean(0)
            _, _, leading = torch.linalg.svd(centred, full_matrices=False)
            table = torch.cat([centred @ leading[:directions].mT, words], -1)
        spread = table.std(0, unbiased=False)
        return (table - table.mean(0)) / torch.where(spread > 0, spread, 1.0)

    return features
