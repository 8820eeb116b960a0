"""`prefloop check`: read every row of preference data and say whether it can be trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from prefloop.data.columns import Columns
    from prefloop.data.verdict import Handling, Verdict

RANKED_ROWS = 100_000  # rows that the rank of the observable map is worked out from
SHOWN_ERRORS = 20  # more scroll the first ones away; --json has them all


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every row of preference data and say whether it can be trained on.

    Exits with 2 when it cannot, naming the places.
    """

    data: Annotated[str, tyro.conf.Positional]
    """File (.jsonl .json .csv .tsv .parquet .arrow, also .gz), saved data set, or Hub name with
    an optional split, ORG/NAME:SPLIT."""
    model: str = ""
    """Name or folder of the model to train: its tokenizer gives lengths in tokens."""
    columns: tuple[str, ...] = ()
    """Renamed columns, as prompt=instruction responses=answer_a,answer_b; id= ignores a column."""
    max_length: int = 0
    """Most tokens of a prompt and its response; 0 is the model's context."""
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    """What training would do with longer rows; refused rows are errors here."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What training would do with rows that have an empty response."""
    plain_text: bool = False
    """Prompts are plain text, even where the tokenizer has a chat template."""
    types: int = 2
    """Types of annotators whose observable rank is worked out; 0 leaves it out."""
    show: int = 0
    """Also print the tokens of this row, counted from 1; needs --model. 0 prints none."""
    json: Path | None = None
    """Also write the verdict, with every error, to this file."""

    def __call__(self) -> None:
        """Print the verdict; raise a user error if the data cannot be trained on."""
        from rich.console import Console

        from prefloop.data import parse_columns
        from prefloop.data.verdict import check
        from prefloop.errors import UserError
        from prefloop.runs import write_json

        if self.show and not self.model:
            raise UserError("--show needs --model: its tokenizer makes the tokens")
        columns = parse_columns(self.columns)
        tokenizer, handling = self._how()
        verdict = check(self.data, columns, tokenizer, handling)
        console = Console()
        found = table(verdict)
        observable = self._observable(verdict, columns)
        for name, value in observable_facts(observable):
            found.add_row(name, value)
        console.print(found)
        if self.json is not None:
            write_json(self.json, verdict.as_json() | {"observable": observable})
        if tokenizer is not None and self.show:
            console.print(self._shown(columns, tokenizer, console.is_terminal), soft_wrap=True)
        if verdict.errors:
            raise UserError(listed(verdict))

    def _observable(self, verdict: "Verdict", columns: "Columns") -> dict[str, Any] | None:
        """Rank of the observable map of the first `RANKED_ROWS` rows, where people are named."""
        people = verdict.annotators
        if self.types < 2 or verdict.errors or people is None or people.annotators < 2:
            return None
        from prefloop.data import iterate
        from prefloop.identifying import design_of, observable_rank

        design = design_of(islice(iterate(self.data, columns), RANKED_ROWS), self.types)
        if design is None or not design.groups:
            return None
        return {
            "types": self.types,
            "parameters": design.parameters(self.types),
            "rank": observable_rank(design, self.types).rank,
            "rank_opposite": observable_rank(design, self.types, opposite=True).rank,
            "responses": sum(design.responses.values()),
            "prompts": len(design.responses),
            "all_prompts": design.prompts,
            "judgements": design.judgements,
        }

    def _how(self) -> tuple["PreTrainedTokenizerBase | None", "Handling"]:
        """The tokenizer of --model, and what training would do with the rows."""
        from prefloop.data import Empty, Overlong
        from prefloop.data.verdict import Handling

        tokenizer, limit = None, self.max_length or None
        if self.model:
            from prefloop.policies.loading import load_tokenizer

            tokenizer = load_tokenizer(self.model)
            limit = limit or context(self.model)
        handling = Handling(
            max_length=limit,
            overlong=Overlong(self.overlong),
            chat=False if self.plain_text else None,
            empty=Empty(self.empty),
        )
        return tokenizer, handling

    def _shown(
        self, columns: "Columns", tokenizer: "PreTrainedTokenizerBase", colours: bool
    ) -> "Text":
        from prefloop.data import tokenize
        from prefloop.data.files import read_row
        from prefloop.data.show import show_tokens

        row = read_row(self.data, self.show, columns)
        chat = False if self.plain_text else None
        return show_tokens(tokenize([row], tokenizer, chat=chat)[0][0], tokenizer, colours)


def context(model: str) -> int | None:
    """Most tokens that a model reads, from its configuration; None where nothing says."""
    from transformers import AutoConfig

    from prefloop.policies.loading import explained
    from prefloop.policies.policy import CONTEXT_NAMES

    with explained(model, "configuration"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    found = config.get_text_config().to_dict()
    return next((found[name] for name in CONTEXT_NAMES if found.get(name)), None)


def listed(verdict: "Verdict") -> str:
    """The errors of a verdict, one a line; past `SHOWN_ERRORS` only how many more."""
    count = len(verdict.errors)
    lines = [f"{verdict.source} cannot be trained on, {_many(count, 'error')}:"]
    lines += [f"  {error}" for error in verdict.errors[:SHOWN_ERRORS]]
    if count > SHOWN_ERRORS:
        lines.append(f"  and {count - SHOWN_ERRORS:,} more; --json FILE writes them all")
    return "\n".join(lines)


def table(verdict: "Verdict") -> "Table":
    """The verdict as a table of two columns."""
    from rich.table import Table

    found = Table.grid(padding=(0, 2))
    sections = [_shape(verdict), _agreement(verdict), _length(verdict), _people(verdict)]
    for name, value in (fact for section in [*sections, _tokens(verdict)] for fact in section):
        found.add_row(name, value)
    return found


def _shape(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    shape = verdict.shape
    kinds = {
        "ranked": shape.ranked,
        "scored": shape.scored,
        "labelled": shape.labelled,
        "not judged": shape.unjudged,
    }
    yield "rows", f"{verdict.rows:,}"
    yield "prompts", f"{shape.prompts:,}"
    yield "responses a row", ", ".join(f"{n}: {rows:,}" for n, rows in shape.responses.items())
    yield "rows by judgement", ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    yield "ordered pairs", f"{shape.pairs:,}"
    yield "ties", _rows(shape.ties, verdict)
    yield "identical responses", _rows(shape.identical, verdict)
    yield "empty responses", _rows(shape.empty, verdict)
    yield "responses that repeat the prompt", _rows(shape.repeats_prompt, verdict)
    yield "responses that were cut", _rows(shape.cut, verdict)


def _agreement(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    found = verdict.agreement
    yield "exact duplicates", _rows(found.duplicates, verdict)
    yield "judged more than once", f"{found.repeated:,} of {found.things:,} pairs or responses"
    yield (
        "of them both ways",
        f"{found.contradicted:,} ({found.self_contradicted:,} by one annotator alone); "
        f"{_many(found.minority, 'vote')} against the majority",
    )


def _length(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    bias = verdict.length_bias
    if bias is None:
        return
    interval = ""
    if bias.low is not None and bias.high is not None:
        interval = f" [{100 * bias.low:.1f}, {100 * bias.high:.1f}]"
    yield (
        "the longer response wins",
        f"{100 * bias.longer_wins:.1f} %{interval} of {bias.pairs:,} ordered pairs of different "
        "length in characters; 95 % interval over prompts",
    )


def _people(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    people = verdict.annotators
    if people is None:
        yield "annotators", "not named"
        return
    yield "annotators", f"{people.annotators:,}; {_many(people.unnamed, 'row')} without a name"
    yield (
        "rows an annotator",
        f"{people.fewest:,} to {people.most:,}, median {people.median:,.6g}",
    )
    if verdict.types is not None:
        judged = ", ".join(f"{n}: {rows:,}" for n, rows in verdict.types.judged.items())
        yield "responses judged together", f"{judged}; {verdict.types.sets:,} different sets"
        yield "types of annotators can be told apart", str(verdict.types)


def observable_facts(found: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What the rank of the observable map says, as a row of the table."""
    if found is None:
        return
    whole = found["parameters"]
    told = (
        f"{found['rank']} of {whole} at random tastes, {found['rank_opposite']} at opposite ones; "
        f"{found['responses']:,} responses to {found['prompts']:,} of {found['all_prompts']:,} "
        "prompts, the most judged"
    )
    if found["rank"] < whole:
        told += ". Ask the same people about more of the same responses, or for rankings"
    elif found["rank_opposite"] < whole:
        told += ". Opposite tastes can hide: a second vote of each, or three responses, shows them"
    yield f"rank of what shows, {found['types']} types", told


def _tokens(verdict: "Verdict") -> Iterator[tuple[str, str]]:
    tokens = verdict.tokens
    if tokens is None:
        return
    parts = {"prompt": tokens.prompt, "response": tokens.response, "whole row": tokens.row}
    for name, found in parts.items():
        shown = ", ".join(f"{length:,} ({_percent(at)})" for at, length in found.items())
        yield f"tokens, {name}", shown
    if tokens.limit is not None:
        yield f"over {tokens.limit:,} tokens", _rows(tokens.overlong, verdict)
    yield "responses that spell a special token", _rows(tokens.spells_special, verdict)


def _percent(percentile: int) -> str:
    return "longest" if percentile == 100 else f"{percentile} %"


def _rows(count: int, verdict: "Verdict") -> str:
    share = f" ({100 * count / verdict.rows:.1f} %)" if count and verdict.rows else ""
    return f"{_many(count, 'row')}{share}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
