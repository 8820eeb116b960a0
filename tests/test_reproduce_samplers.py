"""The samplers' theory: parts of the reproduction, its claims, and a planted bug that fails."""

from dataclasses import dataclass

import pytest
import torch

from prefloop.pair_weights import MIX_P, MIX_R, UNIFORM, Arms, joint
from prefloop.reproduce import samplers
from prefloop.reproduce import samplers_theory as theory
from prefloop.reproduce.samplers_text import methods, mixing_claims


def unsettled(claims) -> list[str]:
    return [claim.name for claim in claims if not claim.holds]


def test_bandits_span_the_unit_interval_and_padding_is_marked():
    problems = theory.unit_range_bandits(300, seed=0)
    inside = problems.reward.masked_fill(~problems.exists, torch.nan)
    largest = problems.reward.amax(-1)
    assert set(problems.arms.int().tolist()) == set(range(2, 12))
    assert ((largest == 1) | (largest == 0)).all()  # all binary rewards may be equal
    assert inside.nan_to_num(0.5).min() >= 0
    assert torch.equal(
        problems.reward[~problems.exists], torch.zeros(int((~problems.exists).sum())).double()
    )


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("sampler", [UNIFORM, MIX_R, MIX_P])
def test_the_objective_and_the_residual_recursion_agree_for_every_beta(sampler, beta):
    problems = theory.unit_range_bandits(60, seed=1)
    path = theory.descend(sampler, problems, beta, 4)
    errors = torch.stack([theory.largest_error(problems, state) for state in path])
    torch.testing.assert_close(
        errors, theory.descend_residuals(sampler, problems, 4), rtol=0, atol=1e-14
    )


def test_an_arm_that_does_not_exist_changes_nothing():
    reward = torch.tensor([[0.0, 0.4, 1.0]], dtype=torch.float64)
    padded = theory.Bandits(
        torch.cat([reward, torch.zeros(1, 2).double()], -1),
        torch.tensor([[True, True, True, False, False]]),
    )
    alone = theory.descend(MIX_R, theory.bandits(reward), 2.0, 3)
    together = theory.descend(MIX_R, padded, 2.0, 3)
    torch.testing.assert_close(
        theory.gaps(together[..., :3]), theory.gaps(alone), rtol=0, atol=1e-14
    )


def test_one_step_of_two_arms_by_hand():
    # theta = 0: U = 0, so one step of W = 4 at 1 / (2 beta^2) moves the gap by
    # beta * 2 * (4 beta / (2 beta^2)) (sigmoid(R) - 1/2) = 2 tanh(R / 2).
    pair = theory.bandits(torch.tensor([0.0, 1.0], dtype=torch.float64))
    moved = theory.descend(UNIFORM, pair, 0.7, 1)[1].diff().item()
    assert moved == pytest.approx(0.924234314520)  # 2 tanh(1/2)


def test_the_linear_rate_of_two_arms_is_the_squared_tanh():
    pair = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    assert theory.uniform_rate(pair).tolist() == pytest.approx([0.2135523, 0.5800257], abs=1e-6)


def test_the_sampled_simulation_agrees_with_the_exact_one_on_average():
    rng = torch.Generator().manual_seed(0)
    reward = torch.randn((2, 6), generator=rng, dtype=torch.float64)
    exact = theory.play(UNIFORM, reward, 3.0, 0.5, 40)
    sampled = theory.play_sampled(UNIFORM, reward, 3.0, 0.5, 40, seed=0)
    torch.testing.assert_close(sampled.error[0], exact.error[0])
    torch.testing.assert_close(sampled.error, exact.error, rtol=0, atol=0.05)
    assert exact.loss[-1].max() < 0.2 * exact.loss[0].min()
    assert (exact.loss >= 0).all()


def test_first_below_names_the_step_or_infinity():
    path = torch.tensor([[3.0, 3.0], [1.0, 2.0], [0.1, 2.0]])
    assert theory.first_below(path, 1.5).tolist() == [1.0, torch.inf]


def test_the_bounds_and_golden_numbers_hold():
    found = samplers.rates(seed=3, count=300)
    assert unsettled(found.claims) == []
    assert len(found.claims) == 9
    assert set(found.figures) == {"samplers-rates"}


def test_closed_forms_spectrum_and_ablation_hold():
    assert unsettled(samplers.closed_forms(seed=3).claims) == []
    assert unsettled(samplers.ablation().claims) == []


def test_token_level_mixtures_are_close_to_products_of_whole_policies():
    assert unsettled(mixing_claims(seed=3, models=50)) == []


def test_the_four_methods_draw_from_what_they_say():
    beta, rng = 0.5, torch.Generator().manual_seed(0)
    reference, policy = torch.randn((2, 5), generator=rng, dtype=torch.float64).log_softmax(-1)
    known = Arms(torch.zeros_like(policy), beta * (policy - reference), policy)
    drawn = {name: joint(way(known)) for name, way in methods(beta).items()}

    def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        table = first.softmax(-1).unsqueeze(-1) * second.softmax(-1)
        return (table + table.T) / 2

    tilted = both(1.5 * policy - 0.5 * reference, 0.5 * policy + 0.5 * reference)
    torch.testing.assert_close(drawn["Mix-P (3/2, -1/2) x (1/2, 1/2)"], tilted)
    torch.testing.assert_close(drawn["hybrid: policy x reference"], both(policy, reference))
    torch.testing.assert_close(drawn["on-policy"], both(policy, policy))
    torch.testing.assert_close(drawn["vanilla: reference"], both(reference, reference))


@dataclass(frozen=True)
class Unscaled:
    """A planted bug: the mixture without its uniform half's coefficient."""

    def __call__(self, arms: Arms) -> torch.Tensor:
        return MIX_R(arms) - 1


def test_a_wrong_coefficient_is_not_quadratic(monkeypatch):
    problem = theory.unit_range_bandits(50, seed=0)
    right = theory.descend_residuals(MIX_R, problem, 4)[-1].max()
    wrong = theory.descend_residuals(Unscaled(), problem, 4)[-1].max()
    assert right < 1e-10
    assert wrong > 1e-4
    monkeypatch.setitem(samplers.QUADRATIC, "Mix-R", (Unscaled(), (0.11, 1.8e-3, 4.4e-7, 2.7e-14)))
    assert "Mix-R: order of convergence" in unsettled(samplers.ablation().claims)
