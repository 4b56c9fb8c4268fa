"""The first gradient of an objective beside Diffusion-DPO's: by timestep, and equal to the training loop's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.cli.main import main
from diffalign.config.schema import Config, save_config
from diffalign.engine.measure import measure_and_backward
from diffalign.training.build import Run, build
from diffalign.training.inspect.gradient_check import QUARTERS, _Sums, diagnose, directions_table
from diffalign.training.processes import make_accelerator

MakeConfig = Callable[..., Config]
RESIDUAL = {"name": "inversion_dpo", "steps": 4, "substeps": 1}


def built(config: Config) -> Run:
    return build(config, make_accelerator(config))


def test_dpo_points_where_dpo_points(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    found = diagnose(built(make_config(tiny_sdxl, {"training.train_batch_size": 6})), batches=2)
    assert [(d.low, d.high) for d in found] == [(0, 250), (250, 500), (500, 750), (750, 1000), (0, 1000)]
    for d in found:
        assert d.cosine == pytest.approx(1, abs=1e-6)
        assert d.norm_ratio == pytest.approx(1, abs=1e-6)
        assert d.error == d.error_dpo
        assert d.noise_std == pytest.approx((1, 1), abs=0.1)  # drawn noise
    assert all(abs(d.cosine_dpo) < 0.99 for d in found)


@pytest.mark.parametrize(
    "objective", [{"name": "inpo", "steps": 4}, RESIDUAL, {**RESIDUAL, "points_per_forward": None}]
)
def test_the_quarters_add_up_to_the_gradient_of_training(
    objective: dict[str, object], make_config: MakeConfig, tiny_sdxl: Path
) -> None:
    run = built(make_config(tiny_sdxl, {"objective": objective, "training.train_batch_size": 4}))
    batch = next(run.source.batches(0))
    sums = _Sums(run)
    sums.add(run.objective, batch)
    with torch.no_grad():
        probe = run.objective.probe(batch, run.networks)
    measure_and_backward(run.networks, probe, run.objective.score)
    trained = torch.cat([p.grad.flatten() for p in run.parameters])
    assert float(trained.norm()) > 0
    torch.testing.assert_close(sums.gradient.sum(0), trained, rtol=1e-4, atol=1e-6 * float(trained.abs().max()))
    filled = {int(q) for q in (probe.t * QUARTERS // 1000).flatten()}
    assert {q for q in range(QUARTERS) if float(sums.gradient[q].norm()) > 0} == filled


def test_the_released_form_has_no_gradient_to_compare(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    found = diagnose(built(make_config(tiny_sdxl, {"objective": {**RESIDUAL, "form": "released"}})), batches=1)
    assert {d.cosine for d in found} == {None}
    assert directions_table(found).count("no gradient") >= 5


def test_an_objective_of_one_side_has_nothing_on_the_other(make_config: MakeConfig, tiny_sdxl: Path) -> None:
    whole = diagnose(built(make_config(tiny_sdxl, {"objective": {"name": "sft"}})), batches=1)[-1]
    assert whole.error[0] == pytest.approx(whole.error_dpo[0])
    assert math.isnan(whole.error[1])


def test_the_command_leaves_no_cache_and_writes_json(
    make_config: MakeConfig, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_sdxl, {"data.cache_dir": str(tmp_path / "cache")})
    save_config(config, tmp_path / "run.yaml")
    out = tmp_path / "figures.json"
    main(["diagnose", str(tmp_path / "run.yaml"), "--batches", "1", "--json", str(out)])
    assert "| 0-1000 | +1.00 |" in capsys.readouterr().out
    assert len(json.loads(out.read_text())) == 5
    assert not (tmp_path / "cache").exists()
    assert not Path(config.output_dir).exists()
