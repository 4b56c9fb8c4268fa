"""The inversion family against numbers computed by the authors' own code (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
import pytest
import torch
from torch import Tensor

from diffalign import NoiseSchedule
from diffalign.engine.inversion import arrive, released_ascent
from diffalign.engine.measure import measure
from diffalign.objectives import inpo, smpo
from diffalign.objectives.inpo import InPO
from diffalign.objectives.inversion_dpo import InversionDPO
from diffalign.objectives.smpo import SmPO
from diffalign.types import Conditioning, PairBatch, Probe
from tests.toy import SDXL_CONFIG


@dataclass
class StubModels:
    """The analytic networks that the golden file describes."""

    case: dict
    schedule: NoiseSchedule

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._answer(xt, t, *self.case["policy"])

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._answer(xt, t, *self.case["reference"])

    @staticmethod
    def _answer(xt: Tensor, t: Tensor, a: float, b: float, c: float) -> Tensor:
        return torch.tanh(a * xt + b * torch.sin(t.to(xt) / 200)[:, None, None, None]) + c * xt


def stub_models(case: dict, steps_offset: int = 1) -> StubModels:
    """On diffusers' own float32 table, as the file's numbers are."""
    scheduler = diffusers.DDIMScheduler.from_config({**SDXL_CONFIG, "steps_offset": steps_offset})
    return StubModels(case, NoiseSchedule.from_diffusers(scheduler))


def golden_batch(case: dict, scores: Tensor | None = None) -> PairBatch:
    latents = torch.stack([tensor(case, "chosen_latents"), tensor(case, "rejected_latents")])
    embeds = torch.zeros(2, latents.shape[1], 1, 1, dtype=torch.float64)
    return PairBatch(latents, Conditioning(embeds), torch.arange(latents.shape[1]), scores=scores)


def tensor(case: dict, name: str) -> Tensor:
    return torch.tensor(case[name], dtype=torch.float64)


def give(monkeypatch: pytest.MonkeyPatch, module: object, case: dict) -> None:
    """The case's t and noise in place of the pair's own draws."""
    noises = tensor(case, "noises")
    monkeypatch.setattr(module, "integers", lambda keys, stream, low, high: torch.full((len(keys),), case["t"]))
    monkeypatch.setattr(
        module, "normal", lambda keys, stream, shape: noises[int(stream.split()[-1])][None], raising=False
    )


def check_points(probe: Probe, case: dict) -> None:
    for side, name in enumerate(("chosen", "rejected")):
        torch.testing.assert_close(probe.xt[side], tensor(case, f"inverted_{name}"), rtol=0, atol=1e-7)
        torch.testing.assert_close(probe.target[side], tensor(case, f"target_{name}"), rtol=0, atol=1e-7)


@pytest.mark.parametrize("i", range(3))
def test_inpo(golden: dict, monkeypatch: pytest.MonkeyPatch, i: int) -> None:
    case = golden["inpo"]["cases"][i]
    give(monkeypatch, inpo, case)
    models = stub_models(case)
    assert models.schedule.timesteps(case["steps"]).flip(0).tolist() == case["grid"]
    objective = InPO(beta=case["beta"], steps=case["steps"], eta=case["eta"], grid="released")
    probe = objective.probe(golden_batch(case), models)
    check_points(probe, case)
    score = objective.score(measure(models, probe))
    assert score.logit.tolist() == pytest.approx(case["inside"], rel=1e-7, abs=1e-7)
    assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-7)


@pytest.mark.parametrize("i", range(3))
def test_smpo(golden: dict, monkeypatch: pytest.MonkeyPatch, i: int) -> None:
    case = golden["smpo"]["cases"][i]
    give(monkeypatch, smpo, case)
    objective, models = SmPO(beta=case["beta"], steps=case["steps"], grid="released"), stub_models(case)
    p = torch.tensor(case["prob_chosen"], dtype=torch.float64)
    scores = torch.stack([p.logit() * (objective.score_high - objective.score_low), torch.zeros_like(p)])[:, None]
    probe = objective.probe(golden_batch(case, scores), models)
    check_points(probe, case)
    score = objective.score(measure(models, probe))
    assert score.logit.tolist() == pytest.approx(case["inside"], rel=1e-7, abs=1e-7)
    assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-7)


@pytest.mark.parametrize("i", range(2))
def test_inversion_dpo(golden: dict, i: int) -> None:
    case = golden["inversion_dpo"]["cases"][i]
    models, batch = stub_models(case, steps_offset=0), golden_batch(case)
    s, x0 = models.schedule, batch.latents.flatten(0, 1)
    assert s.timesteps(case["steps"]).tolist() == case["timesteps_descending"]
    whole = released_ascent(s, torch.full((len(x0),), s.num_train_timesteps), case["steps"])
    end = arrive(s, lambda x, t, rows: models.reference(x, t, batch.cond), x0, whole)
    expected = torch.cat([tensor(case, "chosen_inverted"), tensor(case, "rejected_inverted")])
    # the table of a diffusers scheduler is a float32 product, which other kernels round otherwise
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-7)

    released = InversionDPO(
        beta=case["beta"],
        steps=case["steps"],
        form="released",
        grid="released",
        weighting="inverse_alpha",
        substeps=1,
    )
    score = released.score(measure(models, released.probe(batch, models)))
    assert float(score.logit.mean()) == pytest.approx(case["inside"], abs=1e-9)
    assert float(score.loss.mean()) == pytest.approx(case["loss"], abs=1e-9)
