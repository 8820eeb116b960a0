"""The selection experiment: arms of the star, pools, both learners, resuming, the table by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import BertConfig, BertModel

from prefloop import data
from prefloop.cli import main
from prefloop.errors import UserError
from prefloop.experiment import Arm, Grid, plan, summarise
from prefloop.experiment.arms import EVERYTHING, NOTHING, RANDOM
from prefloop.experiment.pools import Rewards, agreement, called, rewards_named, write_scored
from prefloop.experiment.running import chosen
from prefloop.experiment.table import page, text_table
from prefloop.intervals import paired
from prefloop.report.section_json import section
from prefloop.runs import read_json, write_jsonl
from prefloop.settings import TrainSettings
from prefloop.types import Comparison


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def arm(rule: str = "PVar()", share: float = 0.5, seed: int = 0, **more) -> Arm:
    given = {"keep": "top", "reward": "label", "objective": "DPO()", "equal": "steps"} | more
    return Arm(rule=rule, share=share, seed=seed, **given)


def grid(**changes) -> Grid:
    given = {
        "rules": ("PVar()", "RewardGap()"),
        "rewards": ("label", "noisy"),
        "shares": (0.5, 0.25),
        "objectives": ("DPO()", "KTO()"),
    }
    return Grid(**(given | changes))


# The plan


def test_the_star_varies_one_thing_at_a_time_around_the_middle():
    arms = plan(grid(seeds=1))
    # DPO, for each of two schedules: nothing, everything, random, both ends of PVar (5), the gap,
    # the other share (2), the other reward: 9. KTO: the 5.
    assert len(arms) == len(set(arms)) == 2 * (9 + 5)
    assert {one.objective for one in arms if one.equal == "epochs"} == {"DPO()", "KTO()"}
    middle = ("PVar()", "top", "label", 0.5)
    for one in arms:
        if one.rule not in (EVERYTHING, NOTHING) and one.objective == "DPO()":
            own = (one.rule, one.keep, one.reward, one.share)
            assert sum(a != b for a, b in zip(own, middle, strict=True)) <= 2
    assert len(plan(grid(seeds=3))) == 3 * len(arms)
    assert len({one.folder for one in plan(grid(seeds=3))}) == 3 * len(arms)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": (1.0,)}, "shares holds 1.0; a share lies between 0 and 1"),
        ({"rules": ()}, "rules is empty"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        grid(**changes)


# What an arm chooses


def scored_pool(folder: Path) -> list[Comparison]:
    """Four prompts whose scores are 0, 1, 2 and 3 apart."""
    rows = [
        Comparison(f"w{gap}", ("w8", "w9"), scores=(0.0, float(gap)), id=f"gap-{gap}")
        for gap in (2, 0, 3, 1)
    ]
    data.write(folder / "pool.jsonl", rows)
    rewards = Rewards(
        which=("label", "noisy"), encoder="", model="", noise=2.0, loop=TrainSettings()
    )
    write_scored(rows, [], rewards, folder, seed=0)
    return rows


def test_rules_choose_by_the_reward_and_labels_come_from_the_labeller(tmp_path):
    scored_pool(tmp_path)

    def ids(one: Arm) -> list[str]:
        (tmp_path / one.folder).mkdir()
        return [row.id for row in chosen(one, tmp_path, tmp_path / one.folder)]

    assert ids(arm()) == ["gap-2", "gap-3"]
    assert ids(arm(keep="bottom")) == ["gap-0", "gap-1"]
    assert ids(arm(EVERYTHING, 1.0)) == ["gap-2", "gap-0", "gap-3", "gap-1"]
    assert ids(arm(NOTHING, 0.0)) == []
    drawn = {seed: ids(arm(RANDOM, seed=seed)) for seed in range(6)}
    assert all(len(names) == 2 for names in drawn.values())
    assert len({tuple(names) for names in drawn.values()}) > 1  # another seed, another draw
    row = chosen(arm(reward="noisy"), tmp_path, tmp_path / arm().folder)[0]
    assert row.scores == (0.0, 2.0)  # what the labeller gave, not the noisy copy


def test_a_noisy_copy_is_the_label_with_noise_of_the_size_asked_for(tmp_path):
    rows = [
        Comparison(f"w{n}", ("w1", "w2"), scores=(0.0, float(1 + n % 2)), id=str(n))
        for n in range(400)
    ]
    rewards = Rewards(which=("noisy",), encoder="", model="", noise=0.5, loop=TrainSettings())
    write_scored(rows, [], rewards, tmp_path, seed=1)
    noisy = data.read(tmp_path / "scored-noisy.jsonl")
    gap = [
        a - b
        for row, told in zip(noisy, rows, strict=True)
        for a, b in zip(row.scores, told.scores, strict=True)
    ]
    spread = torch.tensor([value for row in rows for value in row.scores]).std(correction=0)
    assert torch.tensor(gap).std() == pytest.approx(0.5 * float(spread), rel=0.1)
    assert agreement(rows, rows) == 1.0
    assert 0.6 < agreement(rows, noisy) < 1.0


def test_rewards_that_cannot_be_made_are_refused(tmp_path):
    def rewards(*names):
        return Rewards(
            which=rewards_named(names), encoder="", model="", noise=1.0, loop=TrainSettings()
        )

    with pytest.raises(UserError, match="rewards holds 'oracle'; it knows label, noisy"):
        rewards("oracle")
    with pytest.raises(UserError, match="the reward causal needs a model"):
        rewards("causal")
    ranked = [Comparison("w1", ("w2", "w3"), rank=(1, 2), id="1")]
    with pytest.raises(UserError, match="these rows have ranks only"):
        write_scored(ranked, [], rewards("label"), tmp_path, seed=0)


def test_rewards_may_be_read_from_a_scored_file_by_id(tmp_path):
    rows = [Comparison(f"w{n}", ("w1", "w2"), rank=(1, 2), id=f"v{n}") for n in range(3)]
    told = [replace(row, scores=(float(n), 0.5)) for n, row in enumerate(rows)]
    (tmp_path / "head").mkdir()
    data.write(tmp_path / "head/scored.jsonl", reversed(told))
    path = tmp_path / "head/scored.jsonl"
    noisy = f'Scored(path="{path}", name="noisier", noise=2.0)'
    which = rewards_named([f'Scored(path="{path}")', f'Scored(path="{path}", name="big")', noisy])
    assert [called(one) for one in which] == ["head", "big", "noisier"]
    rewards = Rewards(which=which, encoder="", model="", noise=1.0, loop=TrainSettings())
    write_scored(rows[1:], [], rewards, tmp_path, seed=0)
    for name in ("head", "big"):
        found = data.read(tmp_path / f"scored-{name}.jsonl")
        assert [(row.id, row.scores, row.rank) for row in found] == [
            ("v1", (1.0, 0.5), None),
            ("v2", (2.0, 0.5), None),
        ]
    moved = data.read(tmp_path / "scored-noisier.jsonl")
    assert moved[0].scores != (1.0, 0.5)
    with pytest.raises(UserError, match="noise of noisier: must be 0 or more, got -1"):
        rewards_named([noisy.replace("2.0", "-1.0")])
    with pytest.raises(UserError, match=r"scored.jsonl: has no row of the id 'v7'"):
        which[0].of([replace(rows[0], id="v7")], seed=0)
    with pytest.raises(UserError, match="has other responses for 'v0'"):
        which[0].of([replace(rows[0], responses=("w1", "w3"))], seed=0)
    data.write(tmp_path / "head/scored.jsonl", rows)
    with pytest.raises(UserError, match="has no scores for 'v0'"):
        which[0].of(rows, seed=0)
    with pytest.raises(UserError, match="two rewards are called 'label'"):
        rewards_named(["label", 'Scored(path="x", name="label")'])


# The table


def test_arms_are_compared_with_random_labels_prompt_by_prompt_within_a_seed():
    quality = {
        EVERYTHING: [{"a": 1.0, "b": 3.0}, {"a": 4.0, "c": 4.0}],
        RANDOM: [{"a": 1.0, "b": 1.0}, {"a": 3.0, "c": 1.0}],
        "PVar()": [{"a": 2.0, "b": 1.0}, {"a": 3.0, "c": 2.0}],
    }
    results = [
        (arm(rule, 1.0 if rule == EVERYTHING else 0.5, seed), {"labels": 4, "quality": given})
        for rule, seeds in quality.items()
        for seed, given in enumerate(seeds)
    ]
    rows = {row.rule: row for row in summarise(results, 0.5)}
    assert rows["PVar()"].seeds == (1.5, 2.5)
    assert rows["PVar()"].quality.value == 2.0
    test = rows["PVar()"].over_prompts
    assert test is not None
    assert test.difference.value == 0.5  # of 1, 0, 0 and 1
    assert test == paired(torch.tensor([2.0, 1, 3, 2]), torch.tensor([1.0, 1, 3, 1]))
    # the seeds' means differ by 0.5 and 0.5: no variance, so t is infinite
    assert rows["PVar()"].over_seeds == 0.0
    assert rows[EVERYTHING].over_prompts is not None
    assert rows[EVERYTHING].over_prompts.difference.value == 1.5  # full data against the middle
    assert rows[RANDOM].over_prompts is None
    assert rows["PVar()"].name == "PVar top, label"
    shown = section(page(list(rows.values()), "reward"), "page")
    assert [line.name for line in shown.figures[0].series] == ["random", "PVar top, label"]
    more = [arm(RANDOM, 0.25), arm("RewardGap()", 0.5)]  # random has two shares now, no other
    extra = [(one, {"labels": 2, "quality": {"a": 1.0, "b": 1.0}}) for one in more]
    shown = section(page(summarise([*results, *extra], 0.5), "reward"), "page")
    assert [(line.name, line.x) for line in shown.figures[0].series] == [("random", (2, 4, 4))]
    assert "| random | 4 | 2" not in text_table(list(rows.values()))[-1]


# Both learners, from the command line


def sum_of_words(prompt, response: str) -> float:
    """A reward that hardly ever ties."""
    return float(sum(int(word[1:]) for word in response.split() if word[1:].isdigit()))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


def test_a_policy_experiment_ends_in_a_table_and_goes_on_where_it_was(tmp_path, model, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    write_jsonl(prompts, ({"prompt": f"w{n % 40} w{n // 40 + 50}"} for n in range(20)))
    words = ["experiment", "selection", "--data", str(prompts), "--model", model, "--out", str(out)]
    words += ["--reward", "test_experiment:sum_of_words", "--rewards", "label", "noisy"]
    words += ["--pool", "8", "--warm", "4", "--held-out", "4", "--answers", "3", "--measured", "1"]
    words += ["--max-new-tokens", "4", "--seeds", "1", "--shares", "0.5", "--rules", "PVar()"]
    words += ["--objectives", "DPO()", "--equals", "steps", "--batch-size", "4", "--lr", "0.01"]
    assert main([*words, "--lora-rank", "2"]) == 0
    table = capsys.readouterr().out
    assert "| DPO() | steps | PVar bottom, label |" in table
    folders = sorted((out / "arms").iterdir())
    assert len(folders) == 6  # nothing, everything, random, two ends, the noisy copy
    steps = {
        len((folder / "metrics.jsonl").read_text().splitlines())
        for folder in folders
        if (folder / "metrics.jsonl").exists()
    }
    assert steps == {2}  # 8 prompts in batches of 4, however many an arm labelled
    before = (out / "table.json").read_bytes()
    shutil.rmtree(next(folder for folder in folders if "noisy" in folder.name))
    (out / "table.json").unlink()
    kept = (folders[0] / "result.json").stat().st_mtime_ns
    assert main([*words, "--lora-rank", "2", "--resume"]) == 0
    assert (out / "table.json").read_bytes() == before
    assert (folders[0] / "result.json").stat().st_mtime_ns == kept
    assert main([*words, "--lora-rank", "2", "--resume", "--seeds", "2"]) == 0  # one more
    assert [len(row["seeds"]) for row in read_json(out / "table.json")] == [2] * 6
    assert (folders[0] / "result.json").stat().st_mtime_ns == kept
    assert main([*words, "--lora-rank", "2", "--resume"]) == 0  # and as it was
    assert (out / "table.json").read_bytes() == before
    assert main(["report", str(out)]) == 0
    assert "Which labels are worth their price" in (out / "report.html").read_text()
    assert main([*words, "--lora-rank", "2", "--pool", "80", "--resume"]) == 2


def test_votes_of_people_train_heads(tmp_path, capsys):
    folder, votes, out = tmp_path / "encoder", tmp_path / "votes.jsonl", tmp_path / "run"
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(
        BertConfig(vocab_size=tiny.VOCABULARY, num_hidden_layers=1, **settings)
    ).save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    write_jsonl(
        votes,
        (
            {"prompt": f"w{n % 9}", "responses": [f"w10 w{n}", f"w11 w{n + 1}"], "rank": [1, 2]}
            for n in range(36)
        ),
    )
    words = ["experiment", "selection", "--data", str(votes), "--encoder", str(folder)]
    words += ["--out", str(out), "--rewards", "length", "--rules", "PVar()", "--shares", "0.5"]
    assert main([*words, "--pool", "16", "--warm", "4", "--seeds", "1"]) == 0
    rows = read_json(out / "table.json")
    assert [row["labels"] for row in rows] == [0, 16, 8, 8, 8]
    everything = rows[1]["quality"]["value"]
    assert everything == max(row["quality"]["value"] for row in rows)
    result = json.loads(next((out / "arms").glob("*everything*/result.json")).read_text())
    assert set(result) == {"arm", "labels", "quality"}
    assert main([*words, "--warm", "400", "--out", str(tmp_path / "other")]) == 2
    assert "of which 400 are warm" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path, model):
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, ({"prompt": f"w{n % 40} w{n // 40 + 50}"} for n in range(20)))
    words = ["experiment", "selection", "--data", str(prompts), "--model", model]
    words += ["--rewards", "label", "--pool", "8", "--warm", "4", "--held-out", "4", "--answers"]
    words += ["3", "--max-new-tokens", "4", "--seeds", "2", "--shares", "0.5", "--rules", "PVar()"]
    words += ["--objectives", "DPO()", "--equals", "steps", "--lora-rank", "2"]
    for jobs in ("1", "2"):
        assert main([*words, "--out", str(tmp_path / jobs), "--jobs", jobs]) == 0
    tables = [(tmp_path / jobs / "table.json").read_bytes() for jobs in ("1", "2")]
    assert tables[0] == tables[1]
