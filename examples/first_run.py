"""Tune a model on preference pairs and measure the gain.

    python examples/first_run.py

The model and the pairs are small and come with the package, so this runs on a laptop. For your own, replace the two
paths, e.g. by "stabilityai/stable-diffusion-xl-base-1.0" and a folder of pairs, and remove `resolution`.
"""

from diffalign import DiffusionDPO, FullFineTuning, Sampling, Trainer, TrainingArguments, load_pairs
from diffalign.world import base_path, pairs_path
from diffalign.world.captions import prompts


def main(output_dir: str = "runs/examples/first_run", steps: int = 100, seeds: int = 4) -> None:
    """Trains for `steps` optimiser steps and prints the table of gains on held-out prompts."""
    trainer = Trainer(
        model=base_path(),
        objective=DiffusionDPO(beta=2000.0),
        train_dataset=load_pairs(pairs_path(), resolution=16),
        tuning=FullFineTuning(),
        args=TrainingArguments(
            output_dir=output_dir, max_train_steps=steps, train_batch_size=32, learning_rate=1e-5, report_to="none"
        ),
    )
    trainer.train()
    result = trainer.evaluate(
        prompts("heldout"), range(seeds), scorers=["world"], sampling=Sampling(num_inference_steps=10)
    )
    print(result.table())


if __name__ == "__main__":
    main()
