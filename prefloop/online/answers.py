"""Who answers the prompts of a round: the policy in this process, or a server for the reference."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from prefloop.collecting import Draw, ask_server
from prefloop.errors import UserError
from prefloop.policies import Policy
from prefloop.policies.sampling import FromPolicy
from prefloop.samplers import FromReference
from prefloop.servers import Connection
from prefloop.shares import Worker
from prefloop.types import Comparison

Answers: TypeAlias = Callable[[Policy, Sequence[Comparison], Path, Draw, Worker], list[Comparison]]
"""Policy, prompts, folder, how to draw and who shares -> the rows of the folder's responses.jsonl.
"""


def from_server(connection: Connection) -> Answers:
    """The model behind `connection` answers in the reference's place; whether it is the reference
    is for whoever started the server to see to."""

    def answer(
        policy: Policy, prompts: Sequence[Comparison], folder: Path, draw: Draw, worker: Worker
    ) -> list[Comparison]:
        refuse_changing(draw.sampler, connection.server.url)
        asked = replace(draw, sampler=FromPolicy())
        return ask_server(connection, prompts, folder, asked, worker)

    return answer


def refuse_changing(source: object, url: str) -> None:
    """Refuse a source of answers that a server with one model cannot be."""
    if not isinstance(source, FromReference):
        raise UserError(
            f"{source!r} cannot answer through {url}: a server holds one model that training does "
            "not change, so it can stand for the reference only (--recipe vanilla). Sample with "
            "the model in this process"
        )
