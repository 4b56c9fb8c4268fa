"""How a preference model is trained: the labels of a pair against the two scores it was given.

    p      = softmax(score_0, score_1)
    loss   = −Σ_i label_i · log p_i  − log 2 for a tie,        so that the best possible loss is 0
    batch  = Σ_pairs w · loss,   w = (1 / n) / Σ 1 / n,        n: how many pairs of the data share the prompt

Sources: PickScore (arXiv 2305.01569) and the release of SPO (arXiv 2406.04314), `spm_criterion.py` without in-batch
negatives. Labels are (1, 0), (0, 1) or (½, ½), "side pair".
By hand: equal scores and labels (1, 0) give log 2; the same with (½, ½) give 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE = 0.5  # the label of both sides of a tie
RELABEL_GAP = 0.1  # probability by which a clean pair must differ to get a label (the release's)


def preference_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of each pair, [pair], from scores and labels "side pair"."""
    cross_entropy = -(labels * scores.log_softmax(dim=0)).sum(0)
    return cross_entropy - math.log(2) * (labels[0] == labels[1])


def prompt_weights(pairs_of_prompt: Tensor) -> Tensor:
    """Weights [pair] that sum to 1, in proportion to 1 / (pairs that share the prompt)."""
    share = 1 / pairs_of_prompt.double()
    return share / share.sum()


def relabel(scores: Tensor, gap: float = RELABEL_GAP) -> Tensor:
    """Labels "side pair" by another model's scores of the clean images; within `gap` of probability it is a tie."""
    probabilities = scores.softmax(dim=0)
    first = probabilities[0] > probabilities[1]
    decided = (probabilities[0] - probabilities[1]).abs() > gap
    labels = torch.stack([first, ~first]).to(scores.dtype)
    return torch.where(decided, labels, TIE)
