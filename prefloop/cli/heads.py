"""`prefloop heads`: votes with annotators -> which model of their disagreement predicts votes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prefloop.heads import Compared, PairVotes, Told


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Compare reward heads that know who voted, on held-out votes: minutes, before hours of EM.

    LinearTypes: K linear rewards, found by EM. PrototypeMixture: PAL, a mixture of prototypes an
    annotator. GeneralPreference: GPM, one population that may prefer in circles.
    """

    data: Path
    """Judgements with annotators; every strictly ordered pair of answers counts as a vote."""
    out: Path
    """Folder for heads.json and the annotators' types; refused if it holds a run."""
    encoder: str = ""
    """Sentence encoder: minilm, a folder or a hub name; empty reads the length of answers only."""
    types: int = 3
    """Most types of LinearTypes and of PrototypeMixture; 1 to this many are compared."""
    directions: int = 64
    """Principal directions of the encoder's vectors that are kept."""
    crossfit: bool = False
    """LinearTypes scores the half of each annotator's votes that a round was not fitted to."""
    restarts: int = 1
    """Starts of each LinearTypes; the best penalised likelihood is kept."""
    folds: int = 4
    """Parts of the votes; each is held out once."""
    hold_out: Literal["prompt", "pair"] = "prompt"
    """What a part holds: whole prompts, so that held-out answers are new; or pairs of answers."""
    seeds: int = 3
    """Seeds of the folds and of the heads: 0, 1, ..."""
    annotator_missing: Literal["refuse", "own"] = "refuse"
    """What happens to rows without an annotator: own makes each an annotator of its own."""
    resume: bool = False
    """Go on with the comparison in --out: heads that it has are not fitted again."""
    columns: tuple[str, ...] = ()
    """Other names of columns, new=old: annotator=worker."""

    def __call__(self) -> None:
        """Fit, hold out, compare, and say what the types differ in."""
        from prefloop.cli import settings
        from prefloop.errors import UserError
        from prefloop.heads import Folds, compare, line_up
        from prefloop.runs import start_run

        if self.types < 1 or self.seeds < 1:
            raise UserError(
                f"--types and --seeds must be at least 1, got {self.types} and {self.seeds}"
            )
        votes = self._votes()
        folds, seeds = Folds(count=self.folds, by=self.hold_out), range(self.seeds)
        folds(votes, 0)  # refuses too many before anything is written
        out = start_run(self.out, "heads", settings(self), self.resume)
        known = self._known(out / "heads.json")

        def found(name: str, one: "Compared") -> None:
            print(f"{name:<16}{one}", flush=True)
            known[name] = one
            self._write(out, known, {})

        heads = line_up(self.types, self.restarts, self.crossfit)
        compared = compare(heads, votes, folds, seeds, dict(known), found)
        types = {f"LinearTypes {k}": self._told(votes, k, out) for k in range(2, self.types + 1)}
        self._write(out, compared, types)
        print(f"wrote {out / 'heads.json'}")
        print(f"next: prefloop mixture --data {self.data} --model MODEL --out MIXTURE")

    def _known(self, path: Path) -> "dict[str, Compared]":
        from prefloop.heads import Compared
        from prefloop.runs import read_json

        if not path.exists():
            return {}
        return {name: Compared.of(one) for name, one in read_json(path)["compared"].items()}

    def _write(self, out: Path, compared: "dict[str, Compared]", types: "dict[str, Told]") -> None:
        from dataclasses import asdict

        from prefloop.heads import heads_section
        from prefloop.runs import write_json

        found = {name: asdict(one) for name, one in compared.items()}
        described = {name: asdict(one) | {"gamma": None} for name, one in types.items()}
        write_json(out / "heads.json", {"compared": found, "types": described})
        write_json(out / "heads.section.json", heads_section(compared, types))

    def _votes(self) -> "PairVotes":
        from prefloop import data
        from prefloop.errors import UserError
        from prefloop.heads import answer_features, pair_votes
        from prefloop.mixture import with_annotators
        from prefloop.rewards.encoders import load_encoder

        read = data.read(self.data, data.parse_columns(self.columns))
        rows = with_annotators(read, self.annotator_missing)
        encoder = load_encoder(self.encoder) if self.encoder else None
        features = answer_features(encoder, self.directions)
        votes = pair_votes(rows, features)
        if self.types > len(votes.names):
            raise UserError(
                f"--types {self.types} is more than the {len(votes.names)} annotators of the data"
            )
        print(
            f"{len(votes):,} votes of {len(votes.names):,} annotators on {len(votes.features):,} "
            f"answers; the longer won {100 * float(votes.longer_won.mean()):.1f} %"
        )
        return votes

    def _told(self, votes: "PairVotes", types: int, out: Path) -> "Told":
        from prefloop.heads import LinearTypes, told
        from prefloop.mixture.rounds import write_responsibilities

        head = LinearTypes(types=types, restarts=1, crossfit=self.crossfit)
        one = told(votes, [head.once(votes, seed) for seed in range(self.seeds)])
        write_responsibilities(out / f"responsibilities-{types}.jsonl", votes.names, one.gamma)
        stable = one.stability
        alike = "" if stable is None else f", adjusted Rand index between seeds {stable:.3f}"
        print(f"{types} types{alike}:")
        for number in range(types):
            print(
                f"  type {number + 1}: share {one.shares[number]:.3f}, the longer won "
                f"{100 * one.longer_won[number]:.1f} %, weight of length "
                f"{one.length_weight[number]:+.3f}, sharpness {one.sharpness[number]:.3f}"
            )
        return one
