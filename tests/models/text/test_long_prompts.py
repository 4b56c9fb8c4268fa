"""Long prompts and clip skip against two restatements of what other programs do, and in an exported LoRA's images.

The restatements were written from the behaviour of sd-scripts (library/strategy_base.py, strategy_sd.py,
strategy_sdxl.py) and of A1111 (modules/sd_hijack_clip.py); none of their code is here.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.engine.random import initial_noise
from diffalign.errors import DiffalignError
from diffalign.evaluation.generate import generate
from diffalign.evaluation.manifest import manifest_rows
from diffalign.evaluation.recipe import tag_of
from diffalign.evaluation.sampling import Sampling
from diffalign.export.kohya import export_kohya
from diffalign.models.adapters.save_load import make_pipeline
from diffalign.models.loading.encoder import Encoder
from diffalign.models.loading.family import ModelError, TextEncoders
from diffalign.models.text.notices import PromptNotices, counted
from diffalign.models.text.spec import TextSpec
from tests.models.adapters.test_merge import PIPELINES, write_lora
from tests.models.conftest import Model

SIZES = (0, 5, 74, 75, 76, 149, 150, 151, 225)  # tokens: around every edge of a chunk
PROMPTS = [" ".join("abcdefgh"[i % 8] for i in range(size)) for size in SIZES]
Last = tuple[Tensor, Tensor | None]  # hidden states "row token dim" and the pooled embedding of some rows of ids


def encoders_of(model: Model, spec: TextSpec) -> TextEncoders:
    assert model.base.text is not None
    return replace(model.base.text, spec=spec, zero_empty_prompt=False)


def encoder_of(model: Model, spec: TextSpec) -> Encoder:
    return Encoder(replace(model.base, text=encoders_of(model, spec)))


@torch.no_grad()
def hidden_of(model: Any, ids: Tensor, skip: int, sdxl: bool) -> Last:
    out = model(ids, output_hidden_states=True)
    if sdxl:
        return out.hidden_states[-2 - skip], getattr(out, "text_embeds", None)
    norm = getattr(model, "text_model", model).final_layer_norm
    return norm(out.hidden_states[-1 - skip]), None


def kohya_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    """One long row, padded by the tokenizer to length + 2, cut into rows that get BOS and EOS again."""
    whole = tokenizer(prompt, padding="max_length", truncation=True, max_length=length + 2).input_ids
    bos, eos, pad, rows = whole[0], tokenizer.eos_token_id, tokenizer.pad_token_id, []
    for first in range(1, length, 75):
        row = [bos, *whole[first : first + 75], whole[-1]]
        if pad != eos:
            if row[-2] not in (eos, pad):
                row[-1] = eos
            if row[1] == pad:
                row[1] = eos
        rows.append(row)
    return torch.tensor(rows)


def as_kohya(model: Model, prompt: str, length: int, skip: int = 0) -> Last:
    """BOS of the first row, what is between BOS and EOS of every row, the last position of the last row."""
    text, parts, pooled = model.base.text, [], None
    for tokenizer, encoder in zip(text.tokenizers, text.models, strict=True):
        hidden, pooled = hidden_of(encoder, kohya_ids(tokenizer, prompt, length), skip, len(text.models) == 2)
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        middle = [flat[:, row * 77 + 1 : row * 77 + 76] for row in range(length // 75)]
        parts.append(torch.cat([flat[:, :1], *middle, flat[:, -1:]], dim=1))
    return torch.cat(parts, dim=-1), None if pooled is None else pooled[:1]


def webui_chunks(tokenizer: Any, prompt: str, chunks: int) -> list[list[int]]:
    """Lists of 75 tokens filled with EOS; behind the first EOS the padding token, where that is another one."""
    tokens, rows = tokenizer(prompt, add_special_tokens=False).input_ids, []
    for chunk in range(chunks):
        own = tokens[75 * chunk : 75 * chunk + 75]
        row = [tokenizer.bos_token_id, *own, *[tokenizer.eos_token_id] * (76 - len(own))]
        end = row.index(tokenizer.eos_token_id)
        rows.append(row[: end + 1] + [tokenizer.pad_token_id] * (76 - end))
    return rows


def as_webui(model: Model, prompt: str, chunks: int) -> Last:
    """Each chunk encoded alone, the results side by side; pooled from the first."""
    text, parts, first = model.base.text, [], None
    for tokenizer, encoder in zip(text.tokenizers, text.models, strict=True):
        rows = webui_chunks(tokenizer, prompt, chunks)
        each = [hidden_of(encoder, torch.tensor([row]), 0, len(text.models) == 2) for row in rows]
        parts.append(torch.hstack([hidden for hidden, _ in each]))
        first = each[0][1]
    return torch.cat(parts, dim=-1), first


def assert_equal(ours: Any, theirs: list[Last], tokens: int) -> None:
    assert ours.prompt_embeds.shape[:2] == (len(theirs), tokens)
    torch.testing.assert_close(ours.prompt_embeds, torch.cat([hidden for hidden, _ in theirs]), rtol=1e-5, atol=1e-6)
    pools = [pooled for _, pooled in theirs if pooled is not None]
    assert (ours.pooled is None) is (not pools)
    if pools:
        torch.testing.assert_close(ours.pooled, torch.cat(pools), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "skip"), [(75, 0), (150, 0), (225, 0), (225, 1)])
def test_long_prompts_are_those_of_sd_scripts(model: Model, length: int, skip: int) -> None:
    ours = encoder_of(model, TextSpec(max_token_length=length, clip_skip=skip)).prompts(PROMPTS)
    assert_equal(ours, [as_kohya(model, prompt, length, skip) for prompt in PROMPTS], length + 2)


def test_long_prompts_are_those_of_a1111(model: Model) -> None:
    prompts = [*PROMPTS, "! " * 80]  # "!" is the padding token of SDXL's second tokenizer, and a token like any other
    ours = encoder_of(model, TextSpec(max_token_length=225, chunk_layout="webui")).prompts(prompts)
    assert_equal(ours, [as_webui(model, prompt, 3) for prompt in prompts], 3 * 77)


def test_one_chunk_is_what_it_was_to_the_bit(model: Model) -> None:
    plain, given = Encoder(model.base).prompts(PROMPTS[1:]), encoder_of(model, TextSpec(max_token_length=75))
    assert torch.equal(given.prompts(PROMPTS[1:]).prompt_embeds, plain.prompt_embeds)


@pytest.mark.parametrize("skip", [1, pytest.param(2, id="all-but-one")])
def test_clip_skip_counts_as_diffusers_does(model: Model, skip: int) -> None:
    if skip == 2 and model.base.family.name == "sdxl":
        with pytest.raises(ModelError, match=r"clip_skip: 2 .* at most 1"):  # three layers, and SDXL skips one anyway
            encoder_of(model, TextSpec(clip_skip=skip))
        return
    ours = encoder_of(model, TextSpec(clip_skip=skip)).prompts(PROMPTS[1:3])
    assert not torch.allclose(ours.prompt_embeds, Encoder(model.base).prompts(PROMPTS[1:3]).prompt_embeds, atol=1e-2)
    pipe = make_pipeline(copy.deepcopy(model.base))
    for part in ("text_encoder", "text_encoder_2"):  # where diffusers looks, and transformers 5 has it no longer
        if (encoder := getattr(pipe, part, None)) is not None and not hasattr(encoder, "text_model"):
            object.__setattr__(encoder, "text_model", encoder)
    theirs = pipe.encode_prompt(
        PROMPTS[1:3],
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=skip,
    )
    torch.testing.assert_close(ours.prompt_embeds, theirs[0], rtol=1e-5, atol=1e-6)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs[2], rtol=1e-5, atol=1e-6)


def test_the_fingerprint_of_a_cache_follows_the_text(model: Model) -> None:
    specs = [
        TextSpec(),
        TextSpec(chunk_layout="webui", prompt_weights="literal"),  # one chunk is the same in both layouts
        TextSpec(max_token_length=150),
        TextSpec(max_token_length=150, chunk_layout="webui"),
        TextSpec(clip_skip=1),
    ]
    prints = [encoder_of(model, spec).fingerprint for spec in specs]
    assert prints[0] == prints[1] == Encoder(replace(model.base, text=encoders_of(model, TextSpec()))).fingerprint
    assert len(set(prints)) == 4


def test_prompts_of_the_data_are_counted_before_a_run_begins(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*PROMPTS, "(a:1.5)", *PROMPTS]
    said = counted(encoders_of(model, TextSpec()), prompts)
    assert said.startswith("of 10 prompts examined, 5 are longer than 75 tokens and lose up to 150 of them")
    assert said.endswith("and 1 have weights such as (word:1.2), which are plain text (model.prompt_weights)")
    whole = TextSpec(max_token_length=225, prompt_weights="literal")
    assert counted(encoders_of(model, whole), prompts) == counted(encoders_of(model, TextSpec()), []) == ""
    monkeypatch.setattr("diffalign.models.text.notices.EXAMINED", 3)
    said = counted(encoders_of(model, TextSpec()), prompts)  # the first, fifth and ninth: of 0, 76 and 225 tokens
    assert said.startswith("of 3 prompts examined, 2 are longer")


def test_what_cannot_be_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"max_token_length: 77 is not a multiple of 75"):
        encoder_of(model, TextSpec(max_token_length=77))
    for wrong in ({"clip_skip": -1}, {"max_token_length": 0}, {"chunk_layout": "comfy"}, {"prompt_weights": "read"}):
        with pytest.raises(DiffalignError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_weights_are_never_plain_text_without_a_word(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    plain = ["a fox (vulpes vulpes), at 10:30", r"\(a:1.2\)", "a smile (:3)", "f(x: y)"]
    weighted = ["a (red:1.2) fox", "((a fox:1.1), sharp)", "(fox: .5 )"]
    with caplog.at_level(logging.WARNING):
        encoder = encoder_of(model, TextSpec())
        encoder.prompts([*plain, *weighted])
    assert encoder.notices.weighted == {
        weighted[0]: ["(red:1.2)"],
        weighted[1]: ["(a fox:1.1)"],
        weighted[2]: ["(fox: .5 )"],
    }
    assert sum("encoded as plain text" in record.getMessage() for record in caplog.records) == 3
    caplog.clear()
    encoder_of(model, TextSpec(prompt_weights="literal")).prompts(weighted)
    assert not caplog.records
    with pytest.raises(ModelError, match=r"the weight \(red:1.2\)"):
        encoder_of(model, TextSpec(prompt_weights="refuse")).prompts(weighted)


def test_an_exported_lora_makes_the_image_of_generate_in_diffusers(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.models.text.pipeline._NOTICES", PromptNotices())
    prompt, negative = PROMPTS[-1], "" if model.base.family.name == "sdxl" else "blurred, " * 40
    run = write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=4)
    long = Sampling(2, 3.0, negative_prompt=negative, max_token_length=225, clip_skip=1, device="cpu")
    (made,) = generate(str(model.folder), [prompt], [5], out_dir=tmp_path / "images", tuned=run, sampling=long)
    assert not caplog.records
    short = replace(long, max_token_length=None)
    (cut,) = generate(str(model.folder), [prompt], [5], out_dir=tmp_path / "cut", tuned=run, sampling=short)
    assert any("truncated by 150 tokens" in record.getMessage() for record in caplog.records)

    file = export_kohya(run, tmp_path / "mine.safetensors", base=str(model.folder))
    pipe = PIPELINES[model.base.family.name].from_pretrained(model.folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    hidden, pooled = as_kohya(model, prompt, 225, skip=1)
    other, other_pooled = as_kohya(model, negative, 225, skip=1)
    if pooled is not None:  # this SDXL guides away from zeros
        other, other_pooled = torch.zeros_like(other), torch.zeros_like(pooled)
    pools = {} if pooled is None else {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": other_pooled}
    theirs = pipe(
        prompt_embeds=hidden,
        negative_prompt_embeds=other,
        **pools,
        latents=initial_noise([prompt], [5], (4, 16, 16)),
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
    ).images[0]
    ours = np.asarray(made.open()).astype(int)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert np.abs(ours - np.asarray(cut.open()).astype(int)).max() > 2
    rows = [row["settings"] for row in manifest_rows(tmp_path / "images")]
    assert rows[0]["text"] == {"max_token_length": 225, "clip_skip": 1}
    assert tag_of(rows[0]) != tag_of(next(iter(manifest_rows(tmp_path / "cut")))["settings"])
