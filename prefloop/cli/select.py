"""`prefloop select`: choose the prompts that are worth a label."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

if TYPE_CHECKING:
    from prefloop.selecting import Selecting
    from prefloop.selection import Rule
    from prefloop.shares import Worker


@dataclass(frozen=True, kw_only=True)
class Select:
    """Choose the prompts that are worth a label, by a score of each prompt."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    data: Path
    """Scored responses: scored.jsonl of `prefloop score`, or any data with a score a response;
    JSON-lines, Parquet, Arrow or a saved data set."""
    out: Path
    """Folder for the rows and selection.json; refused if it holds a run."""
    rule: str = "PVar()"
    """What scores a prompt: PVar(scale=1.0), RewardGap(), OnlinePVar(beta=0.1),
    LargestImplicitGap(), SmallestImplicitGap(), AlignmentPotential(), ReferenceFreePotential(),
    PredictiveEntropy(), PreferenceCertainty(), LearningOrder(), CHES(), DIDEntropy(),
    Random(seed=0); see docs/selection.md."""
    also: tuple[str, ...] = ()
    """Rules to score in the same pass: their columns, and what they would keep of the same."""
    filters: tuple[str, ...] = ()
    """Rows that stay: Ordered(), Length(shortest=1, longest=20000), Different(),
    FirstOfPrompt(), Responses(least=2)."""
    keep: Literal["top", "bottom", "above"] = "top"
    """Keep the highest scores, the lowest, or all of at least --threshold."""
    fraction: float = 0.5
    """Share of the prompts to keep, rounded down; with top and bottom."""
    budget: int = 0
    """Labels to spend, in the unit of --price; 0 leaves it to --fraction."""
    price: Literal["pairs", "responses", "prompt"] = "pairs"
    """Labels that a prompt with N responses costs: N (N - 1) / 2 comparisons, N, or 1."""
    quota: tuple[str, ...] = ()
    """At most so many labels for each value of a column, annotator=100, or a share of the budget,
    topic=0.2."""
    spread: float = 1.0
    """Above 1: keep what lies far apart (greedy k-centre on `embedding`) among this many times the
    budget of the most wanted."""
    threshold: float = 0.0
    """Smallest score to keep, in the rule's units; with above."""
    output: Annotated[Literal["subset", "weights"], tyro.conf.arg(name="as")] = "subset"
    """Weight 1 for what is kept and 0 for the rest; or a weight for every row, mean 1, that grows
    with its place, the steeper the smaller --fraction."""
    calibrate: Path | None = None
    """Votes (rank and scores of this reward) that the scale of PVar is fitted to; not those that
    the reward was trained on."""
    explain: bool = False
    """Show examples from both ends and from both sides of the cut, with the reason."""
    resume: bool = False
    """Go on with the run in --out."""

    def __call__(self) -> None:
        """Write every row with its score, its weight (1 kept, 0 not) and the reason."""
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.report.explaining import explain
        from prefloop.runs import start_run, write_json
        from prefloop.shares import this_worker
        from prefloop.types import UserError

        worker = this_worker()
        rule, found = self._rule()
        selecting = self._selecting(rule, worker)
        if worker.leads:
            start_run(self.out, "select", settings(self), self.resume)
            if found:
                write_json(self.out / "calibration.json", found)
        worker.wait()
        try:
            with progress("reading rows", None) as step:
                chosen = selecting(self.data, self.out, step)
        except UserError:
            if not self.resume and worker.count == 1:
                shutil.rmtree(self.out)  # what was measured is of no use to rows that get mended
            raise
        if worker.leads:
            _say(chosen)
            if self.explain:
                print(explain(chosen) + "\n")
            file = self.out / chosen["file"]
            print(f"wrote {file}")
            print(f"next: prefloop train --data {file} --model MODEL --out RUN")

    def _rule(self) -> "tuple[Rule, dict[str, Any]]":
        """The rule, its scale fitted to votes where they are given, and what was fitted."""
        from prefloop.expression import parse
        from prefloop.selecting.calibrating import scale_of_votes
        from prefloop.selection import RULES, PVar
        from prefloop.types import UserError

        rule = parse(self.rule, RULES)
        if self.calibrate is None:
            return rule, {}
        if rule != PVar():
            raise UserError(
                f"--calibrate sets the scale of PVar(), and the rule is {rule!r}; take --rule "
                "'PVar()', or leave --calibrate out"
            )
        scale = scale_of_votes(self.calibrate)
        return replace(rule, scale=scale.value), scale._asdict()

    def _selecting(self, rule: "Rule", worker: "Worker") -> "Selecting":
        from prefloop.expression import parse
        from prefloop.selecting import Cut, Selecting, parse_quota
        from prefloop.selection import FILTERS, RULES

        return Selecting(
            rule=rule,
            cut=Cut(
                keep=self.keep,
                fraction=self.fraction,
                budget=self.budget,
                threshold=self.threshold,
                price=self.price,
                quotas=tuple(map(parse_quota, self.quota)),
                spread=self.spread,
            ),
            also=tuple(parse(text, RULES) for text in self.also),
            filters=tuple(parse(text, FILTERS) for text in self.filters),
            weights=self.output == "weights",
            worker=worker,
        )


def _say(chosen: dict[str, Any]) -> None:
    each = {"pairs": "pair of answers", "responses": "answer", "prompt": "prompt"}
    spent = ""
    if chosen["budget"]:
        spent = f" for {chosen['labels']} labels (one for each {each[chosen['price']]})"
    cut = "" if chosen["cut"] is None else f", cut {chosen['cut']:.4g}"
    print(
        f"kept {chosen['kept']} of {chosen['total']} prompts{spent} by {chosen['rule']}, "
        f"{'weighted' if chosen['weights'] else chosen['keep']}; scores {chosen['lowest']:.4g} to "
        f"{chosen['highest']:.4g}{cut}"
    )
    for why, rows in chosen["why"].items():
        print(f"  {rows:>12,} {why}")
