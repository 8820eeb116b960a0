"""Samplers: exact at the ends, ordered in between; adapters mixed in one batch; choosers' laws."""

import math
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from peft.tuners.lora import LoraLayer

from prefloop.errors import UserError
from prefloop.expression import parse
from prefloop.policies import Lora, Policy, Sampling
from prefloop.policies.readers import Needs, adapters_by_row, readers
from prefloop.policies.sampling import POLICY, REFERENCE, Blend, FromPolicy, Sampler, sample
from prefloop.samplers import (
    CHOOSERS,
    SAMPLERS,
    BestWorst,
    Chooser,
    FromReference,
    Hybrid,
    MixedLogits,
    Mixture,
    RejectionSampling,
    RewardTilted,
    Tilted,
    UniformOver,
    chosen_pair,
)
from prefloop.types import Comparison, Tokenized, score

PROMPTS = [(1, 20, 30), (1, 40), (1, 50, 60, 70, 80, 21, 22)]
SHORT = Sampling(max_new_tokens=8)


class Fixed:
    """Every answer from one blend."""

    def __init__(self, policy, reference):
        self.blend = Blend(policy, reference)

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        return (self.blend,) * count


def adapter_policy(std=0.3, **settings):
    policy = Policy(tiny.llama(), tiny.tokenizer(chat=False), "tiny")
    policy = policy.add_adapter("default", Lora(rank=2, **settings))
    rng = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std, generator=rng)
    return policy


def two_models(policy):
    """The same two distributions as two models, without an adapter."""
    merged = adapter_policy().model.merge_and_unload()
    return Policy(merged.eval(), policy.tokenizer, "merged", frozen=tiny.llama())


def tokens_of(answers):
    return [[one.tokens for one in row] for row in answers]


def totals(logps):
    return [sum(one) for one in logps]


# Which blend each answer comes from


@pytest.mark.parametrize(
    ("sampler", "blends"),
    [
        (FromPolicy(), [(1, 0), (1, 0), (1, 0)]),
        (FromReference(), [(0, 1), (0, 1), (0, 1)]),
        (Hybrid(), [(0, 1), (1, 0), (0, 1)]),
        (Tilted(), [(1.5, -0.5), (0.5, 0.5), (1.5, -0.5)]),
        (Tilted(k=1.0), [(2, -1), (0, 1), (2, -1)]),
        (Mixture(on_policy=1.0), [(1, 0), (1, 0), (1, 0)]),
        (Mixture(on_policy=0.0), [(1.5, -0.5), (0.5, 0.5), (1.5, -0.5)]),
    ],
    ids=repr,
)
def test_answers_come_from_the_papers_components(sampler, blends):
    assert sampler.blends(3, np.random.default_rng(0)) == tuple(blends)
    assert isinstance(sampler, Sampler)


def test_the_mixture_throws_its_coin_once_a_prompt():
    rng = np.random.default_rng(0)
    drawn = Counter(Mixture(on_policy=0.3).blends(2, rng) for _ in range(2000))
    assert set(drawn) == {(POLICY, POLICY), (Blend(1.5, -0.5), Blend(0.5, 0.5))}
    assert abs(drawn[POLICY, POLICY] - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)


def test_samplers_are_read_from_text():
    assert parse("Tilted(k=0.25)", SAMPLERS) == Tilted(k=0.25)
    assert [parse(repr(made()), SAMPLERS) for made in SAMPLERS] == [made() for made in SAMPLERS]


@pytest.mark.parametrize("make", [Tilted, Mixture])
@pytest.mark.parametrize("k", [-0.1, math.nan, math.inf])
def test_a_senseless_tilt_is_refused(make, k):
    with pytest.raises(UserError, match="tilt k must be 0"):
        make(k=k)


def test_a_probability_above_one_is_refused():
    with pytest.raises(UserError, match=r"in \[0, 1\]; got 1.5"):
        Mixture(on_policy=1.5)


# Exactness


@pytest.mark.parametrize("make", [adapter_policy, lambda: two_models(adapter_policy())])
def test_the_ends_of_the_mixture_are_the_single_models(make):
    policy = make()
    only_policy = sample(policy, PROMPTS, 2, SHORT)
    only_reference = sample(policy, PROMPTS, 2, SHORT, sampler=FromReference())
    # A coefficient of 1e-30 vanishes in float32, but keeps both models running.
    both = sample(policy, PROMPTS, 2, SHORT, sampler=Fixed(1.0, 1e-30))
    assert tokens_of(both) == tokens_of(only_policy)
    both = sample(policy, PROMPTS, 2, SHORT, sampler=Fixed(1e-30, 1.0))
    assert tokens_of(both) == tokens_of(only_reference)
    assert tokens_of(only_policy) != tokens_of(only_reference)


def test_an_adapter_in_one_batch_and_two_models_say_the_same():
    policy = adapter_policy()
    together = sample(policy, PROMPTS, 4, SHORT, sampler=Tilted())
    apart = sample(two_models(policy), PROMPTS, 4, SHORT, sampler=Tilted())
    assert tokens_of(together) == tokens_of(apart)
    for row, other in zip(together, apart, strict=True):
        for one, two in zip(row, other, strict=True):
            assert one.logp == pytest.approx(two.logp, abs=2e-3)  # merging rounds the weights
            assert one.policy_logp == pytest.approx(two.policy_logp, abs=2e-3)


def test_mixing_a_model_with_itself_changes_nothing():
    policy = adapter_policy(std=0.0)
    plain = sample(policy, PROMPTS, 4, SHORT)
    assert tokens_of(sample(policy, PROMPTS, 4, SHORT, sampler=Tilted())) == tokens_of(plain)


def test_mixed_answers_do_not_depend_on_the_rows_side_by_side():
    policy, sampler = adapter_policy(), Mixture(on_policy=0.5)

    def drawn(prompts, rows):
        settings = Sampling(max_new_tokens=10, temperature=1.3, rows=rows)
        return tokens_of(sample(policy, prompts, 2, settings, sampler=sampler))

    together = drawn(PROMPTS, rows=100)
    assert together == drawn(PROMPTS, rows=1)
    assert together == [row for prompt in PROMPTS for row in drawn([prompt], rows=100)]


def test_the_sampler_log_probability_is_that_of_the_mixed_logits():
    policy = adapter_policy()
    one, two = sample(policy, PROMPTS[:1], 2, SHORT, sampler=Tilted())[0]
    assert (one.sampler, two.sampler) == ("1.5 policy -0.5 reference", "0.5 policy +0.5 reference")
    for drawn, (a, b) in ((one, (1.5, -0.5)), (two, (0.5, 0.5))):
        text = torch.tensor([[*PROMPTS[0], *drawn.tokens]])
        with torch.no_grad():
            z = policy.model(text).logits
            with policy.reference() as reference:
                z_ref = reference(text).logits
        at = slice(len(PROMPTS[0]) - 1, -1)
        mixed = (a * z + b * z_ref)[0, at].log_softmax(-1)
        plain = z[0, at].log_softmax(-1)
        tokens = torch.tensor(drawn.tokens).unsqueeze(-1)
        assert drawn.logp == pytest.approx(mixed.gather(-1, tokens).squeeze(-1).tolist(), abs=1e-4)
        expected = plain.gather(-1, tokens).squeeze(-1).tolist()
        assert drawn.policy_logp == pytest.approx(expected, abs=1e-4)


def test_temperature_comes_after_mixing():
    policy = adapter_policy()
    with torch.no_grad():
        text = torch.tensor([PROMPTS[0]])
        z = policy.model(text).logits[0, -1]
        with policy.reference() as reference:
            z_ref = reference(text).logits[0, -1]
    settings = Sampling(max_new_tokens=1, temperature=0.5, top_k=5)
    one = sample(policy, PROMPTS[:1], 1, settings, sampler=Fixed(1.5, -0.5))[0][0]
    best = ((1.5 * z - 0.5 * z_ref) / 0.5).topk(5)
    at = best.indices.tolist().index(one.tokens[0])
    expected = best.values.log_softmax(-1)[at].item()
    assert one.drawn_logp[0] == pytest.approx(expected, abs=1e-4)


def test_the_first_component_leans_away_from_the_reference_and_the_second_towards_it():
    # E[log pi/pi_ref]: 1.5 pi - 0.5 ref > pi > 0.5 pi + 0.5 ref. 200 answers each; the standard
    # errors are about a tenth of the gaps.
    policy = adapter_policy(std=0.15)
    settings = Sampling(max_new_tokens=6, rows=200)

    def mean_ratio(sampler):
        answers = sample(policy, PROMPTS[:1], 200, settings, sampler=sampler)[0]
        rows = [Tokenized(prompt=PROMPTS[0], responses=tuple(one.tokens for one in answers))]
        with torch.no_grad():
            ratio = score(policy.scorer(None), rows).sum - policy.reference_logps(rows).sum
        return float(ratio.mean())

    away, plain, towards = (
        mean_ratio(sampler) for sampler in (Fixed(1.5, -0.5), FromPolicy(), Fixed(0.5, 0.5))
    )
    assert away > plain + 0.05 > towards + 0.1


def test_hybrid_takes_one_answer_of_each():
    policy = adapter_policy()
    first, second = sample(policy, PROMPTS[:1], 2, SHORT, sampler=Hybrid())[0]
    assert (first.sampler, second.sampler) == ("reference", "policy")
    assert first.policy_logp is None
    alone = sample(policy, PROMPTS[:1], 2, SHORT, sampler=FromReference())[0][0]
    assert first.tokens == alone.tokens


def test_a_policy_without_a_reference_cannot_be_mixed():
    policy = Policy(tiny.llama(), tiny.tokenizer(chat=False), "tiny")
    with pytest.raises(UserError, match="nothing holds its reference"):
        sample(policy, PROMPTS, 2, SHORT, sampler=Tilted())
    with pytest.raises(UserError, match="nothing holds its reference"):
        sample(policy, PROMPTS, 2, SHORT, sampler=FromReference())


# Adapters by row


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_rows_with_and_without_an_adapter_share_a_batch_exactly():
    policy = adapter_policy()
    tokens = torch.tensor([[1, 20, 30], [1, 20, 30]])
    with torch.no_grad():
        adapted = policy.model(tokens).logits[1]
        with policy.reference() as reference:
            plain = reference(tokens).logits[0]
        with adapters_by_row(policy.model, ["__base__", "default"]):
            mixed = policy.model(tokens).logits
    torch.testing.assert_close(mixed, torch.stack([plain, adapted]), rtol=0, atol=1e-5)


def test_a_forward_that_fails_leaves_no_adapter_names_behind():
    policy = adapter_policy()
    tokens = torch.tensor([[1, 20, 30]])
    with torch.no_grad():
        before = policy.model(tokens).logits

        def fail():
            with adapters_by_row(policy.model, ["__base__", "default"]):
                policy.model(tokens)  # one row, two names

        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            fail()
        assert hooks(policy.model) == 0
        assert torch.equal(policy.model(tokens).logits, before)


def test_an_interrupted_draw_leaves_the_model_as_it_was():
    policy = adapter_policy()
    policy.model.train()
    layer = next(module for module in policy.model.modules() if isinstance(module, LoraLayer))
    calls = []

    def interrupt(module, args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(policy, PROMPTS, 2, SHORT, sampler=Tilted())
    handle.remove()
    assert hooks(policy.model) == 0
    assert policy.model.training


def test_an_adapter_that_cannot_share_a_batch_is_read_twice():
    policy = Policy(tiny.llama(), tiny.tokenizer(chat=False), "tiny")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        policy.model, LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    )
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    policy = Policy(model.eval(), policy.tokenizer, "dora")
    with readers(policy, Needs(reference=True, policy=True), padded=True) as both:
        assert [reader.sources for reader in both] == [1, 1]
    ends = sample(policy, PROMPTS, 2, SHORT, sampler=Fixed(1e-30, 1.0))
    alone = sample(policy, PROMPTS, 2, SHORT, sampler=FromReference())
    assert tokens_of(ends) == tokens_of(alone)
    assert tokens_of(ends) != tokens_of(sample(policy, PROMPTS, 2, SHORT))


def test_an_adapter_that_can_share_a_batch_is_read_once():
    with readers(adapter_policy(), Needs(reference=True, policy=True), padded=True) as both:
        assert [reader.sources for reader in both] == [2]


# Plain generate


def generated(policy, blend, mask=None, prompts=((1, 20, 30),), **settings):
    processor = MixedLogits(policy, blend, mask)
    tokens = torch.tensor(prompts)
    mask = torch.ones_like(tokens) if mask is None else mask
    out = policy.model.generate(
        input_ids=tokens, attention_mask=mask, logits_processor=[processor], **settings
    )
    return out[:, tokens.shape[1] :].tolist()


GREEDY = Sampling(temperature=0.0, max_new_tokens=10)


@pytest.mark.parametrize("make", [adapter_policy, lambda: two_models(adapter_policy())])
@pytest.mark.parametrize("blend", [Blend(1.0, 0.0), Blend(0.0, 1.0), Blend(1.5, -0.5)])
def test_plain_generate_says_what_the_sampler_says(make, blend):
    policy = make()
    expected = sample(policy, PROMPTS[:1], 1, GREEDY, sampler=Fixed(*blend))[0][0].tokens
    found = generated(policy, blend, max_new_tokens=10, do_sample=False)[0]
    assert tuple(found[: len(expected)]) == expected


def test_plain_generate_mixes_padded_prompts_and_several_answers():
    policy = adapter_policy()
    prompts = ((0, 1, 40), (1, 20, 30))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = generated(
        policy,
        Blend(1.5, -0.5),
        mask,
        prompts,
        max_new_tokens=6,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
    )
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    expected = sample(policy, [(1, 40), (1, 20, 30)], 1, greedy, sampler=Fixed(1.5, -0.5))
    for row, index in zip(found, (0, 0, 1, 1), strict=True):
        wanted = expected[index][0].tokens
        assert tuple(row[: len(wanted)]) == wanted


def test_plain_generate_warps_after_mixing():
    # With temperature 1e-4 the likeliest token of the mixture is drawn, and not that of a mixture
    # of warped distributions, which would be the policy's own for these coefficients.
    policy = adapter_policy()
    cold = generated(
        policy, Blend(0.2, 0.8), max_new_tokens=6, do_sample=True, temperature=1e-4, top_k=0
    )
    assert cold == generated(policy, Blend(0.2, 0.8), max_new_tokens=6, do_sample=False)


def test_beam_search_and_a_second_call_are_refused():
    policy = adapter_policy()
    with pytest.raises(UserError, match="without beam search"):
        generated(policy, Blend(1.5, -0.5), max_new_tokens=8, num_beams=4, do_sample=False)


# Choosers


SCORES = (0.0, 2.0, 1.0)


def counts(chooser, scores=SCORES, draws=6000):
    rng = np.random.default_rng(0)
    return Counter(chooser.choose(scores, rng) for _ in range(draws))


@pytest.mark.parametrize("make", CHOOSERS)
def test_a_chooser_takes_two_different_candidates(make):
    chooser = make(candidates=3)
    assert isinstance(chooser, Chooser)
    for scores in (SCORES, (1.0, 1.0, 1.0), (1e6, 0.0, -1e6)):
        assert all(first != second for first, second in counts(chooser, scores, 100))


@pytest.mark.parametrize("make", CHOOSERS)
def test_one_candidate_is_too_few(make):
    with pytest.raises(UserError, match="2 are needed; got 1"):
        make(candidates=1)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [(RewardTilted, "scale", -1.0), (RejectionSampling, "temperature", 0.0)],
)
def test_senseless_choosers_are_refused(make, field, value):
    with pytest.raises(UserError, match=f"{make.__name__}.{field} must be"):
        make(**{field: value})


def test_best_against_worst():
    assert counts(BestWorst(), draws=3) == {(1, 0): 3}
    assert counts(BestWorst(), (5.0, 5.0, 5.0), draws=3) == {(0, 2): 3}


def test_uniform_takes_every_ordered_pair_alike():
    found = counts(UniformOver())
    assert len(found) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in found.values())


def test_reward_tilted_pairs_have_the_weight_of_mix_r():
    # W(a, b) = (1 + e^d) + (1 + e^-d) = 2 + e^d + e^-d; d = 2, 1, 1 for the three pairs:
    # 9.524, 5.086, 5.086, so shares of 0.4835, 0.2582, 0.2582.
    found = counts(RewardTilted(), draws=20000)
    shares = {pair: (found[pair] + found[pair[::-1]]) / 20000 for pair in [(0, 1), (0, 2), (1, 2)]}
    expected = {(0, 1): 0.48354, (0, 2): 0.25823, (1, 2): 0.25823}
    assert shares == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 20000))
    # The first is from the component tilted up: (1, 0) against (0, 1) is 1 + e^2 against 1 + e^-2.
    assert found[1, 0] / found[0, 1] == pytest.approx(math.exp(2), rel=0.2)


def test_a_scale_of_zero_is_uniform():
    found = counts(RewardTilted(scale=0.0))
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in found.values())


def test_a_cold_rejection_sampler_takes_the_best_two():
    found = counts(RejectionSampling(temperature=0.01), draws=20)
    assert set(map(frozenset, found)) == {frozenset({1, 2})}


def test_a_chosen_pair_carries_what_belongs_to_its_responses():
    row = Comparison(
        prompt="x",
        responses=("a", "b", "c"),
        scores=SCORES,
        rank=(3, 1, 2),
        id="r",
        label=(False, True, True),
        extra={"source": "s"},
    )
    pair = chosen_pair(row, BestWorst(), seed=0)
    assert (pair.responses, pair.scores) == (("b", "a"), (2.0, 0.0))
    assert (pair.rank, pair.label, pair.id, pair.extra) == (
        (1, 3),
        (True, False),
        "r",
        {"source": "s"},
    )


def test_a_chosen_pair_follows_from_the_seed_and_the_row():
    rows = [
        Comparison(prompt="x", responses=("a", "b", "c"), scores=SCORES, id=f"{i}")
        for i in range(40)
    ]
    first = [chosen_pair(row, UniformOver(), 1).responses for row in rows]
    assert first[::-1] == [chosen_pair(row, UniformOver(), 1).responses for row in rows[::-1]]
    assert first != [chosen_pair(row, UniformOver(), 2).responses for row in rows]
    assert len(set(first)) == 6


def test_a_row_without_scores_has_no_pair_to_choose():
    row = Comparison(prompt="x", responses=("a", "b"), id="r", place="f:3")
    with pytest.raises(UserError, match="f:3: choosing a pair needs scores"):
        chosen_pair(row, BestWorst(), 0)


def test_the_reference_blend_reads_the_reference_only():
    assert str(REFERENCE) == "reference"
    assert str(POLICY) == "policy"
