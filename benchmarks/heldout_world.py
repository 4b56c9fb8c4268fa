"""What held-out pairs are worth on the embedded world, where the true reward is known.

    python benchmarks/heldout_world.py --out runs/heldout                 # every part, then the table
    python benchmarks/heldout_world.py --out runs/heldout --part early
    python benchmarks/heldout_world.py --out runs/heldout --table

early     Diffusion-DPO on 128 pairs at three times the learning rate of training_configs/world/dpo.yaml, with 128 other
          pairs of other prompts held out, and the weights averaged (EMA). A run ends where the held-out score is worse
          than its best four times in a row, or images for 24 further prompts have lost too much diversity or
          faithfulness; its weights are the latest that are within these limits and not worse. Then it is resumed
          without this to the full length, and averages along the way and the final weights of early stopping are
          compared with the base.
shuffled  the packaged run on pairs whose labels were dealt out again at random, a share of them held out.
flipped   a tenth of the labels is swapped; `diffalign data doubtful` ranks the pairs of a run on them, by its final
          weights alone and by its checkpoints as well.
ceiling   how many of the same swapped labels judges of known accuracy find, who see the true difference of rewards and
          normal noise; trains nothing.

A finished part of a seed is a file in OUT and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from diffalign.arena.board import guards
from diffalign.config.schema import load_config, packaged_config
from diffalign.data.heldout import prompt_key, split_by_prompt
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring
from diffalign.io.manifest import read_manifest
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.checkpoints.final_weights import is_finished
from diffalign.training.heldout.doubtful import doubtful_pairs
from diffalign.training.run import environment, run_training
from diffalign.world import base_path, pairs_path
from diffalign.world.captions import prompts
from diffalign.world.pairs import PairRecipe, make_pairs, write_pairs

PAIRS, STEPS, EVERY, POINTS = 128, 200, 10, 4  # of the part `early`
PATIENCE, LEAST_DIVERSITY, LEAST_FAITHFULNESS = 4, 0.87, -0.025  # tighter than the guards, .85 and -.03
GUARD_IMAGES = 8  # of each prompt
EMA = 0.95  # of each step: an average of about two measurements' steps
EARLIER = {  # results of earlier rules; the first two on 24 prompts x 4 images
    "early_by_score": "by score alone",  # commit 205288d: 16 points, patience 4, the best mean of 3 scores, no images
    "early_by_diversity": "least diversity .87",  # commit bb91f51: of 24 prompts x 4 images
    "early_last_weights": "least diversity .88",  # commit 1f1f258: of the pairs' 40 prompts x 4 images
    "early_continue": "averaged weights, least diversity .87, patience 4 for what is worse",  # commit 11dd1d5
}
CHECKPOINTS = 40  # steps between those that are evaluated, beside the one at which early stopping ends
MEASURED = ("loss", "accuracy", "score", "diversity", "faithfulness")
SAMPLING = Sampling(num_inference_steps=20, guidance_scale=5.0, device="cpu")
PICTURES = 12  # of each prompt and model, as in the arena
FLIPPED_PAIRS, FLIPPED_STEPS, FLIPPED_SHARE = 2048, 400, 0.1  # of the part `flipped`
FIRST = (0.1, 0.2, 0.3)  # of the ranking, in which swapped labels are counted
JUDGES, JUDGED_TIMES = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0), 100  # shares of true labels; draws of the noise


class Averages(Callback):
    """Writes the averaged weights at each measurement, which checkpoints keep in their state alone."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_log(self, state: TrainingState) -> None:
        """Writes `step-N/unet`."""
        if state.step % EVERY == 0:
            with state.run.averaged_weights():
                (self.out / f"step-{state.step}").mkdir(parents=True, exist_ok=True)
                state.run.save_weights(self.out / f"step-{state.step}")


def run_config(out: Path, changes: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Trains the packaged config of Diffusion-DPO with changes."""
    changes = [f"output_dir={out}", "training.report_to=none", *changes]
    run_training(load_config(packaged_config("world/dpo.yaml"), changes), callbacks=callbacks)


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of a run that have a measurement of held-out pairs."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "heldout/loss" in line]


def early_pairs(out: Path, seed: int) -> None:
    """Writes the pairs of a seed: 128 to train on, others for each seed, and the held-out ones, the same for all."""
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(pairs_path())
    train, heldout = split_by_prompt(rows["caption"].to_pylist(), PAIRS / len(rows), seed=0)
    if (seed + 1) * PAIRS > len(train):  # the packaged pairs are used up; the same recipe makes more after them
        kept = {prompt_key(rows["caption"][i].as_py()) for i in heldout}
        more = pq.read_table(write_pairs(out / "more.parquet", PairRecipe(4 * len(rows), 0), overwrite=True))
        assert more["image_0_uid"][: len(rows)].equals(rows["image_0_uid"]), "the packaged pairs are the first of these"
        rows, old = more, len(rows)
        train += [i for i in range(old, len(rows)) if prompt_key(rows["caption"][i].as_py()) not in kept]
    assert (seed + 1) * PAIRS <= len(train), f"no pairs are left for seed {seed}"
    pq.write_table(rows.take(train[seed * PAIRS : (seed + 1) * PAIRS]), out / "train.parquet")
    pq.write_table(rows.take(heldout), out / "heldout.parquet")


def early(out: Path, seed: int) -> dict[str, Any]:
    """Early stopping on few pairs, and what it would have missed."""
    early_pairs(out, seed)
    run, stopped, averages = out / "run", out / "stopped", out / "averages"
    guarded = out / "guarded.txt"  # no pair has these prompts, and nothing else is measured on them
    guarded.write_text("".join(f"{prompt}\n" for prompt in prompts("final")))
    shared = [
        f"seed={seed}",
        f"data.path={out / 'train.parquet'}",
        f"training.max_train_steps={STEPS}",
        "training.learning_rate=3e-5",
        f"training.ema_decay={EMA}",
        f"training.checkpointing_steps={EVERY}",
        "training.checkpoints_total_limit=null",
        f"validation.pairs={out / 'heldout.parquet'}",
        f"validation.points_per_pair={POINTS}",
        f"validation.num_inference_steps={SAMPLING.num_inference_steps}",
        "validation.on_plateau=continue",
        "validation.plateau_weights=latest",
        f"validation.guard_prompts={guarded}",
        f"validation.guard_images={GUARD_IMAGES}",
        "validation.faithfulness=world-accuracy",
        "validation.load_best_model_at_end=true",
    ]
    stops = [
        f"validation.early_stopping_patience={PATIENCE}",
        f"validation.least_diversity={LEAST_DIVERSITY}",
        f"validation.least_faithfulness={LEAST_FAITHFULNESS}",
    ]
    if not stopped.exists():
        begun = [*shared, "overwrite_output_dir=true", f"validation.pairs_every={EVERY}", *stops]
        run_config(run, begun, [Averages(averages)])
        stopped.mkdir()
        for name in ("unet", "metrics.jsonl", "health.jsonl", "manifest.json"):
            (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, stopped / name)
    ended_at = lines(stopped)[-1]["step"]
    resumed = [*shared, "training.resume_from_checkpoint=latest", f"validation.pairs_every={STEPS}"]
    run_config(run, resumed, [Averages(averages)])
    best = read_manifest(stopped)
    assert not isinstance(best, str)
    steps = sorted({*range(CHECKPOINTS, STEPS + 1, CHECKPOINTS), ended_at})
    names = {f"step{step}": averages / f"step-{step}" for step in steps}
    result = evaluate(
        str(base_path()),
        {"stopped": str(stopped / "unet"), **{name: str(path / "unet") for name, path in names.items()}},
        prompts("heldout"),
        range(PICTURES),
        scorers=Scoring(("world",), faithfulness="world-accuracy"),
        sampling=SAMPLING,
        out_dir=out / "evaluation",
    )
    models = {}
    for model in result.models:
        gain, accuracy, diversity = model.scores["world"].gain, model.faithfulness, model.diversity
        assert accuracy is not None
        assert diversity is not None
        models[model.name] = {
            "gain": [gain.value, gain.low, gain.high],
            "accuracy": accuracy.gain.value,
            "diversity": diversity.value,
            "guards": guards(accuracy.gain.value, diversity.value),
        }
    health = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    return {
        "ended_at": ended_at,
        "weights_of": best["step"],
        "heldout": [[line["step"], *(line[f"heldout/{name}"] for name in MEASURED)] for line in lines(stopped)],
        "training_accuracy": [[line["step"], line["rewards/accuracies"]] for line in lines(run)],
        "health": [[event["step"], event["rule"]] for event in health],
        "models": models,
    }


def shuffled(out: Path, seed: int) -> dict[str, Any]:
    """Random labels: the accuracy of held-out pairs, and what the run says."""
    pairs = write_pairs(out / "pairs.parquet", PairRecipe(1024, seed, shuffle_labels=True), overwrite=True)
    changes = ["training.max_train_steps=160", "validation.pairs=0.2", "validation.pairs_every=20"]
    changes += ["overwrite_output_dir=true"]
    run_config(out / "run", [f"seed={seed}", f"data.path={pairs}", *changes])
    names = ("heldout/accuracy", "heldout/accuracy/low", "heldout/accuracy/high", "rewards/accuracies")
    health = [json.loads(line) for line in (out / "run/health.jsonl").read_text().splitlines()]
    return {
        "heldout": [[line["step"], *(line[name] for name in names)] for line in lines(out / "run")],
        "health": [[event["step"], event["rule"], event["says"]] for event in health],
    }


def swapped_pairs(seed: int) -> set[int]:
    """The rows whose label is swapped."""
    return set(random.Random(1000 + seed).sample(range(FLIPPED_PAIRS), round(FLIPPED_SHARE * FLIPPED_PAIRS)))


def flipped(out: Path, seed: int) -> dict[str, Any]:
    """Swapped labels, and how many of them are among the first of the ranking."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run, n, swapped = out / "run", FLIPPED_PAIRS, swapped_pairs(seed)
    if not is_finished(run):
        write_pairs(out / "pairs.parquet", PairRecipe(n, seed), overwrite=True)
        rows = pq.read_table(out / "pairs.parquet")
        for name in ("label_0", "label_1"):
            values = [1 - x if i in swapped else x for i, x in enumerate(rows[name].to_pylist())]
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, name, pa.array(values, rows.schema.field(name).type))
        pq.write_table(rows, out / "pairs.parquet")
        changes = [f"training.max_train_steps={FLIPPED_STEPS}", "validation.pairs=0.1", "validation.pairs_every=50"]
        changes += ["validation.load_best_model_at_end=true", "overwrite_output_dir=true"]
        run_config(run, [f"seed={seed}", f"data.path={out / 'pairs.parquet'}", *changes])
    found = []
    for newest in (0, None):
        doubts = doubtful_pairs(run, points=8, batch_size=32, newest=newest)
        hits = [doubts.table.index.rows[doubt.index] in swapped for doubt in doubts.ranked]
        shares = {f"{share:g}": sum(hits[: round(share * len(hits))]) / sum(hits) for share in FIRST}
        found.append({"weights": list(doubts.weights), "found": shares})
    best = read_manifest(run)
    assert not isinstance(best, str)
    return {
        "pairs": n,
        "swapped": len(swapped),
        "rankings": found,
        "weights_of": best["step"],
        "heldout": [[line["step"], line["heldout/loss"], line["heldout/accuracy"]] for line in lines(run)],
    }


def ceiling(out: Path, seed: int) -> dict[str, Any]:
    """The shares that judges find, by how many of the true labels they agree with; 1 is the true reward itself."""
    pairs, swapped = make_pairs(PairRecipe(FLIPPED_PAIRS, seed)), swapped_pairs(seed)
    gaps = np.array([abs(pair.scores[0] - pair.scores[1]) for pair in pairs])
    wrong = np.isin(np.arange(len(pairs)), sorted(swapped))
    rng, found = np.random.default_rng(seed), {}
    for accuracy in JUDGES:
        noise, hits = noise_of(gaps, accuracy), np.zeros(len(FIRST))
        for _ in range(JUDGED_TIMES):
            margins = gaps + noise * rng.normal(size=len(gaps))
            order = np.argsort(np.where(wrong, -margins, margins), kind="stable")
            hits += [wrong[order[: round(share * len(order))]].sum() / len(swapped) for share in FIRST]
        found[f"{accuracy:g}"] = list(hits / JUDGED_TIMES)
    return {"swapped": len(swapped), "equal": int((gaps == 0).sum()), "found": found}


def noise_of(gaps: Any, accuracy: float) -> float:
    """The noise with which a judge of these true gaps agrees with a share of the true labels."""
    low, high = 0.0, 100.0
    for _ in range(60 if accuracy < 1 else 0):
        middle = (low + high) / 2
        right = torch.special.ndtr(torch.tensor(gaps / middle)).mean().item()
        low, high = (middle, high) if right > accuracy else (low, middle)
    return low


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "early": early,
    "shuffled": shuffled,
    "flipped": flipped,
    "ceiling": ceiling,
}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--table", action="store_true", help="run nothing; write the table of what is finished")
    a = p.parse_args()
    torch.set_num_threads(1)
    for part in () if a.table else a.part:
        for seed in a.seeds:
            file = a.out / f"{part}-{seed}.json"
            if not file.exists():
                found = PARTS[part](a.out / part / f"seed{seed}", seed)
                file.write_text(json.dumps({**found, "environment": environment()}, indent=2) + "\n")
    write_table(a.out)


def early_table(title: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """The lines of the part `early`."""
    text = [
        title,
        "",
        "| seed | weights | gain in reward | accuracy | diversity | guards |",
        "|---|---|---|---|---|---|",
    ]
    for seed, found in rows:
        for name, model in found["models"].items():
            which = f"step {name.removeprefix('step')}"
            if name == "stopped":
                which = f"**early stopping**: step {found['weights_of']}, ended at {found['ended_at']}"
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*model["gain"])
            broken = ", ".join(model["guards"]) or "none"
            text.append(
                f"| {seed} | {which} | {gain} | {model['accuracy']:+.3f} | {model['diversity']:.2f} | {broken} |"
            )
    return text


def write_table(out: Path) -> None:
    """OUT/result.json and OUT/table.md of the finished parts; prints the table."""
    done = {
        part: [(int(f.stem.rpartition("-")[2]), json.loads(f.read_text())) for f in sorted(out.glob(f"{part}-*.json"))]
        for part in (*PARTS, *EARLIER)
    }
    text = early_table("## Early stopping on 128 pairs", done["early"])
    for part, rule in EARLIER.items():
        if done[part]:
            text += ["", *early_table(f"## Early stopping on 128 pairs, an earlier rule: {rule}", done[part])]
    text += [
        "",
        "## Shuffled labels",
        "",
        "| seed | step | held-out accuracy | training accuracy |",
        "|---|---|---|---|",
    ]
    for seed, found in done["shuffled"]:
        for step, value, low, high, training in found["heldout"]:
            text.append(f"| {seed} | {step} | {value:.3f} [{low:.3f}, {high:.3f}] | {training:.2f} |")
        text += [f"| {seed} | {step} | *{rule}* | {says} |" for step, rule, says in found["health"]]
    text += [
        "",
        "## A tenth of the labels swapped",
        "",
        "| seed | pairs | ranked by | found in the first " + " | ".join(f"{share:.0%}" for share in FIRST) + " |",
        "|" + "---|" * (3 + len(FIRST)),
    ]
    for seed, found in done["flipped"]:
        for ranking in found["rankings"]:
            names = ", ".join(ranking["weights"]).replace(
                "final weights", f"final weights (step {found['weights_of']})"
            )
            shares = " | ".join(f"{value:.2f}" for value in ranking["found"].values())
            text.append(f"| {seed} | {found['pairs']} | {names} | {shares} |")
    text += ["", "## What judges of known accuracy find of them", ""]
    text += ["| seed | agrees with | found in the first " + " | ".join(f"{share:.0%}" for share in FIRST) + " |"]
    text += ["|" + "---|" * (2 + len(FIRST))]
    for seed, found in done["ceiling"]:
        for accuracy, values in found["found"].items():
            shares = " | ".join(f"{value:.2f}" for value in values)
            text.append(f"| {seed} | {float(accuracy):.0%} of the true labels | {shares} |")
    (out / "table.md").write_text("\n".join(text) + "\n")
    (out / "result.json").write_text(json.dumps(done, indent=2) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
