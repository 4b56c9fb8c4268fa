"""Training a preference model: what it writes, what changes nothing (resuming, processes), what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.config.schema import ConfigError, PreferenceModelConfig, load_config, parse_config, save_config
from diffalign.contrib.step_aware import world_judge as judge
from diffalign.contrib.step_aware.batch import decoded_predictions
from diffalign.contrib.step_aware.build import PreferenceRun, _as_sampled, _needs_x0
from diffalign.contrib.step_aware.loss import preference_loss
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError, Interrupted
from diffalign.models.loading.base import load_base
from diffalign.rewards import ScorerError, load_scorer
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.checkpoints.final_weights import is_finished
from diffalign.training.processes import make_accelerator
from diffalign.training.run import build_run, run_training
from diffalign.training.settle import with_precision
from diffalign.training.trainable import TrainingError
from tests.invariants.pool import Pool
from tests.invariants.test_processes import in_two

Make = Callable[..., PreferenceModelConfig]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP for 16-pixel images, with a tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    judge.untrained(0).save_pretrained(folder)
    judge.words().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, tiny_sd: Path, pair_folder: Path, clip_folder: Path) -> Make:
    """`make({"section.key": value})`: a four-step run on a tiny base; its steps go over the end of the twelve pairs."""

    def config(overrides: dict[str, object] | None = None) -> PreferenceModelConfig:
        tree: dict[str, dict] = {
            "model": {"pretrained_model_name_or_path": str(tiny_sd)},
            "preference_model": {"pretrained_model_name_or_path": str(clip_folder)},
            "data": {"path": str(pair_folder), "resolution": 32},
            "training": {
                "max_train_steps": 4,
                "train_batch_size": 4,
                "learning_rate": 1e-4,
                "lr_scheduler": "linear",
                "adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
                "logging_steps": 1,
                "report_to": "none",
                "mixed_precision": "no",  # on every device
            },
        }
        top: dict[str, object] = {"output_dir": str(tmp_path / "out")}
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            if key:
                tree[section][key] = value
            else:
                top[section] = value
        return parse_config({**tree, **top})

    return config


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "preference_model/model.safetensors")


def test_a_run_writes_a_scorer_its_settings_and_its_metrics(make: Make) -> None:
    config = make()
    run_training(config)
    out = Path(config.output_dir)
    assert load_config(out / "config.yaml") == with_precision(config, make_accelerator(config).device)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "preference_model",
        "run.html",
        "run.json",
        "timing.jsonl",
    }
    assert is_finished(out)
    scorer = load_scorer(f"step-aware={out}")
    picture = Image.new("RGB", (32, 32), "red")
    at = scorer.score([picture] * 2, ["a red circle"] * 2, torch.tensor([0, 999]))
    assert at[0] != at[1]  # the timestep has begun to matter


def test_the_first_loss_is_the_clips(make: Make, clip_folder: Path) -> None:
    """From the same images by PickScore's scorer: softplus of the wrong way round, one weight a prompt."""
    config = make({"training.max_train_steps": 1, "training.train_batch_size": 12})
    run = build_run(config, make_accelerator(config))
    batch = next(run.source.batches())
    pictures, t = decoded_predictions(batch, run.networks, run.base.vae, 5.0)
    scorer = load_scorer(f"pickscore={clip_folder}")
    # PickScore's own way of shrinking images is another
    small = torch.nn.functional.interpolate(pictures.flatten(0, 1), (16, 16), mode="bicubic", align_corners=False)
    small = (small.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    images = [Image.fromarray(p) for p in small.numpy()]
    prompts = [run.table.prompts[run.table.ids.index(name)] for name in batch.ids]
    scores = scorer.score(images, prompts * 2).unflatten(0, (2, -1))
    expected = torch.nn.functional.softplus(scores[1] - scores[0]).mean()  # three pairs a prompt: equal weights
    run_training(config)
    (line,) = metrics(config.output_dir)
    assert line["loss"] == pytest.approx(float(expected), abs=2e-3)  # images rounded to bytes here
    assert line["margin"] == pytest.approx(float((scores[0] - scores[1]).mean()), abs=2e-3)
    assert line["accuracy"] == pytest.approx(float((scores[0] > scores[1]).float().mean()), abs=1 / 12 + 1e-6)
    assert line["ties"] == 0.0
    quarters = {q: int((t * 4 // 1000 == q).sum()) for q in range(4)}
    assert sum(line[f"accuracy/q{q + 1}"] * n for q, n in quarters.items() if n) / 12 == pytest.approx(line["accuracy"])


def test_a_run_that_a_signal_ended_goes_on_as_if_it_had_not(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(make({"output_dir": str(tmp_path / "whole")}))
    parts = {"output_dir": str(tmp_path / "parts")}
    step, count = PreferenceRun.step, itertools.count(1)

    def signalled(*of: Any) -> None:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(*of)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceRun, "step", signalled)
        with pytest.raises(Interrupted, match=r"SIGTERM after step 2 of 4; .*checkpoint-2"):
            run_training(make(parts))
    parts["training.checkpointing_steps"] = 4
    run_training(make({**parts, "training.resume_from_checkpoint": "latest"}))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    at_two = weights(tmp_path / "parts/checkpoint-2")
    assert any(not torch.equal(at_two[name], one[name]) for name in one)
    with pytest.raises(CheckpointError, match="written at 4 pairs a step, this run takes 2"):
        run_training(make({**parts, "training.resume_from_checkpoint": "latest", "training.train_batch_size": 2}))
    with pytest.raises(ConfigError, match=r"preference_model.guidance_scale: was 5.0, is 1.0"):
        run_training(
            make({**parts, "training.resume_from_checkpoint": "latest", "preference_model.guidance_scale": 1.0})
        )


def same_updates(
    make: Make,
    folder: Path,
    pool: Pool,
    ways: dict[str, dict[str, object]],
    stored: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """Two steps of four pairs have the same weights and metrics in one batch and in all `ways`, by changed settings.

    The way called processes runs in two. `stored` reads the weights of a run.
    """
    shared = {"training.max_train_steps": 2, "training.train_batch_size": 1, "data.max_pairs": 7}
    runs = {}
    for name, changes in {"batch": {"training.train_batch_size": 4}, **ways}.items():
        config = make({**shared, **changes, "output_dir": str(folder / name)})
        if name == "processes":
            in_two(pool, config, folder / "processes.yaml")
        else:
            run_training(config)
        runs[name] = stored(folder / name), metrics(folder / name)
    state, lines = runs.pop("batch")
    for others, their_lines in runs.values():
        for name in state:
            torch.testing.assert_close(others[name], state[name], rtol=0, atol=2e-6)
        for a, b in zip(lines, their_lines, strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def test_accumulation_and_processes_give_the_update_of_one_batch(make: Make, tmp_path: Path, pool: Pool) -> None:
    """Prompts that pairs share are weighed over the step, so a weight normalised over a micro-batch shows here."""
    steps = "training.gradient_accumulation_steps"
    same_updates(make, tmp_path, pool, {"accumulated": {steps: 4}, "processes": {steps: 2}}, weights)


def test_another_scorers_verdict_is_in_force(make: Make, clip_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """By the CLIP itself with a gap that nothing reaches, every pair is a tie."""
    config = make(
        {
            "training.max_train_steps": 1,
            "preference_model.relabel_with": f"pickscore={clip_folder}",
            "preference_model.relabel_gap": 1.0,
        }
    )
    run_training(config)
    (line,) = metrics(config.output_dir)
    assert line["ties"] == 1.0
    assert "accuracy" not in line
    assert "ties within 1 of probability" in capsys.readouterr().out


def test_bf16_computes_nearly_the_same_from_float32_weights(make: Make, tmp_path: Path) -> None:
    lines = {}
    for precision in ("no", "bf16"):
        config = make(
            {
                "training.max_train_steps": 1,
                "training.mixed_precision": precision,
                "output_dir": str(tmp_path / precision),
            }
        )
        run_training(config)
        assert {x.dtype for x in weights(config.output_dir).values()} == {torch.float32}
        (lines[precision],) = metrics(config.output_dir)
    assert lines["bf16"]["loss"] == pytest.approx(lines["no"]["loss"], rel=0.05)  # bf16 has 8 bits
    assert lines["bf16"]["loss"] != lines["no"]["loss"]


def test_a_run_that_diverges_stops_and_writes_no_weights(make: Make) -> None:
    config = make({"training.learning_rate": 100.0, "training.lr_scheduler": "constant"})
    with pytest.raises(TrainingError, match=r"lower training.learning_rate"):
        run_training(config)
    assert not (Path(config.output_dir) / "preference_model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference_model.guidance": 3.0}, r"preference_model.guidance: unknown key; did you mean 'guidance_scale'"),
        ({"objective": {"name": "dpo"}}, r"objective: unknown key"),
        ({"training.ema_decay": 0.9}, r"training.ema_decay: the run of a preference model has no such setting"),
        ({"data.cache_dir": "cache"}, r"data.cache_dir: the run of a preference model has no such setting"),
        ({"training.mixed_precision": "fp16"}, r"trains in bf16"),
        ({"preference_model.relabel_gap": 2.0}, r"preference_model.relabel_gap: .*less than or equal to 1"),
    ],
)
def test_what_does_not_belong_is_refused(make: Make, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(change)


def test_a_run_that_was_killed_before_its_final_weights_writes_them(make: Make) -> None:
    config = make({"training.checkpointing_steps": 4})
    run_training(config)
    out = Path(config.output_dir)
    whole, tokenizer = weights(out), (out / "preference_model/tokenizer.json").read_bytes()
    shutil.rmtree(out / "preference_model")
    (out / "manifest.json").unlink()
    run_training(make({"training.checkpointing_steps": 4, "training.resume_from_checkpoint": "latest"}))
    assert is_finished(out)
    assert all(torch.equal(weights(out)[name], value) for name, value in whole.items())
    assert (out / "preference_model/tokenizer.json").read_bytes() == tokenizer
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


def test_a_longer_run_continues_along_its_own_schedule(make: Make, tmp_path: Path) -> None:
    """Two steps of a schedule of two, then of one of four: the rate of each later step is that of a run of four."""
    parts = {"output_dir": str(tmp_path / "parts"), "training.checkpointing_steps": 2}
    run_training(make({**parts, "training.max_train_steps": 2}))
    run_training(make({**parts, "training.resume_from_checkpoint": "latest"}))
    run_training(make({"output_dir": str(tmp_path / "whole")}))
    rates = [[line["lr"] for line in metrics(tmp_path / name)[2:]] for name in ("parts", "whole")]
    assert rates[0] == rates[1]


def test_a_checkpoint_of_an_earlier_version_is_read(make: Make, tmp_path: Path) -> None:
    """Those of preference models had neither scaler nor EMA nor a count of forwards."""
    parts = {"output_dir": str(tmp_path / "parts"), "training.checkpointing_steps": 2}
    run_training(make(parts))
    whole, old = weights(tmp_path / "parts"), tmp_path / "parts/checkpoint-2"
    state = torch.load(old / "training_state.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k not in ("scaler", "ema", "unet_forwards", "manifest")},
               old / "training_state.pt")  # fmt: skip
    (old / "manifest.json").unlink()
    run_training(make({**parts, "training.resume_from_checkpoint": "checkpoint-2"}))
    assert all(torch.equal(weights(tmp_path / "parts")[name], value) for name, value in whole.items())


def test_an_open_base_is_refused(make: Make, tiny_sd: Path) -> None:
    with pytest.raises(DiffalignError, match=r"base: .* was given as an object; leave base out"):
        run_training(make(), base=load_base(str(tiny_sd)))


def test_what_is_missing_is_named_before_anything_is_trained(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="hf download nobody/no-such-clip"):
        run_training(make({"preference_model.pretrained_model_name_or_path": "nobody/no-such-clip"}))
    with pytest.raises(ScorerError, match="did you mean 'pickscore'"):
        run_training(make({"preference_model.relabel_with": "pikscore"}))
    assert not (tmp_path / "out").exists()


def test_noise_prediction_at_zero_terminal_snr_is_refused() -> None:
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    v = SimpleNamespace(schedule=NoiseSchedule.from_config({**config, "prediction_type": "v_prediction"}), source="x")
    _needs_x0(v)
    eps = SimpleNamespace(schedule=NoiseSchedule.from_config(config), source="x")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        _needs_x0(eps)


def test_the_base_receives_what_a_sampler_gives() -> None:
    geometry = torch.tensor([[[700, 1200, 3, 40, 512, 512]]])
    assert _as_sampled(geometry).tolist() == [[[512, 512, 0, 0, 512, 512]]]


def test_the_command_line_trains_checks_and_does_not_encode(make: Make, tmp_path: Path, capsys) -> None:
    config = make({"training.max_train_steps": 1})
    save_config(config, tmp_path / "spm.yaml")
    main(["check", str(tmp_path / "spm.yaml")])
    printed = capsys.readouterr().out
    assert "step-aware preference model from" in printed
    assert "dry run  1 pair: loss" in printed
    assert not Path(config.output_dir).exists()
    with pytest.raises(SystemExit):
        main(["encode", str(tmp_path / "spm.yaml")])
    assert "no latent cache" in capsys.readouterr().err
    main(["train", str(tmp_path / "spm.yaml")])
    assert weights(config.output_dir)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "spm.yaml")])
    assert "already contains a run" in capsys.readouterr().err
    main(["train", str(tmp_path / "spm.yaml"), "overwrite_output_dir=true", "seed=1"])
    assert load_config(Path(config.output_dir) / "config.yaml").seed == 1


def test_labels_move_the_scores_their_way() -> None:
    """One gradient step on the loss raises the preferred score and lowers the other; a tie draws both together."""
    scores = torch.tensor([[0.0, 2.0], [1.0, 0.0]], requires_grad=True)
    preference_loss(scores, torch.tensor([[1.0, 0.5], [0.0, 0.5]])).sum().backward()
    assert (scores.grad.sign() == torch.tensor([[-1.0, 1.0], [1.0, -1.0]])).all()
