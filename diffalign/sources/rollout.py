"""SPO's source (Liang et al., arXiv 2406.04314): the policy samples, a scorer compares siblings, their steps are pairs.

    every round     branching chains from each of its prompts (`branching.py`), by the policy as it is
    a pair          one step of two siblings whose scores differ by enough: x_t, x' of chosen and rejected, t, t'

All pairs of a round are gathered, shuffled, split equally over the processes and used once (`stream.py`); then the
policy, by then so many updates further, samples the next round.

Differs from the released code (RockeyCoss/SPO):
- pairs that do not fill a step are carried into the next round and counted (there, a rank's last batch is smaller);
- the last level is t = 0 in every schedule; the release relies on SD's `set_alpha_to_one: false` for that. A step into
  a clean image has no density.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from diffalign.errors import DiffalignError
from diffalign.objectives.base import Compared
from diffalign.sources.base import Context, Settings, Source, at_least
from diffalign.sources.branching import Rule


@dataclass(frozen=True)
class BranchingRollout:
    """Each round: sampling steps of the policy itself, judged as they are made."""

    scorer: str  # `diffalign list scorers`, NAME=PATH or package.module:Class; of images, or of noisy latents
    rule: Rule = "every_step"  # where chains branch: every_step as the release's SD1.5, inner_steps as its SDXL
    num_candidates: int = 4  # siblings of a pool; the released code: 4 for SD1.5, 2 for SDXL
    inner_steps: int = 0  # of rule inner_steps: steps between a branching and its judgement; the released code: 3
    sampling_steps: int = 20  # of a chain; the released code
    plain_steps: int = 4  # before the first branching, which is then at t = 751 of 20 steps; the released code
    eta: float = 1.0  # share of DDPM's noise in every step, in (0, 1]; the released code
    guidance_scale: float = 5.0  # of sampling; 1: none. The released code
    threshold: float = 0.3  # a pair is valid if tanh(score gap / 2) exceeds it; the released code: SD1.5 .3, SDXL .4
    threshold_max: float | None = (
        None  # then the threshold is linear in σ of the step: `threshold` to this; arXiv 2502.01051
    )
    prompts_per_round: int = 40  # over all processes; the released code: SD1.5 40, SDXL 8
    generation_batch_size: int = 40  # siblings sampled, decoded and scored at a time, per process; the released code
    keep_rounds: bool = False  # keep every round's file instead of those that a checkpoint needs

    name: ClassVar[str] = "rollout"
    paper: ClassVar[str] = (
        "Liang et al., Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization, arXiv 2406.04314"
    )
    data: ClassVar[Literal["prompts", "winners"]] = "prompts"
    gives: ClassVar[Compared] = "steps"
    own_reference: ClassVar[bool] = False
    same_in_objective: ClassVar[dict[str, str]] = {"eta": "eta", "guidance_scale": "guidance"}

    def __post_init__(self) -> None:
        if self.rule not in ("every_step", "inner_steps"):
            raise DiffalignError(f"rule = {self.rule!r}: allowed are every_step and inner_steps")
        if self.inner_steps < 0 or (self.inner_steps and self.rule == "every_step"):
            raise DiffalignError(f"inner_steps = {self.inner_steps}: must be 0 with rule every_step, else 0 or more")
        if not 0 <= self.plain_steps < self.sampling_steps:
            raise DiffalignError(
                f"plain_steps = {self.plain_steps}: must be at least 0 and below sampling_steps = {self.sampling_steps}"
            )
        if not 0 < self.eta <= 1:
            raise DiffalignError(f"eta = {self.eta}: must be in (0, 1]; without noise all siblings are equal")
        if not 1 <= self.guidance_scale < float("inf"):
            raise DiffalignError(
                f"guidance_scale = {self.guidance_scale}: must be finite and at least 1, which is none"
            )
        if not 0 <= self.threshold < 1:
            raise DiffalignError(f"threshold = {self.threshold}: must be in [0, 1), the tanh of half a score gap")
        self._check_threshold_max()
        at_least("num_candidates", self.num_candidates, 2)
        at_least("prompts_per_round", self.prompts_per_round, 1)
        at_least("generation_batch_size", self.generation_batch_size, 1)

    def _check_threshold_max(self) -> None:
        if self.threshold_max is None:
            return
        if not self.threshold < self.threshold_max < 1:
            raise DiffalignError(
                f"threshold_max = {self.threshold_max}: must be above threshold = {self.threshold} and below 1, "
                "or null for one threshold"
            )
        if self.rule != "every_step":
            raise DiffalignError(
                f"threshold_max = {self.threshold_max}: with rule {self.rule} a comparison is about several steps, "
                "which have no one σ; set it to null"
            )

    def build(self, context: Context) -> Source:
        """The source of a run, with its scorer loaded. Raises SourceError for a context that does not fit."""
        from diffalign.rewards import load_judge
        from diffalign.sources.chains import Chains
        from diffalign.sources.rounds import fingerprint
        from diffalign.sources.stream import RoundPairs, RoundSpec

        chains = Chains(self, context, load_judge(self.scorer, str(context.device)))
        key = fingerprint(self, context.table.identity, context.spec.run_seed, context.resolution)
        return RoundPairs(context, RoundSpec(key, self.prompts_per_round, keep_rounds=self.keep_rounds), chains.roll)

    def small(self) -> Settings:
        """Two prompts, chains of four steps, and every difference counts."""
        return replace(
            self,
            sampling_steps=4,
            plain_steps=1,
            inner_steps=min(self.inner_steps, 1),
            threshold=0.0,
            threshold_max=None,
            prompts_per_round=2,
        )
