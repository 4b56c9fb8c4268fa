"""What the votes say: progress, agreement, which side was preferred, and the table of a blind comparison.

The table is hidden until every annotator who began has judged everything: who looks at it earlier may stop when it is
favourable, and then its interval is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.evaluation.by_eye.agreement import Agreement, agreements
from diffalign.evaluation.by_eye.plan import Kind, VotePlan, read_plan
from diffalign.evaluation.by_eye.votes import POOLED, Event, read_votes
from diffalign.evaluation.report import aligned, interval_text, without_nan
from diffalign.evaluation.stats import Estimate, clustered_rate

VALUES = {"first": 0.0, "second": 1.0, "tie": 0.5}


@dataclass(frozen=True)
class Judged:
    """How far an annotator came."""

    annotator: str
    judged: int  # skipped ones among them
    skipped: int
    left: Estimate | None  # share of the votes that prefer an image for the one on the left; None without such a vote


@dataclass(frozen=True)
class WinRate:
    """A tuned model against the base, by votes; ties count as half a win."""

    model: str
    annotator: str
    wins: int
    ties: int
    losses: int
    skipped: int
    rate: Estimate


@dataclass(frozen=True)
class Outcome:
    """Everything that a folder of votes says."""

    kind: Kind
    comparisons: int
    prompts: int
    identical: int
    progress: list[Judged]
    agreement: list[Agreement]
    win_rates: list[WinRate]  # empty where nobody has begun, and for pairs that are labelled

    @property
    def done(self) -> bool:
        """Whether somebody has judged, and everybody who began has judged everything."""
        return bool(self.progress) and all(each.judged == self.comparisons for each in self.progress)

    def text(self, *, reveal: bool = False) -> str:
        """The report. The table of a blind comparison is in it once all is judged, or with `reveal`."""
        blocks = [self._progress(), self._agreement()]
        if self.kind == "blind" and (self.done or reveal):
            blocks.append(self._table())
        return "\n\n".join(block for block in blocks if block)

    def to_json(self) -> str:
        """Indented JSON; a number that does not exist is null."""
        return json.dumps(without_nan(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _progress(self) -> str:
        head = f"{self.comparisons} pairs of {self.prompts} prompts"
        rows = [["annotator", "judged", "skipped", "left preferred"]]
        rows += [
            [each.annotator, str(each.judged), str(each.skipped), interval_text(each.left, 2) if each.left else "-"]
            for each in self.progress
        ]
        return "\n".join([head, *aligned(rows)]) if self.progress else f"{head}; nobody has judged any"

    def _agreement(self) -> str:
        rows = [["annotators", "pairs", "equal votes", "kappa"]]
        for each in self.agreement:
            numbers = [interval_text(each.agreement, 2), interval_text(each.kappa, 2)] if each.pairs else ["-", "-"]
            rows.append([" ".join(each.annotators), str(each.pairs), *numbers])
        kinds = " and ".join(dict.fromkeys(each.kind for each in self.agreement))
        return "\n".join([f"agreement ({kinds})", *aligned(rows)]) if self.agreement else ""

    def _table(self) -> str:
        rows = [["model", "annotator", "win/tie/loss", "win rate", "skipped"]]
        for each in self.win_rates:
            counts = f"{each.wins}/{each.ties}/{each.losses}"
            rate = interval_text(each.rate, 3) if each.wins + each.ties + each.losses else "-"
            rows.append([each.model, each.annotator, counts, rate, str(each.skipped)])
        head = "against the base, by votes; [95% interval, clustered by prompt]; a tie is half a win"
        if self.identical:
            head += f"; {self.identical} equal images count as ties"
        return "\n".join([head, *aligned(rows)])


def read_outcome(folder: Path) -> Outcome:
    """The outcome of a folder of votes, as far as it goes. Raises MissingFileError and DiffalignError."""
    return outcome(read_plan(folder), read_votes(folder))


def outcome(plan: VotePlan, votes: Mapping[str, Mapping[str, Event]]) -> Outcome:
    """What the votes (by annotator and pair) on a plan say. Raises DiffalignError for a vote on another pair."""
    prompts = {each.id: each.prompt for each in plan.comparisons}
    for name, some in votes.items():
        if odd := next((pair for pair in some if pair not in prompts), None):
            raise DiffalignError(f"{name} has a vote on {odd!r:.60}, which is not in the plan; restore both files")
    return Outcome(
        kind=plan.kind,
        comparisons=len(plan.comparisons),
        prompts=len({each.prompt for each in (*plan.comparisons, *plan.identical)}),
        identical=len(plan.identical),
        progress=[_progress(name, some, prompts) for name, some in votes.items()],
        agreement=agreements(votes, prompts),
        win_rates=_win_rates(plan, votes) if plan.kind == "blind" else [],
    )


def _progress(name: str, votes: Mapping[str, Event], prompts: Mapping[str, str]) -> Judged:
    decided = [event for event in votes.values() if event.vote in ("first", "second")]
    left = [float((event.vote == "second") == bool(event.left)) for event in decided]
    bias = clustered_rate(left, [prompts[event.pair] for event in decided]) if decided else None
    return Judged(name, len(votes), sum(event.vote == "skip" for event in votes.values()), bias)


def _win_rates(plan: VotePlan, votes: Mapping[str, Mapping[str, Event]]) -> list[WinRate]:
    """Of each model: all votes together and, where there are several, each annotator's."""
    models = dict.fromkeys(each.names[1] for each in (*plan.comparisons, *plan.identical))
    groups: dict[str, list[str]] = {POOLED: list(votes)} if len(votes) > 1 else {}
    groups |= {name: [name] for name in votes}
    return [
        _win_rate(plan, model, name, [votes[each] for each in some])
        for model in models
        for name, some in groups.items()
    ]


def _win_rate(plan: VotePlan, model: str, name: str, votes: list[Mapping[str, Event]]) -> WinRate:
    values, prompts, skipped = [], [], 0
    for some in votes:
        for each in plan.comparisons:
            if each.names[1] != model or each.id not in some:
                continue
            if some[each.id].vote == "skip":
                skipped += 1
                continue
            values.append(VALUES[some[each.id].vote])
            prompts.append(each.prompt)
        equal = [each.prompt for each in plan.identical if each.names[1] == model]
        values += [0.5] * len(equal)
        prompts += equal
    rate = clustered_rate(values, prompts) if values else Estimate(float("nan"), float("nan"), float("nan"))
    return WinRate(model, name, values.count(1.0), values.count(0.5), values.count(0.0), skipped, rate)
