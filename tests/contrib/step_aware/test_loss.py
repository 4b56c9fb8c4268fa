"""The loss of the preference model and its relabelling, against the authors' numbers and by hand."""

from __future__ import annotations

import math

import torch

from diffalign.contrib.step_aware.loss import preference_loss, prompt_weights, relabel
from tests.golden_spo import spo_parts


def test_the_authors_criterion_and_its_gradients() -> None:
    params, inputs, outputs = spo_parts("spm_criterion_inbatch_False")
    leaves = {name: inputs[name].requires_grad_() for name in ("text", "image_0", "image_1")}
    images = torch.stack([leaves["image_0"], leaves["image_1"]])
    scores = params["logit_scale"] * (images * leaves["text"]).sum(-1)
    labels = torch.stack([inputs["label_0"], inputs["label_1"]])
    loss = (prompt_weights(inputs["num_examples_per_prompt"]) * preference_loss(scores, labels)).sum()
    # theirs subtracts a float32 log 2 from ties
    torch.testing.assert_close(loss, outputs["loss"], rtol=0, atol=1e-6)
    loss.backward()
    for name, leaf in leaves.items():
        # their weights 1/n are float32
        torch.testing.assert_close(leaf.grad, outputs[f"grad_{name}"], rtol=1e-7, atol=1e-9)


def test_by_hand() -> None:
    """Scores (log 3, 0) give the first side probability 3/4."""
    scores = torch.tensor([[math.log(3.0)] * 3, [0.0] * 3], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
    expected = [math.log(4 / 3), math.log(4.0), (math.log(4 / 3) + math.log(4.0)) / 2 - math.log(2)]
    torch.testing.assert_close(preference_loss(scores, labels), torch.tensor(expected, dtype=torch.float64))


def test_a_tie_is_best_at_equal_scores() -> None:
    apart = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss = preference_loss(apart, torch.full((2, 2), 0.5))
    assert loss[1].abs() < 1e-7 < loss[0]


def test_pairs_of_one_prompt_weigh_as_one() -> None:
    weights = prompt_weights(torch.tensor([3, 3, 3, 1]))
    torch.testing.assert_close(weights, torch.tensor([1, 1, 1, 3], dtype=torch.float64) / 6)


def test_the_authors_relabelling() -> None:
    params, inputs, outputs = spo_parts("spm_pickscore_relabel")
    images = torch.nn.functional.normalize(torch.stack([inputs["image_0_embeds"], inputs["image_1_embeds"]]), dim=-1)
    texts = torch.nn.functional.normalize(inputs["text_embeds"], dim=-1)
    scores = math.exp(params["logit_scale_log"]) * (images * texts).sum(-1)
    labels = relabel(scores, params["threshold"])
    assert torch.equal(labels, torch.stack([outputs["label_0"], outputs["label_1"]]))


def test_the_gap_is_one_of_probabilities() -> None:
    """Probabilities .549 and .451 differ by less than .1, .551 and .449 by more."""
    odds = torch.tensor([0.549 / 0.451, 0.551 / 0.449, 0.449 / 0.551]).log()
    labels = relabel(torch.stack([odds, torch.zeros(3)]))
    assert labels.tolist() == [[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]
