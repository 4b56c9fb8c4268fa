"""Calibration: its measurements against independent ones, and proposals that do not depend on wrong settings."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign.cli.main import main
from diffalign.config.schema import Config, load_config, packaged_config, save_config
from diffalign.objectives import OBJECTIVES
from diffalign.training.build import Run, build
from diffalign.training.inspect.calibrate import (
    MOVEMENT,
    CalibrationError,
    _spread,
    _spread_at,
    _steps_at_peak,
    calibratable,
    calibrate,
    scale_of,
)
from diffalign.training.inspect.calibration_report import Calibration, Point, report
from diffalign.training.processes import make_accelerator
from diffalign.types import Evidence

MakeConfig = Callable[..., Config]
TUNED = 2000.0  # beta of training_configs/world/dpo.yaml
SCALES = {"ipo": "tau", "mapo": "num_train_timesteps"}  # all others: beta
NO_SCALE = ("sft", "dso_dro", "diffusion_dro", "dspo", "diffusion_nft")


def built(config: Config) -> Run:
    return build(config, make_accelerator(config))


def world(tmp_path: Path, *overrides: str, config: str = "dpo") -> Calibration:
    common = ("training.report_to=none", "training.train_batch_size=16", f"output_dir={tmp_path / 'none'}")
    loaded = load_config(packaged_config(f"world/{config}.yaml"), common, overrides)
    assert isinstance(loaded, Config)
    return calibrate(built(loaded), steps=4, pairs=64)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in NO_SCALE])
def test_the_field_that_an_objective_declares_scales_its_logit(name: str) -> None:
    """Near the reference, doubling the field doubles the logit; where the logit is bare (ipo), it stays."""
    objective = OBJECTIVES[name]()
    scale = scale_of(objective)
    assert scale.field == SCALES.get(name, "beta")
    reference = torch.full((2, 8), 0.2, dtype=torch.float64)
    away = 1e-9 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evidence = Evidence(reference + away, reference, weight=torch.ones(8, dtype=torch.float64))
    doubled = replace(objective, **{scale.field: 2 * getattr(objective, scale.field)})
    logit, twice = objective.score(evidence).logit, doubled.score(evidence).logit
    assert torch.allclose(twice, (2 if scale.in_logit else 1) * logit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NO_SCALE)
def test_an_objective_without_a_scale_is_refused(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"{name} has no setting that scales a logit"):
        scale_of(OBJECTIVES[name]())


def test_runs_that_cannot_be_measured_are_refused_before_a_model_is_loaded(
    make_config: MakeConfig, tiny_sd: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"tuning: with LoRA.*resume_lora='x'.* starts from other weights"):
        calibratable(make_config(tiny_sd, {"tuning.resume_lora": "x"}))
    with pytest.raises(CalibrationError, match="mixed_precision=bf16"):
        calibratable(make_config(tiny_sd, {"training.mixed_precision": "fp16"}))
    with pytest.raises(CalibrationError, match="source online_pairs"):
        calibratable(load_config(packaged_config("world/online_dpo.yaml")))  # type: ignore[arg-type]


def test_an_objective_without_a_gradient_at_the_start_is_refused(make_config: MakeConfig, tiny_sd: Path) -> None:
    released = {"name": "inversion_dpo", "form": "released", "steps": 2, "substeps": 1}
    with pytest.raises(CalibrationError, match="no gradient where training starts"):
        calibrate(built(make_config(tiny_sd, {"objective": released})), steps=4, pairs=2)


def test_a_wrong_scale_and_a_wrong_learning_rate_do_not_sway_the_proposal(tmp_path: Path) -> None:
    """beta 1000 times too small and too large: the same measurement to the bit, within 3 times of the tuned value."""
    small, large = (world(tmp_path, f"objective.beta={b}") for b in ("2", "2000000"))
    assert small.path == large.path
    assert small.proposed == large.proposed
    assert TUNED / 3 < small.proposed < TUNED * 3
    assert small.changes == large.changes == {"objective.beta": small.proposed}
    assert "times too small" in report(small)
    assert "times too large" in report(large)
    far = world(tmp_path, "training.learning_rate=1e-2", "objective.beta=2")
    assert TUNED / 3 < far.proposed < TUNED * 3
    assert far.lowest < far.proposed_learning_rate < far.highest < 1e-4  # 1e-4 collapses DPO on the world
    assert far.changes.keys() == {"objective.beta", "training.learning_rate"}
    assert not (tmp_path / "none").exists()


def test_ipo_and_lora_come_to_the_same_scale(tmp_path: Path) -> None:
    """tau is half of DPO's beta by its convention; LoRA moves in other weights and otherwise."""
    ipo = world(tmp_path, "objective.tau=1", config="ipo")
    assert (ipo.field, ipo.wanted) == ("tau", 1.0)
    assert TUNED / 2 / 3 < ipo.proposed < TUNED / 2 * 3
    lora = world(tmp_path, "objective.beta=2", config="dpo_lora")
    assert TUNED / 3 < lora.proposed < TUNED * 3


def test_without_a_reference_the_spread_is_that_of_the_base(tmp_path: Path) -> None:
    found = world(tmp_path, config="mapo")
    assert (found.field, found.anchored, found.movement_at_configured) == ("num_train_timesteps", False, None)
    assert found.proposed * found.spread == pytest.approx(1, rel=0.06)  # two digits
    assert found.factor[1] < found.factor[0] < found.factor[2]
    assert "no reference" in report(found)


def test_the_weights_are_as_before_and_nothing_is_written(
    make_config: MakeConfig, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_sd, {"training.train_batch_size": 3})
    run = built(config)
    before = [p.detach().clone() for p in run.parameters]
    calibrate(run, steps=4, pairs=6)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(run.parameters, before, strict=True))
    assert not Path(config.output_dir).exists()

    from diffalign.training.inspect import calibrate as module

    monkeypatch.setattr(module, "_learning_rates", None)
    monkeypatch.setattr(module, "measure_and_backward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(run, steps=4, pairs=6)
    assert all(torch.equal(p, w) for p, w in zip(run.parameters, before, strict=True))


def test_adams_first_step_moves_every_weight_by_the_learning_rate(make_config: MakeConfig, tiny_sd: Path) -> None:
    """So the relative change after it is lr √n / ‖w‖, where all gradients are above Adam's epsilon."""
    run = built(make_config(tiny_sd, {"tuning.method": "full", "training.adam_weight_decay": 0.0}))
    found = calibrate(run, steps=8, pairs=6)
    count = sum(p.numel() for p in run.parameters)
    norm = math.sqrt(sum(float((p.double() ** 2).sum()) for p in run.parameters))
    assert found.path[0].weights == pytest.approx(found.path_lr * math.sqrt(count) / norm, rel=0.05)
    assert found.path[0].movement < MOVEMENT <= found.path[-1].movement


def test_the_movement_and_the_spread_are_those_of_the_errors(make_config: MakeConfig, tiny_sd: Path) -> None:
    """Against the engine's own evidence at the same points, after one step at the same learning rate."""
    from diffalign.engine.measure import measure, predictions
    from diffalign.training.inspect import calibrate as module

    run = built(make_config(tiny_sd, {"tuning.method": "full", "training.train_batch_size": 4}))
    unit = replace(run.objective, beta=1.0)  # type: ignore[type-var]
    views = module._views(run.networks, run.source.batches(1), unit, 4)
    with torch.no_grad():
        for p in run.parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=1e-3)
    seen = module._observed(run.networks, unit, views)
    probe = views[0].probe
    with torch.no_grad():
        evidence = measure(run.networks, probe)
        frozen = predictions(run.networks.reference, probe)
        change = ((predictions(run.networks.policy, probe) - frozen) ** 2).mean()
    torch.testing.assert_close(views[0].base, frozen, rtol=0, atol=0)
    assert seen.movement == pytest.approx(math.sqrt(float(change / evidence.reference.mean())), rel=1e-5)
    logit = -0.5 * (evidence.margin[0] - evidence.margin[1]).double()
    torch.testing.assert_close(seen.logits, logit, rtol=1e-4, atol=1e-7)


def test_a_spread_is_a_normal_variables_standard_deviation() -> None:
    x = 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert _spread(x) == pytest.approx(3, rel=0.01)
    x[:100] = 1e6  # a long tail is not what it is about
    assert _spread(x) == pytest.approx(3, rel=0.02)


def test_between_points_a_power_law_is_exact() -> None:
    path = [Point(k, 0.01 * k, 7.0 * (0.01 * k) ** 1.5, 0.0) for k in (1, 2, 4, 8, 16)]
    assert _spread_at(path, MOVEMENT) == pytest.approx(7.0 * MOVEMENT**1.5, rel=1e-12)


@pytest.mark.parametrize(("schedule", "peak"), [("constant", 10), ("constant_with_warmup", 8), ("linear", 5)])
def test_steps_are_counted_by_their_share_of_the_peak(
    schedule: str, peak: float, make_config: MakeConfig, tiny_sd: Path
) -> None:
    """Warm-up over 4 steps has 0, 1/4, 2/4, 3/4: 1.5 of 4 and, with 6 whole ones, 7.5; a line to 0 has about half."""
    settings = {"training.max_train_steps": 10, "training.lr_scheduler": schedule}
    if schedule == "constant_with_warmup":
        settings["training.lr_warmup_steps"] = 4
    assert _steps_at_peak(make_config(tiny_sd, settings).training) == pytest.approx(peak, abs=0.51)


def test_the_command_prints_overrides_and_writes_json(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_sd, {"objective.beta": 1e-6, "data.cache_dir": str(tmp_path / "cache")})
    save_config(config, tmp_path / "run.yaml")
    out = tmp_path / "figures.json"
    main(["calibrate", str(tmp_path / "run.yaml"), "--steps", "4", "--pairs", "6", "--json", str(out)])
    found = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert found["configured"] == 1e-6
    assert found["changes"]["objective.beta"] == found["proposed"]
    overrides, command = printed.split("\nnext:\n")
    assert shlex.split(command.replace("\\\n", ""))[3:] == overrides.splitlines()[-1].split()
    assert all(len(line) <= 80 for line in overrides.splitlines()[:-1] if not line.startswith(("|", "(")))
    again = load_config(tmp_path / "run.yaml", overrides.splitlines()[-1].split())  # what is printed can be pasted
    assert again.objective.beta == pytest.approx(found["proposed"], rel=1e-2)  # type: ignore[union-attr]
    assert not (tmp_path / "cache").exists()
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(("steps", "named"), [(3, "steps = 3"), (2, "steps = 2"), (12, "steps = 12")])
def test_steps_that_cannot_be_looked_at_are_refused(
    steps: int, named: str, make_config: MakeConfig, tiny_sd: Path
) -> None:
    with pytest.raises(CalibrationError, match=named):
        calibrate(built(make_config(tiny_sd)), steps=steps)


def test_progress_is_one_line_a_stage_where_there_is_no_terminal(
    make_config: MakeConfig, tiny_sd: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        found = calibrate(built(make_config(tiny_sd, {"training.train_batch_size": 3})), steps=4, pairs=6)
    stages = [line for line in caplog.messages if line.startswith("calibrate: ")]
    assert stages[0] == "calibrate: the base at 6 pairs"
    assert stages[-1] == f"calibrate: attempt {len(stages) - 1}, learning rate {found.path_lr:.2g}"
    assert "it/s" not in capsys.readouterr().err
