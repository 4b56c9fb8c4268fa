"""Ranges, thresholds and weights in another scorer's unit are refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.config.schema import parse_config
from diffalign.data.row import DataError
from diffalign.objectives import SmPO
from diffalign.rewards import declared_span, scorer_names
from diffalign.training.inspect.score_units import check_units
from diffalign.training.open_data import open_table
from tests.data.helpers import pick_rows, write_parquet

PICKSCORE = {"score_low": 11.543526500463486, "score_high": 28.201571106910706}


def config(tmp_path: Path, objective: dict[str, Any], data: dict[str, Any] | None = None, **top: Any) -> Any:
    return parse_config(
        {
            "output_dir": str(tmp_path / "out"),
            "model": {"pretrained_model_name_or_path": "x"},
            "objective": objective,
            "data": {"path": str(tmp_path / "pairs.parquet"), "resolution": 16, **(data or {})},
            **top,
        }
    )


def scores(file: Path, ids: list[str], gap: float, span: tuple[float, float] | None) -> str:
    head = {"scorer": "s"} | ({} if span is None else {"span": span})
    rows = [{"id": name, "score_0": 21.0 + gap * (1 + i % 3), "score_1": 21.0} for i, name in enumerate(ids)]
    file.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    return str(file)


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    write_parquet(tmp_path / "pairs.parquet", pick_rows(8))
    return list(open_table(config(tmp_path, {"name": "inpo"})).ids)


def test_a_cosines_range_is_refused_for_a_scorer_that_declares_another(tmp_path: Path, ids: list[str]) -> None:
    """W of half a point of PickScore would be 9.05 in place of .15."""
    data = {"scores": scores(tmp_path / "s.jsonl", ids, 0.5, declared_span("pickscore"))}
    words = r"score_low = 0\.115435.*s\.jsonl lie in 11\.5435 … 28\.2016.*100 times.*score_low: 11\.543526500463486"
    with pytest.raises(DataError, match=words):
        open_table(config(tmp_path, {"name": "smpo"}, data))
    table = open_table(config(tmp_path, {"name": "smpo", **PICKSCORE}, data))
    assert 10 * abs(table.scores(0)[0] - table.scores(0)[1]) / (2 * 16.658) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(("gap", "words"), [(0.5, "6 ranges: .* at their end"), (1e-7, "nearly all be 0")])
def test_scores_of_unknown_origin_are_judged_by_their_gaps(
    tmp_path: Path, ids: list[str], gap: float, words: str
) -> None:
    data = {"scores": scores(tmp_path / "s.jsonl", ids, gap, None)}
    with pytest.raises(DataError, match=rf"score_high = 0\.282016.*{words}.*another unit.*pickscore: 11\.5435"):
        open_table(config(tmp_path, {"name": "smpo"}, data))
    scores(tmp_path / "s.jsonl", ids, 0.01, None)  # a cosine's
    assert open_table(config(tmp_path, {"name": "smpo"}, data)).scores(0) is not None


def test_axes_of_other_units_want_weights(tmp_path: Path, ids: list[str]) -> None:
    one = scores(tmp_path / "pick.jsonl", ids, 0.5, declared_span("pickscore"))
    two = scores(tmp_path / "hps.jsonl", ids, 0.005, declared_span("hpsv2.1"))
    with pytest.raises(DataError, match=r"hps\.jsonl span 0\.25 and those of .*pick\.jsonl 16\.7.*weight: 66\.6"):
        open_table(config(tmp_path, {"name": "inpo"}, {"scores": [one, two]}))
    weighted = {"a": one, "b": {"file": two, "weight": 66.0}}
    assert len(open_table(config(tmp_path, {"name": "inpo"}, {"scores": weighted}))) == len(ids)


@pytest.mark.parametrize(
    ("source", "objective", "words"),
    [
        ({"name": "rollout", "scorer": "hpsv2.1"}, {"name": "spo"}, r"threshold = 0\.3.*0\.619.*hpsv2\.1 lie in 0\.15"),
        ({"name": "online_pairs", "scorer": "hpsv2.1", "min_gap": 0.5}, {"name": "dpo"}, r"min_gap = 0\.5.*0\.15 … 0"),
        (
            {"name": "online_pairs", "scorer": "pickscore"},
            {"name": "smpo"},
            r"pickscore lie in 11\.5.*score_low",
        ),
        ({"name": "rollout", "scorer": "pickscore"}, {"name": "spo"}, None),
        ({"name": "online_pairs", "scorer": "pickscore", "min_gap": 0.5}, {"name": "smpo", **PICKSCORE}, None),
    ],
)
def test_sources_are_checked_by_what_their_scorer_declares(
    source: dict[str, Any], objective: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    made = config(tmp_path, objective, source=source)
    if words is None:
        check_units(made.objective, made.source, [], None)
        return
    with pytest.raises(DataError, match=words):
        check_units(made.objective, made.source, [], None)


def test_built_in_scorers_declare_where_their_scores_lie() -> None:
    silent = {"world-accuracy", "emoji-accuracy", "world-step-aware"}  # 0 or 1; a function whose scorer is made later
    silent |= {"mps", "remote", "latent-judge", "world-latent-judge"}  # no range is published; the server says it
    assert {name for name in scorer_names() if declared_span(name) is None} == silent
    low, high = declared_span("pickscore") or (0, 0)
    assert (low, high) == pytest.approx((100 * SmPO().score_low, 100 * SmPO().score_high), rel=1e-12)
