"""A run folder with every file that a report reads: small, made up, hostile where asked."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'></style></svg></title>"
    '<a href="javascript:alert(1)">x</a> {{ 7 * 7 }} {% raw %} $\\frac{a}{b}$ \u202egnp.exe '
    "\x1b[31mred\x00 \ud800 & \" ' </details> 日本語"
)


def fake_run(folder: Path, steps: int = 20, text: str = "Tell me of the sea.") -> Path:
    """Write the files of a run; `text` stands wherever a model or a user wrote something."""
    folder.mkdir(parents=True)
    settings = {"model": text, "objective": "DPO(beta=0.1)", "seed": 0, "lora": {"rank": 16}}
    versions = {"versions": {"torch": "2.13.0"}, "git": None}
    document(folder, "config", {"command": "train", "settings": settings, "provenance": versions})
    lines(folder, "metrics", metrics(steps))
    document(folder, "evaluation", evaluation(text))
    document(folder, "selection", selection(text))
    sample = {"prompt": text, "before": text, "after": text, "reward_before": 0.1}
    chat = {"prompt": [{"role": "user", "content": text}], "before": "", "after": "Warm!"}
    lines(folder, "samples", [{**sample, "reward_after": 0.9}, chat])
    verdict = ["In 71 % of pairs the chosen response became less likely.", text]
    document(folder, "diagnosis", {"verdict": verdict, "numbers": {"displaced": 0.71, text: 1}})
    document(folder, "types.section", types(text))
    return folder


def document(folder: Path, name: str, value: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(value))


def lines(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(steps: int) -> list[dict[str, float]]:
    """Training rows, and a held-out row every fifth step; the gradient of step 3 is NaN."""
    rows = []
    for step in range(1, steps + 1):
        margin = 2 * step / steps + 0.1 * math.sin(step)
        rows.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": math.log1p(math.exp(-margin)),
                "rewards/chosen": -0.1 * margin,
                "rewards/rejected": -1.1 * margin,
                "rewards/margins": margin,
                "rewards/accuracies": 0.5 + step / steps / 4,
                "logps/chosen": -100 - margin,
                "logps/rejected": -110 - 11 * margin,
                "grad_norm": math.nan if step == 3 else 1 / step,
                "learning_rate": 1e-5,
                "pairs_per_second": 3.0,
            }
        )
        if step % 5 == 0:
            rows.append({"step": step, "eval_loss": 0.6, "eval_rewards/margins": margin / 2})
    return rows


def evaluation(text: str) -> dict[str, Any]:
    win = {"name": "win rate", "value": 0.7, "low": 0.55, "high": 0.82, "n": 24, "unit": "share"}
    kl = {"name": text, "value": 4.25, "low": None, "high": None, "n": 24, "unit": "nats"}
    return {
        "result": [win, kl],
        "reward_kl": [
            {"name": "reference", "reward": 0.5, "reward_se": 0.05, "kl": 0, "kl_se": 0},
            {"name": "policy", "reward": 0.8, "reward_se": 0.04, "kl": 4.25, "kl_se": 0.5},
        ],
    }


def selection(text: str) -> dict[str, Any]:
    """Eight prompts of PVar 0, 0.025, ..., the upper half kept."""

    def example(group: str, place: int) -> dict[str, Any]:
        return {
            "group": group,
            "row": place + 1,
            "prompt": f"{text} {place}",
            "rewards": [0.5, place / 10],
            "best": f"{text} best",
            "worst": None,
            "score": place * 0.025,
            "measures": {"pvar": place * 0.025, "pvar_se": None},
            "weight": float(place >= 4),
            "kept": place >= 4,
            "reason": f"{text}: PVar is place {8 - place} of 8",
        }

    return {
        "rule": "PVar(scale=1.0)",
        "keep": "top",
        "weights": False,
        "cut": 0.1,
        "kept": 4,
        "total": 8,
        "labels": 4,
        "budget": 5,
        "price": "pairs",
        "lowest": 0.0,
        "highest": 0.175,
        "values": [place * 0.025 for place in range(8)],
        "why": {"kept": 4, "left out: beyond the cut": 3, f"left out: {text}": 1},
        "rules": ["PVar(scale=1.0)", "RewardGap()"],
        "overlap": [[1.0, 0.5], [0.5, 1.0]],
        "quotas": [{"quota": "topic=3", "group": text, "rows": 5, "kept": 3, "labels": 3}],
        "examples": [
            example("most wanted", 7),
            example("last kept", 4),
            example("least wanted", 0),
        ],
        "file": "selected.jsonl",
    }


def types(text: str) -> dict[str, Any]:
    band = {"name": text, "x": [1, 2, 3], "y": [1, None, 3], "low": [0, 1, 2], "high": [2, 3, 4]}
    return {
        "title": "Annotator types",
        "paragraphs": [text],
        "tables": [{"title": text, "columns": ["type", text], "rows": [[text, 0.4]]}],
        "lines": [{"title": text, "x_label": text, "y_label": text, "series": [band]}],
        "scatters": [{"title": text, "points": [{"name": text, "x": 1, "y": 2, "x_error": 0.1}]}],
        "heatmaps": [{"title": text, "rows": [text], "columns": ["a", "b"], "values": [[1, None]]}],
        "histograms": [{"title": text, "x_label": text, "values": [1, 2, 2, 3], "cut": 2}],
        "answers": [{"prompt": text, "texts": [{"name": text, "text": text, "reward": 0.25}]}],
    }
