"""The table of objectives: each with comparisons, and the numbers worked out by hand for them.

A new objective gets a row in `CASES`; the laws of `test_objectives_laws.py` then run over it too.
Six decimals; the arithmetic stands above each row. How comparisons are made: `objective_world.py`.
"""

import re
from typing import NamedTuple

import pytest
from objective_world import LN, World, fixture, ratios, world

from prefloop import objectives as o

F = fixture()
LOW = ratios([-1.0, -3.0])
"""The chosen response has fallen: h = (-1, -3), d = 2."""


class Case(NamedTuple):
    """An objective and what it must give.

    Attributes:
        losses: expected loss of each comparison.
        gradient: expected slope by the summed log-probability of each response, all comparisons
            together (the slope by a mean over n tokens is n times it).
    """

    objective: o.Objective
    world: World
    losses: list[float]
    gradient: list[list[float]] | None = None


# DPO losses of .2, .6, 1 at beta = 1: z = -log(e^l - 1), so d = 1.507772, 0.195870, -0.541325
SPREAD = ratios([1.5077718, 0.0], [0.1958704, 0.0], [-0.5413249, 0.0])
# sums of the policy (-4, -6), (-6, -5), of the reference (-6, -4.5), (-5, -5)
CROSSED = world([[[-4.0], [-6.0]], [[-6.0], [-5.0]]], [[[-6.0], [-4.5]], [[-5.0], [-5.0]]])
# means of the policy m = (-1) - (-3) = 2 in each pair; g = m minus the reference's margin:
# .75, .825694, -.075694 with mean .5 and standard deviation .5 (sum of squares 2 x .25)
ADAPTIVE = world(
    [[[-1.0], [-3.0]]] * 3,
    [[[-1.0], [-2.25]], [[-1.0], [-2.1743061]], [[-1.0], [-3.0756939]]],
)
THREE = ratios([1.0, 0.0, -1.0], scores=[[2.0, 1.0, 0.0]])
GROUPS = ratios([1.0, 0.5, -1.0, 0.0], rank=[[1, 1, 2, 2]])
TIE = ratios([2.0, 0.0], rank=[[1, 1]])
# log-ratios .4, .3, .2, .1 of the chosen tokens, -.5, -.5 of the rejected ones
TAIL = world([[[-0.85, -0.95, -1.05, -1.15], [-3.0, -3.0]]], [[[-1.25] * 4, [-2.5] * 2]])
# p = .5, .5, .8, .8 (product .16) and .2, .2 (product .04), with sums of squares; h = (1, -1)
CONFIDENT = world(
    [[[LN[0.5], LN[0.5], LN[0.8], LN[0.8]], [LN[0.2], LN[0.2]]]],
    [[[(LN[0.16] - 1) / 4] * 4, [LN[0.2] + 0.5] * 2]],
    collision=[[[LN[0.5], LN[0.5], LN[0.68], LN[0.68]], [LN[0.68], LN[0.68]]]],
)

PAIRS = [
    # log(1 + e^-.2); slope -.1 sigmoid(-.2)
    Case(o.DPO(beta=0.1), F, [0.598139], [[-0.045017, 0.045017]]),
    Case(o.DPO(beta=1.0), F, [0.126928], [[-0.119203, 0.119203]]),
    # .75 x .598139 + .25 x .798139
    Case(o.DPO(beta=0.1, label_smoothing=0.25), F, [0.648139]),
    # the same pair three times over: ten responses or two, a comparison counts once
    Case(o.DPO(beta=0.1), ratios([1.0, -1.0, -1.0], rank=[[1, 2, 2]]), [0.598139]),
    # 1 - .05 x 2
    Case(o.Hinge(beta=0.05), F, [0.9], [[-0.05, 0.05]]),
    # (.25 + .5 - 5)^2; slope 2 (-4.25) / n
    Case(o.IPO(beta=0.1), F, [18.0625], [[-2.125, 4.25]]),
    # (2 - 5)^2
    Case(o.IPO(beta=0.1, log_ratios="sum"), F, [9.0], [[-6.0, 6.0]]),
    # log(1 + e^-(2 x .75)); slope 2 sigmoid(-1.5) / n
    Case(o.LengthNormalizedDPO(beta=2.0), F, [0.201413], [[-0.091213, 0.182426]]),
    # h_w > 0: DPO at beta .3
    Case(o.DPOP(beta=0.3, penalty=5.0), F, [0.437488]),
    # .3 (2 - 5 x 1) = -.9
    Case(o.DPOP(beta=0.3, penalty=5.0), LOW, [1.241154], [[-1.279709, 0.213285]]),
    # .3 (2 - 50) = -14.4
    Case(o.DPOP(beta=0.3, penalty=50.0), LOW, [14.400001], [[-15.299991, 0.3]]),
    # .598139 + .005 x .1 x 4
    Case(o.RPO(beta=0.1, eta=0.005), F, [0.600139], [[-0.045517, 0.045017]]),
    # .598139 + .2 x 1; slope of the mean .2 / 4
    Case(o.RPO(beta=0.1, eta=0.2, log_likelihood="mean"), F, [0.798139], [[-0.095017, 0.045017]]),
    # DPO's value; slopes x 1.5 and x .5
    Case(o.StraightThroughDPO(), F, [0.598139], [[-0.067525, 0.022508]]),
    # 2 x 2 - 1 = 3; slope 2 sigmoid(-3) / n
    Case(o.SimPO(beta=2.0, gamma=1.0), F, [0.048587], [[-0.023713, 0.047426]]),
    # log(1 + e^-.2) + 1; -.045017 - 1/4
    Case(o.CPO(beta=0.1), F, [1.598139], [[-0.295017, 0.045017]]),
    # log(1 + e^-.2) + 4
    Case(o.CPO(beta=0.1, log_likelihood="sum"), F, [4.598139], [[-1.045017, 0.045017]]),
    # odds: -1 - log(1 - e^-1) - (-3 - log(1 - e^-3)) = 2.407606; 1 + .1 x .086211
    Case(o.ORPO(beta=0.1), F, [1.008621], [[-0.253267, 0.004346]]),
    # hinge inactive: .1 x 4
    Case(o.SLiC(), F, [0.4], [[-0.1, 0.0]]),
    # 1 + 4 - 4.5 = .5, + .4
    Case(o.SLiC(), fixture(rejected=-4.5), [0.9], [[-1.1, 1.0]]),
    # .644397 + .5 (.744397 + .644397); slopes .1 (-1 + 1.5 s(.1)), .1 x .5 s(-.1)
    Case(o.NCAPair(beta=0.1), F, [1.338793], [[-0.021253, 0.023751]]),
    # 2 log(1 + e^-.1)
    Case(o.BCOPair(beta=0.1), F, [1.288793], [[-0.047502, 0.047502]]),
    # 2 sigmoid(-.1); slope .1 s(.1) s(-.1)
    Case(o.APOZero(beta=0.1), F, [0.950042], [[-0.024938, 0.024938]]),
    # sigmoid(.1) + sigmoid(-.2) = .524979 + .450166; slopes .1 (.249376 - .247517), .1 x .247517
    Case(o.APODown(beta=0.1), F, [0.975145], [[0.000186, 0.024752]]),
    # q = sigmoid(.2): q (log q - log .999) + (1 - q)(log(1 - q) - log .001)
    Case(o.EXOPair(beta=0.1, label_smoothing=1e-3), F, [2.422015], [[-0.166003, 0.166003]]),
    # m = sigmoid(4) = .982014: .017986 x .598139 + .982014 e^-.2; slope .1 x -.734177
    Case(o.DiscoPOP(beta=0.1), F, [0.814763], [[-0.073418, 0.073418]]),
    # (1 - 5)^2 + (-1 + 5)^2
    Case(o.SPPOHard(beta=0.1), F, [32.0], [[-8.0, 8.0]]),
    # (.9 x .598139 - .1 x .798139) / .8
    Case(o.RobustDPO(beta=0.1, label_smoothing=0.1), F, [0.573139]),
    # weights e^-.4, 1, e^.4 of .2, .6, 1; slopes -weight (1 - e^-l): the weight is a constant
    Case(
        o.KLDPO(beta=1.0, tau=1.0),
        SPREAD,
        [0.134064, 0.6, 1.491825],
        [[-0.121508, 0.121508], [-0.451188, 0.451188], [-0.943013, 0.943013]],
    ),
    # weights e^-4, 1, 10 (of e^4)
    Case(o.KLDPO(beta=1.0, tau=0.1), SPREAD, [0.003663, 0.6, 10.0]),
    # slope .045017 times (1, -1) for each response: .598139 + 4 x .045017^2
    Case(o.WassersteinDPO(beta=0.1), ratios([1.0, -1.0]), [0.606245]),
    # z = (.75 - .5) / .5 = .5, .651388, -1.151388: logits 2.5 (2 - .6 - .2 z) = 3.25, 3.174306,
    # 4.075694; slopes 2.5 sigmoid(-logit): z is a constant
    Case(
        o.AlphaDPO(beta=2.5, gamma=1.5, alpha=0.2),
        ADAPTIVE,
        [0.038041, 0.040972, 0.016838],
        [[-0.093317, 0.093317], [-0.100360, 0.100360], [-0.041742, 0.041742]],
    ),
    # alpha = 0 is SimPO: 2.5 x 2 - 1.5 = 3.5
    Case(o.AlphaDPO(beta=2.5, gamma=1.5, alpha=0.0), ADAPTIVE, [0.029750] * 3),
    # one pair has no spread: 2.5 x 2 - 1.5 again; slope 2.5 s(-3.5) / n
    Case(o.AlphaDPO(), F, [0.029750], [[-0.018320, 0.036639]]),
    # -log pi(y_w|x) / 4
    Case(o.SFT(), F, [1.0], [[-0.25, 0.0]]),
    Case(o.SFT(log_likelihood="sum"), F, [4.0], [[-1.0, 0.0]]),
    # h_w = -1, .25 for free; h_w = .25 a token is not charged
    Case(o.ChosenHinge(slack=0.25), LOW, [0.75], [[-1.0, 0.0]]),
    Case(o.ChosenHinge(log_ratios="mean"), F, [0.0], [[0.0, 0.0]]),
    # -(3 - 1) / 2
    Case(o.Pessimism(), ratios([3.0, -1.0]), [-1.0], [[-0.5, -0.5]]),
]

BATCHES = [
    # -log( (e^-.2 + e^-.6 + e^-1) / 3 )
    Case(o.DrDPO(beta=1.0), SPREAD, [0.547362] * 3),
    # sorted margins (-1, 2) - (-1.5, 0): mean of log(1 + e^-.05), log(1 + e^-.2)
    Case(o.AOT(beta=0.1), CROSSED, [0.633299] * 2),
    # sorted (0, 1) - (-1, .5): mean of log(1 + e^-.1), log(1 + e^-.05)
    Case(o.AOTUnpaired(beta=0.1), ratios([1.0, -1.0], [0.0, 0.5]), [0.656428] * 2),
    # smoothing .25 adds .25 of the mean gap, .1 (1.5 / 2)
    Case(
        o.AOTUnpaired(beta=0.1, label_smoothing=0.25),
        ratios([1.0, -1.0], [0.0, 0.5]),
        [0.675178] * 2,
    ),
    # (4 + 2) nats / (4 + 1) tokens; slope 1/5, said once for each of two comparisons
    Case(
        o.PooledSFT(),
        world([[[-1.0] * 4, [-1.0]], [[-2.0], [-1.0]]], [[[0.0] * 4, [0.0]], [[0.0], [0.0]]]),
        [1.2] * 2,
        [[-0.4, 0.0], [-0.4, 0.0]],
    ),
]

LISTS = [
    # log(1 + e^-1 + e^-2) + log(1 + e^-1) = .407606 + .313262
    Case(o.PlackettLuce(beta=1.0), THREE, [0.720868]),
    # ranks 1, 2, 2: the first factor only
    Case(o.PlackettLuce(beta=1.0), ratios([1.0, 0.0, -1.0], rank=[[1, 2, 2]]), [0.407606]),
    # ranks 1, 1, 2: each of the two against the third: log(1 + e^-2) + log(1 + e^-1)
    Case(o.PlackettLuce(beta=1.0), ratios([1.0, 0.0, -1.0], rank=[[1, 1, 2]]), [0.440190]),
    # a response that nobody judged takes no part: log(1 + e^-2)
    Case(o.PlackettLuce(beta=1.0), ratios([1.0, 0.0, -1.0], rank=[[1, 0, 2]]), [0.126928]),
    Case(o.TopK(beta=1.0, k=1), THREE, [0.407606]),
    # shares .665241, .244728, .090031
    Case(o.BestOfN(beta=1.0), THREE, [0.407606], [[-0.334759, 0.244728, 0.090031]]),
    # .1 (.75 + .5) = .125; slope .1 s(-.125) / 2 = .0234
    Case(o.MDPO(beta=0.1), GROUPS, [0.632599], [[-0.023440, -0.023440, 0.023440, 0.023440]]),
    # (1.25 - 5)^2
    Case(o.MIPO(beta=0.1), GROUPS, [14.0625]),
    # minus .125 / 2 + .5 / 2
    Case(o.MIPO(beta=0.1, unbiased=True), GROUPS, [13.75]),
    # log(1 + e^(log 3 - .2)); a tie at d = .2: -log( 8 s(.2 - log 3) s(-.2 - log 3) )
    Case(o.RaoKupper(beta=0.1, nu=3.0), F, [1.240167]),
    Case(o.RaoKupper(beta=0.1, nu=3.0), TIE, [0.700644]),
    # log(1 + e^-.2 + 2 e^-.1); a tie: the same + .1 - log 2
    Case(o.Davidson(beta=0.1, nu=1.0), F, [1.288793]),
    Case(o.Davidson(beta=0.1, nu=1.0), TIE, [0.695646]),
    # ranks 1, 1, 2: a tie at d = .2 and two wins, at d = 2 x .2 and .2 (h = 2, 0, -2)
    Case(
        o.Davidson(beta=0.1, nu=1.0),
        ratios([2.0, 0.0, -2.0], rank=[[1, 1, 2]]),
        [1.060239],  # (.695646 + 1.196278 + 1.288793) / 3; log(1 + e^-.4 + 2 e^-.2) = 1.196278
    ),
]

SCORES = [
    # p = s(log 4) = .8, z = 2: .8 x .126928 + .2 x 2.126928; slope s(2) - .8 = .080797: reversed
    Case(
        o.SoftLabelDPO(beta=1.0, margin_scale=2.0),
        ratios([1.0, -1.0], scores=[[0.6931472, 0.0]]),
        [0.526928],
        [[0.080797, -0.080797]],
    ),
    # (1.5 - .2)^2; slope -2 x 1.3 x .1
    Case(
        o.RewardDistillation(beta=0.1),
        fixture(scores=[[1.5, 0.0]]),
        [1.69],
        [[-0.26, 0.26]],
    ),
    # q = softmax(.5, 0, -.5), p = softmax(4, 2, 0)
    Case(o.EXO(beta=0.5, temperature=0.5), THREE, [0.482427], [[-0.2582, 0.0738, 0.1845]]),
    Case(o.InfoNCA(beta=0.5, temperature=0.5), THREE, [0.754801]),
    # equal scores: shares 1/2, so .5 (.644397 + .744397) for each of r = .1, -.1
    Case(o.NCA(beta=0.1), fixture(scores=[[3.0, 3.0]]), [1.388793]),
    # targets 10 (.9 - .5), -4: (1 - 4)^2 twice
    Case(
        o.SPPO(beta=0.1),
        fixture(scores=[[2.1972246, 0.0]]),
        [18.0],
        [[-6.0, 6.0]],
    ),
    Case(o.GPO(beta=0.1), fixture(scores=[[0.4, -0.4]]), [18.0], [[-6.0, 6.0]]),
    # gaps 1.5, .5, -.2 of three models: 1.3^2, .3^2, .4^2; penalty -.001 (1 - 1) / 2 = 0;
    # slopes -2 x .3 x .1 - .0005, + .06 - .0005
    Case(
        o.EnsembleDistillation(beta=0.1, gamma=1e-3),
        fixture(ensemble=[[[1.5, 0.5, -0.2], [0.0, 0.0, 0.0]]]),
        [0.09],
        [[-0.0605, 0.0595]],
    ),
    # (1.69 + .09 + .16) / 3
    Case(
        o.EnsembleDistillation(beta=0.1, gamma=0.0, reduce="mean"),
        fixture(ensemble=[[[1.5, 0.5, -0.2], [0.0, 0.0, 0.0]]]),
        [0.646667],
    ),
    # two comparisons, d = 2 and 0: model 1 errs by 1.3^2 and 0, model 2 by .3^2 and 1: the nearest
    # for each, then the nearest for both together
    Case(
        o.EnsembleDistillation(beta=0.1, gamma=0.0, reduce="min_example"),
        ratios(
            [1.0, -1.0],
            [0.0, 0.0],
            ensemble=[[[1.5, 0.5], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]],
        ),
        [0.09, 0.0],
    ),
    Case(
        o.EnsembleDistillation(beta=0.1, gamma=0.0, reduce="min_batch"),
        ratios(
            [1.0, -1.0],
            [0.0, 0.0],
            ensemble=[[[1.5, 0.5], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]],
        ),
        [0.09, 1.0],
    ),
]

LABELS = [
    # z0 = .5, from the third, mismatched response: (.487503 + .462570) / 2
    Case(
        o.KTO(beta=0.1),
        ratios([1.0, -1.0, 0.5], label=[[1, 0, -1]]),
        [0.475036],
        [[-0.012492, 0.012430, 0.0]],
    ),
    # z0 = max(0, -2): 2 sigmoid(-.1) / 2, weights 1 and 2
    Case(
        o.KTO(beta=0.1, undesirable=2.0),
        ratios([1.0, -1.0, -2.0], label=[[1, 0, -1]]),
        [0.712531],
    ),
    # the unpaired form of APOZero, half of its .950042: a mean over two responses
    Case(o.KTO(beta=0.1, baseline="zero"), F, [0.475021], [[-0.012469, 0.012469]]),
    # z0 = mean of 3 and -1: (s(-.2) + s(-.2)) / 2
    Case(o.KTO(beta=0.1, baseline="matched"), ratios([3.0, -1.0]), [0.450166]),
    # delta = 0: half of 1.288793
    Case(o.BCO(beta=0.1), F, [0.644397], [[-0.023751, 0.023751]]),
    # good .1, .3, bad -.1: delta = (.2 - .1) / 2 = .05; (1.289417 + log(1 + e^-.25)) / 3
    Case(o.BCO(beta=0.1), ratios([1.0, -1.0, 3.0], label=[[1, 0, 1]]), [0.621786]),
]

WRAPPERS = [
    # h_w = .7 + .5 x .3 = .85, h_l = -1: log(1 + e^-.185)
    Case(o.LD(objective=o.DPO(beta=0.1), alpha=0.5), TAIL, [0.604919]),
    # policy only: h_w = .85 + .5 x 2.5 = 2.1: log(1 + e^-.31)
    Case(o.LD(objective=o.DPO(beta=0.1), alpha=0.5, sides="policy"), TAIL, [0.550112]),
    Case(o.LD(objective=o.DPO(beta=0.1), alpha=1.0), F, [0.598139]),
    # weights (1.25 ^ .5 x (.8 / .68) ^ .5 = 1.084652, .2 / .68 = .294118): .319015 x .598139
    # slope .319015 x .045017: the weight is a constant
    Case(o.WPO(objective=o.DPO(beta=0.1)), CONFIDENT, [0.190815], [[-0.014361, 0.014361]]),
    # cut at .1
    Case(o.WPO(objective=o.DPO(beta=0.1), max_weight=0.1), CONFIDENT, [0.059814]),
    # .598139 + .2 x 1
    Case(
        o.Sum(objectives=(o.DPO(beta=0.1), o.SFT()), weights=(1.0, 0.2)),
        F,
        [0.798139],
        [[-0.095017, 0.045017]],
    ),
    # p-DPO: .598139 - .1 (1 - 1) / 2
    Case(o.Sum(objectives=(o.DPO(beta=0.1), o.Pessimism()), weights=(1.0, 0.1)), F, [0.598139]),
    # f' of e, 1/e: log 2 + log s(1) - log 2 - log s(-1) = 1; log(1 + e^-1)
    Case(o.FDivergence(objective=o.DPO(beta=1.0)), F, [0.313262]),
    # e^1 - e^-1 = 2.350402; log(1 + e^-2.350402)
    Case(o.FDivergence(objective=o.DPO(beta=1.0), divergence=o.ForwardKL()), F, [0.091056]),
    # 2 (e^.5 - e^-.5) = 2.084382; .1 of it
    Case(
        o.FDivergence(objective=o.DPO(beta=0.1), divergence=o.AlphaDivergence(alpha=0.5)),
        F,
        [0.594349],
    ),
    Case(o.FDivergence(objective=o.DPO(beta=0.1), divergence=o.ReverseKL()), F, [0.598139]),
]

CASES = PAIRS + BATCHES + LISTS + SCORES + LABELS + WRAPPERS

KINDS = {re.sub(r"\d[\d.e-]*", "#", repr(case.objective)): case.objective for case in CASES}
each = pytest.mark.parametrize("objective", KINDS.values(), ids=repr)
"""Every objective of the table once; again where it differs in more than numbers."""
