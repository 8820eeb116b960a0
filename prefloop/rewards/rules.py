"""Rewards that are a rule: a function of one response at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from numbers import Real
from typing import Any

from prefloop.errors import UserError
from prefloop.rewards.scoring import Prompt


@dataclass(frozen=True)
class Vader:
    """Sentiment of the response: VADER's compound score, in [-1, 1], 1 is warmest.

    A lexicon with rules for negation, degree and punctuation; English.

    References:
        Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
        Social Media Text". As a reward: the controlled-sentiment task of Rafailov et al. 2023,
        arXiv:2305.18290, Sec. 6, there with a classifier in place of the rule.
    """

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """The compound score of each response; the prompt is not read."""
        analyzer = _vader()
        return [
            tuple(analyzer.polarity_scores(text)["compound"] for text in texts)
            for texts in responses
        ]


@dataclass(frozen=True)
class Brevity:
    """Minus the number of words of the response: the shorter, the better."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """-words of each response."""
        return [tuple(-float(len(text.split())) for text in texts) for texts in responses]


@dataclass(frozen=True)
class Questions:
    """Number of question marks in the response."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """Question marks of each response."""
        return [tuple(float(text.count("?")) for text in texts) for texts in responses]


@dataclass(frozen=True)
class Function:
    """A Python function `(prompt, response) -> number` as a reward.

    Attributes:
        function: the function; a prompt that is a chat reaches it as its messages.
    """

    function: Callable[[Prompt, str], Any]

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """The function's number for each response."""
        return [
            tuple(self._number(prompt, text) for text in texts)
            for prompt, texts in zip(prompts, responses, strict=True)
        ]

    def _number(self, prompt: Prompt, text: str) -> float:
        value = self.function(prompt, text)
        if not isinstance(value, Real):
            raise UserError(
                f"the reward function gave {value!r} for {text[:40]!r}; it must give a number"
            )
        return float(value)


def function_named(name: str) -> Function:
    """The reward function that `name` ("module:function") stands for.

    Importing a module runs its code: name only what you trust.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = vars(import_module(module_name))[function_name]
    except (ImportError, KeyError) as error:
        raise UserError(
            f"{name}: cannot import this reward function ({error}). Write module:function, and "
            "make the module importable, for example by PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"{name}: a {type(function).__name__}, not a function")
    return Function(function)


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(
            "the reward Vader needs the package vaderSentiment, which is not installed. "
            "Run: pip install 'prefloop[demo]'"
        ) from None
    return SentimentIntensityAnalyzer()
