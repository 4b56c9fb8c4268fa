"""The batch of a preference model: images as diffusers would decode them, labels, weights."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffalign.contrib.step_aware.batch import Labels, StepWeights, decoded_predictions
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.engine.random import integers, normal
from diffalign.models.loading.base import load_base
from diffalign.models.loading.encoder import Encoder
from diffalign.models.policy.networks import Networks
from diffalign.rewards import ScorerError
from diffalign.world.pairs import PairRecipe, write_pairs

TIES = (1, 4)  # rows without a preference


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    """Eight labelled pairs of the world, two of them ties and three of one prompt."""
    file = write_pairs(tmp_path_factory.mktemp("ties") / "pairs.parquet", PairRecipe(n=8, seed=0))
    columns = pq.read_table(file).to_pydict()
    for row in TIES:
        columns["label_0"][row] = columns["label_1"][row] = 0.5
    columns["caption"] = ["a", "b", "c", "d", "a", "a", "e", "d"]
    pq.write_table(pa.table(columns), file)
    return open_pairs(file, DataSpec(keep_ties=True))


def test_labels_are_the_datas_and_ties_stay(table: PairTable) -> None:
    labels = Labels(table, None, 0.1)
    assert table.ties == 2
    got = labels(tuple(table.ids))
    assert got[:, list(TIES)].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    decided = [i for i in range(8) if i not in TIES]
    assert got[:, decided].tolist() == [[1.0] * 6, [0.0] * 6]
    assert labels.prompts((table.ids[3], table.ids[0])) == ["d", "a"]


class Verdict:
    """Scores the first image of a call by `gaps`, the second by 0; counts what it is asked."""

    name = "verdict"

    def __init__(self, *gaps: float) -> None:
        self.gaps, self.asked = gaps, []

    def score(self, images, prompts):
        half = len(images) // 2
        assert prompts[:half] == prompts[half:]
        self.asked += prompts[:half]
        return torch.tensor([*self.gaps[:half], *([0.0] * half)])


def test_another_scorer_relabels_each_pair_once(table: PairTable) -> None:
    judge = Verdict(3.0, -3.0, 0.1)  # probability gaps of .91, .91 and .05
    labels = Labels(table, judge, 0.1)
    ids = tuple(table.ids[i] for i in (0, 1, 2))
    expected = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]
    assert labels(ids).tolist() == expected
    assert labels(ids[::-1]).tolist() == [side[::-1] for side in expected]
    assert judge.asked == ["a", "b", "c"]
    with pytest.raises(ScorerError, match="'verdict' gave nan for 'd'"):
        Labels(table, Verdict(float("nan")), 0.1)((table.ids[3],))


def test_the_judge_sees_the_preferred_image_first(table: PairTable) -> None:
    class Bright(Verdict):
        def score(self, images, prompts):
            self.asked += [image.tobytes() for image in images]
            return torch.zeros(len(images))

    judge = Bright()
    Labels(table, judge, 0.1)((table.ids[0],))
    row = table[0]
    assert judge.asked == [row.chosen.open().tobytes(), row.rejected.open().tobytes()]


@pytest.mark.parametrize("step", [0, 1, 3])  # step 1 goes over the end of the data: eight pairs, six a step
def test_weights_of_a_step_sum_to_one_however_it_is_shared_out(table: PairTable, step: int) -> None:
    weights = StepWeights(table, seed=0, pairs=6)
    whole = weights(step, batch=6, accumulation=1, process=0, processes=1)
    assert whole.sum().item() == pytest.approx(1)
    shared = torch.stack([weights(step, 1, 3, process, 2) for process in (0, 1)])  # process accumulation batch
    assert torch.equal(shared.permute(1, 0, 2).flatten(), whole[0])
    of_prompt = {"a": 3, "b": 1, "c": 1, "d": 2, "e": 1}
    pairs = [weights.order(6 * step + i)[0] for i in range(6)]
    share = torch.tensor([1 / of_prompt[table.prompts[i]] for i in pairs])
    torch.testing.assert_close(whole[0], share / share.sum())


@torch.no_grad()
def test_images_are_what_diffusers_predicts(tiny_sd: Path, pair_folder: Path) -> None:
    base = load_base(str(tiny_sd))
    source = OfflinePairs(open_pairs(pair_folder), Online(Encoder(base), 32), LoaderSpec(5, 3, with_uncond=True))
    batch = next(source.batches())
    networks = Networks(base.unet, family=base.family, schedule=base.schedule)
    pictures, t = decoded_predictions(batch, networks, base.vae, guidance=5.0)
    assert pictures.shape == (2, 3, 3, 32, 32)
    assert torch.equal(t, integers(batch.keys, "t", 0, 1000))

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    noise = normal(batch.keys, "noise", batch.latents.shape[2:])
    for side in (0, 1):
        for pair in range(3):
            one = slice(pair, pair + 1)
            xt = scheduler.add_noise(batch.latents[side, one], noise[one], t[one])
            prompt = batch.cond.prompt_embeds[side, one]
            null = pipe.text_encoder(pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids)[0]
            with_prompt = pipe.unet(xt, t[one], prompt).sample
            without = pipe.unet(xt, t[one], null).sample
            guided = without + 5.0 * (with_prompt - without)
            x0 = scheduler.step(guided, int(t[pair]), xt).pred_original_sample
            expected = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample[0]
            # x̂_0 divides rounding errors by a_t, which is .07 at t = 999
            torch.testing.assert_close(pictures[side, pair], expected, rtol=1e-3, atol=1e-3)
