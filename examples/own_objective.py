"""Write an objective of your own and train with it: a hinge in place of Diffusion-DPO's log σ.

    python examples/own_objective.py

An objective chooses the points at which the networks are evaluated (here `OnSharedNoise`: one timestep and one noise
for each pair), and computes the loss of each pair from the errors of policy and reference there (`score`). A config
names it `objective: {name: "own_objective:HingeDPO", beta: 2000}`, with the folder of this file on PYTHONPATH.
"""

from dataclasses import dataclass
from typing import ClassVar

from diffalign import Evidence, Score, Trainer, TrainingArguments, load_pairs
from diffalign.objectives.base import OnSharedNoise, dpo_logit
from diffalign.world import base_path, pairs_path


@dataclass(frozen=True)
class HingeDPO(OnSharedNoise):
    """max(0, 1 - logit): a pair has no gradient once its logit is above 1 (SLiC's loss on Diffusion-DPO's logit)."""

    beta: float = 2000.0  # scale of the logit, as in Diffusion-DPO

    name: ClassVar[str] = "hinge_dpo"
    paper: ClassVar[str] = "Zhao et al., SLiC-HF, arXiv 2305.10425"

    def score(self, evidence: Evidence) -> Score:
        """The hinge of each pair's logit."""
        logit, metrics = dpo_logit(evidence, self.beta)
        return Score(loss=(1 - logit).clamp(min=0), logit=logit, metrics=metrics)


def main(output_dir: str = "runs/examples/own_objective", steps: int = 20) -> dict[str, float]:
    """Trains a LoRA with the hinge and returns the last metrics."""
    trainer = Trainer(
        model=base_path(),
        objective=HingeDPO(beta=2000.0),
        train_dataset=load_pairs(pairs_path(), resolution=16),
        args=TrainingArguments(
            output_dir=output_dir, max_train_steps=steps, train_batch_size=16, learning_rate=1e-4, report_to="none"
        ),
    )
    return trainer.train()


if __name__ == "__main__":
    print(main())
