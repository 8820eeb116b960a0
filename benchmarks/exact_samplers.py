"""Exact online DPO with a pair sampler: all bandits at once against loops over pairs.

All run the same updates (Mix-P at the theorem's learning rate) on the same bandits and must end in
the same rewards: everything at once; the same code a pair at a time, each pair through the DPO
objective and autograd; and a loop in Python floats with the gradient written out by hand, which
needs no objective and serves DPO only. CPU seconds, one thread.

    python benchmarks/exact_samplers.py --bandits 1000 --arms 20 --updates 5
"""

import argparse
import math
import time
from collections.abc import Callable

import torch

from prefloop.objectives import DPO
from prefloop.pair_weights import MIX_P, arms
from prefloop.reproduce.samplers_theory import bandits, descend
from prefloop.tabular import as_logps
from prefloop.types import Pair


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def plain(rewards: list[list[float]], updates: int, beta: float = 1.0) -> list[list[float]]:
    """Implicit rewards of each bandit after `updates` updates, one pair after the other."""
    ends = []
    for reward in rewards:
        count = len(reward)
        theta = [0.0] * count
        for _ in range(updates):
            gradient = [0.0] * count
            for first in range(count):
                for second in range(count):
                    implied = beta * (theta[first] - theta[second])
                    weight = 2 + math.exp(implied) + math.exp(-implied)
                    wanted = sigmoid(reward[first] - reward[second])
                    gradient[first] -= beta * weight * (wanted - sigmoid(implied))
            rate = 1 / (beta**2 * count)
            theta = [value - rate * slope for value, slope in zip(theta, gradient, strict=True)]
        ends.append([beta * value for value in theta])
    return ends


def pair_by_pair(reward: torch.Tensor, updates: int, beta: float = 1.0) -> torch.Tensor:
    """The same with tensors: each pair of each bandit through the objective, on its own."""
    objective, ends = DPO(beta=beta), []
    for values in reward:
        count, theta = len(values), torch.zeros_like(values)
        for _ in range(updates):
            live = theta.detach().requires_grad_()
            logp, uniform = live.log_softmax(-1), torch.zeros_like(live).log_softmax(-1)
            weight = MIX_P(arms(values, beta * theta))
            loss = live.new_zeros(())
            for first in range(count):
                for second in range(count):
                    pair, reference = (
                        Pair(
                            as_logps(table[first : first + 1]), as_logps(table[second : second + 1])
                        )
                        for table in (logp, uniform)
                    )
                    wanted = (values[first] - values[second]).sigmoid()
                    loss = loss + weight[first, second] * wanted * objective(pair, reference).sum()
            theta = theta - torch.autograd.grad(loss, live)[0] / (beta**2 * count)
        ends.append(beta * theta)
    return torch.stack(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandits", type=int, default=1000)
    parser.add_argument("--arms", type=int, default=20)
    parser.add_argument("--updates", type=int, default=5)
    given = parser.parse_args()

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    reward = torch.rand((given.bandits, given.arms), generator=rng, dtype=torch.float64)
    descend(MIX_P, bandits(reward), 1.0, 1)  # the first call loads kernels
    pair_by_pair(reward[:1, :2], 1)

    def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        start = time.process_time()
        end = work()
        return end, 1e6 * (time.process_time() - start) / len(end)

    updates, some, few = given.updates, reward[:100], reward[:2]
    together, fast = timed(lambda: descend(MIX_P, bandits(reward), 1.0, updates)[-1])
    floats, by_hand = timed(
        lambda: torch.tensor(plain(some.tolist(), updates), dtype=torch.float64)
    )
    objects, slow = timed(lambda: pair_by_pair(few, updates))
    apart = max(float((together[: len(end)] - end).abs().max()) for end in (floats, objects))
    print(f"{given.bandits} bandits of {given.arms} arms, {updates} updates, one thread")
    print(f"all at once, through DPO       {fast:12.0f} microseconds a bandit")
    print(f"each pair through DPO          {slow:12.0f}   {slow / fast:6.0f} times as long")
    print(f"each pair, floats, by hand     {by_hand:12.0f}   {by_hand / fast:6.1f} times as long")
    print(f"largest difference of the results {apart:.1e}")


if __name__ == "__main__":
    main()
