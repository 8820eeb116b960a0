"""Small settings of a policy: its adapter, and how answers are drawn from it."""

from dataclasses import dataclass

from prefloop.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter: each chosen linear layer W becomes W + (alpha / rank) B A.

    Attributes:
        rank: width of A and B; the adapter's size is proportional to it.
        alpha: scale of the adapter, divided by `rank`.
        dropout: share of the inputs of A that training drops, in [0, 1).
        targets: names of the layers that are adapted; empty means every linear layer but the head.

    References:
        Hu et al. 2021, arXiv:2106.09685, Sec. 4.1. All linear layers: Dettmers et al. 2023,
        arXiv:2305.14314.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"Lora.rank must be at least 1, got {self.rank}. Usual is 8 to 64")
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"Lora.dropout must be in [0, 1), got {self.dropout}. Usual is 0 or 0.05"
            )
        if not self.alpha > 0:
            raise UserError(f"Lora.alpha must be positive, got {self.alpha}. Usual is 2 * rank")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from a distribution, and how long an answer may get.

    The order is temperature, then top-k, then top-p, as in `transformers`.

    Attributes:
        temperature: divides the logits; 1 is the model's own distribution, 0 takes the most
            likely token.
        top_p: keep the most likely tokens that together reach this probability, in (0, 1]; 1 keeps
            all.
        top_k: keep this many most likely tokens; 0 keeps all.
        max_new_tokens: longest answer, the end-of-turn token included; an answer cut there is not
            `finished`.
        rows: answers decoded side by side. More is faster and needs more memory; the answers do
            not depend on it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    rows: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature must be 0 (most likely token) or more, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (keep every token) or more, got {self.top_k}")
        for name, value in (("max_new_tokens", self.max_new_tokens), ("rows", self.rows)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
