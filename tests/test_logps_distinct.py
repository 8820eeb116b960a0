"""Each answer goes through the model once, and its votes get the numbers of every answer."""

import tiny
import torch

from prefloop.logps import Scorer, distinct, logps_once
from prefloop.types import Tokenized, score

ROWS = [
    Tokenized((1, 2), ((3,), (4, 5))),
    Tokenized((1, 2), ((4, 5), (6, 7, 8), (3,))),
    Tokenized((9,), ((3,), (3,))),
]


def test_every_different_answer_has_one_seat_and_shares_the_row_of_its_prompt():
    once = distinct(ROWS, token_budget=100)
    assert [(row.prompt, row.responses) for row in once.rows] == [
        ((1, 2), ((3,), (4, 5), (6, 7, 8))),
        ((9,), ((3,),)),
    ]
    assert once.row.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert once.place.tolist() == [[0, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_a_row_takes_answers_up_to_the_budget_and_one_too_long_is_alone():
    once = distinct(ROWS, token_budget=5)
    assert [row.responses for row in once.rows] == [((3,), (4, 5)), ((6, 7, 8),), ((3,),)]
    assert once.row.tolist() == [[0, 0, 0], [0, 1, 0], [2, 2, 0]]
    assert [row.responses for row in distinct(ROWS, 1).rows] == [
        ((3,),),
        ((4, 5),),
        ((6, 7, 8),),
        ((3,),),
    ]


def test_log_probabilities_are_those_of_scoring_every_row():
    scorer = Scorer(tiny.llama().eval())
    asked = []

    class Counting(torch.nn.Module):
        def forward(self, batch):
            asked.extend(response for row in batch for response in row.responses)
            return scorer(batch)

    found = {
        index: (logps.token[place], logps.mask[place])
        for part, logps in logps_once(Counting(), ROWS, token_budget=8)
        for place, index in enumerate(part)
    }
    assert len(asked) == 4
    for index, row in enumerate(ROWS):
        alone = score(scorer, [row])
        token, mask = found[index]
        assert torch.equal(mask[: alone.mask.shape[1], : alone.mask.shape[2]], alone.mask[0])
        assert int(mask.sum()) == sum(map(len, row.responses))
        torch.testing.assert_close(token[mask], alone.token[0][alone.mask[0]])
