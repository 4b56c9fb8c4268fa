"""Every component of a base has all of its weights, all finite, or is refused by name."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from diffalign.io.loaded_weights import check_module
from diffalign.models.adapters.save_load import make_pipeline
from diffalign.models.loading import components
from diffalign.models.loading.base import load_base, outline_base
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.from_pipeline import base_of_pipeline
from diffalign.models.spec import ModelSpec
from diffalign.world import base_path
from tests.models.conftest import Model
from tests.models.loading.test_base import same_weights, single_file_state

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
TEXT_2 = "text_encoder_2/model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n"
State = dict[str, torch.Tensor]


@pytest.fixture
def folder(models: dict[str, Model], tmp_path: Path) -> Path:
    """A copy of a tiny pipeline that a test may break."""
    return Path(shutil.copytree(models["sdxl"].folder, tmp_path / "base"))


def rewrite(file: Path, change: Callable[[State], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET, "conv_in.weight"),
        (VAE, "encoder.conv_in.weight"),
        (TEXT, "embeddings.token_embedding.weight"),
        (TEXT_2, "text_projection.weight"),
    ],
)
def test_a_component_that_is_not_whole(folder: Path, file: str, name: str) -> None:
    whole = (folder / file).read_bytes()
    what = f"the {file.split('/')[0]} of '{folder}'"

    def refused(change: Callable[[State], object]) -> str:
        rewrite(folder / file, change)
        with pytest.raises(ModelError) as error:
            load_base(str(folder))
        (folder / file).write_bytes(whole)
        assert what in str(error.value)
        return str(error.value)

    said = refused(lambda state: state.pop(name))
    assert f"1 tensors are missing ({name})" in said.replace("text_model.", "")
    assert "download the model again" in said
    assert "1 tensors have no place in it (strange)" in refused(lambda state: state.update(strange=torch.zeros(2)))
    refused(lambda state: state.update({name: torch.zeros(2)}))
    said = refused(lambda state: state[name].view(-1)[0].fill_(math.nan))
    assert "NaN or infinite values in 1 of its" in said
    assert name in said
    assert "every loss would be NaN" in said
    refused(lambda state: state[name].view(-1)[-1].fill_(math.inf))


def test_a_damaged_file_of_a_component(folder: Path) -> None:
    for file in (UNET, VAE, TEXT):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(LFS)
        with pytest.raises(ModelError, match=rf"{file} is a Git-LFS pointer.*git lfs pull"):
            load_base(str(folder))
        (folder / file).write_bytes(whole)


def test_large_values_of_half_precision_are_no_fault(folder: Path) -> None:
    rewrite(folder / UNET, lambda state: state.update({"conv_in.bias": torch.full((32,), 6e4, dtype=torch.float16)}))
    base = load_base(str(folder), torch_dtype=torch.float16, vae_and_text=False)
    assert base.unet.conv_in.bias[0] == 6e4  # their sum is beyond float16


def test_what_released_text_encoders_have_besides_is_no_fault(folder: Path, models) -> None:
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
    rewrite(folder / TEXT, lambda state: state.update(extra | {"text_projection.weight": torch.zeros(2, 2)}))
    assert same_weights(load_base(str(folder)).text.models[0], models["sdxl"].base.text.models[0])


@pytest.mark.parametrize("config", ["unet", "vae", "text_encoder"])
def test_a_config_of_nonsense(folder: Path, config: str) -> None:
    file = folder / config / "config.json"
    whole = json.loads(file.read_text())
    key = "num_hidden_layers" if config == "text_encoder" else "block_out_channels"
    for text in ("{", "[]", json.dumps(whole | {key: "many"}), json.dumps(whole | {key: None})):
        file.write_text(text)
        with pytest.raises(ModelError, match=rf"the {config} of '{folder}'"):
            load_base(str(folder))
        if config == "unet":
            with pytest.raises(ModelError, match=rf"the {config} of '{folder}'"):
                outline_base(str(folder))


def test_a_tokenizer_that_is_not_there_or_another_models(folder: Path) -> None:
    tokenizer = folder / "tokenizer_2"
    config = tokenizer / "tokenizer_config.json"
    whole = config.read_text()
    config.unlink()
    with pytest.raises(ModelError, match=r"the tokenizer_2 of .*model_max_length.*tokenizer_config.json is missing"):
        load_base(str(folder))
    config.write_text(whole)
    (tokenizer / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ModelError, match="the tokenizer_2 of"):
        load_base(str(folder))
    for file in tokenizer.glob("*"):
        if file != config:
            file.unlink()
    with pytest.raises(ModelError, match=r"the tokenizer_2 of .* has no files: it needs .*merges.txt.*hf download"):
        load_base(str(folder))
    shutil.rmtree(tokenizer)
    with pytest.raises(ModelError, match=r"tokenizer_2 contains nothing"):
        load_base(str(folder))


def test_one_variant_alone_is_read_as_that(folder: Path, models, caplog: pytest.LogCaptureFixture) -> None:
    for file in (UNET, TEXT):
        (folder / file).rename(folder / file.replace(".safetensors", ".fp16.safetensors"))
    with caplog.at_level(logging.WARNING):
        base = load_base(str(folder))
    assert same_weights(base.unet, models["sdxl"].base.unet)
    assert f"{folder / 'unet'}: only variant fp16 exists; it is used" in caplog.text
    shutil.copy(folder / "unet/diffusion_pytorch_model.fp16.safetensors", folder / UNET.replace(".saf", ".ema.saf"))
    with pytest.raises(ModelError, match=r"Set model.variant to one that exists \(variant: ema, variant: fp16\)"):
        load_base(str(folder))


def test_a_part_of_the_weights_that_is_missing(folder: Path, models) -> None:
    models["sdxl"].base.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    (folder / UNET).unlink()
    assert same_weights(load_base(str(folder), vae_and_text=False).unet, models["sdxl"].base.unet)
    parts = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"contains {len(parts) - 1} of the {len(parts)} parts of its weights"):
        load_base(str(folder), vae_and_text=False)


def cached_as(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, folder: Path) -> Path:
    """Puts a folder into a cache of the Hub as the repository `name`; returns its place."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(cache), raising=False)
    return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))


def test_a_base_and_a_vae_in_the_cache_of_the_hub(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["sdxl"]
    place = cached_as(monkeypatch, tmp_path / "hub", "org/pipeline", model.folder)
    cached_as(monkeypatch, tmp_path / "hub", "org/vae", models["sd"].folder / "vae")
    base = load_base("org/pipeline")
    assert same_weights(base.unet, model.base.unet)
    assert base.source == "org/pipeline"
    for vae, expected in (("org/vae", models["sd"]), ("org/pipeline", model)):
        spec = ModelSpec(str(model.folder), pretrained_vae_model_name_or_path=vae)
        assert same_weights(load_base(spec).vae, expected.base.vae)
    assert same_weights(load_base(ModelSpec("org/pipeline", revision="0" * 40)).unet, model.base.unet)
    (place / UNET).unlink()  # as after a download of configs alone
    with pytest.raises(ModelError, match=r"the unet of 'org/pipeline'.*hf download org/pipeline.*model.variant: fp16"):
        load_base("org/pipeline")
    assert outline_base("org/pipeline").unet.config.in_channels == 4


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_fetched_of_a_repository(variant: str | None) -> None:
    """SDXL's and SD1.5's repositories have several sets of weights of each component; one is fetched."""
    late = "" if variant is None else f".{variant}"
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/merges.txt",
        "text_encoder/config.json",
        f"text_encoder/model{late}.safetensors",
        "text_encoder_2/config.json",
        f"text_encoder_2/model{late}-00001-of-00002.safetensors",
        f"text_encoder_2/model-00002-of-00002{late}.safetensors",
        f"text_encoder_2/model.safetensors.index{late}.json",
        "unet/config.json",
        f"unet/diffusion_pytorch_model{late}.safetensors",
        "vae/config.json",
        f"vae/diffusion_pytorch_model{late}.safetensors",
    ]
    other = ".fp16" if variant is None else ""
    others = [
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        f"unet/diffusion_pytorch_model{other}.safetensors",
        f"text_encoder_2/model{other}-00001-of-00002.safetensors",
        f"text_encoder_2/model-00001-of-00002{other}.safetensors",
        "text_encoder/flax_model.msgpack",
        "safety_checker/model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "README.md",
    ]
    every = sorted(needed + others)
    patterns = components.files_of(components.PIPELINE, variant)
    fetched = list(filter_repo_objects(every, allow_patterns=patterns))
    assert fetched == sorted(needed)
    alone = list(filter_repo_objects(every, allow_patterns=components.files_of(("unet",), variant)))
    assert alone == [name for name in fetched if name.startswith(("model_", "scheduler/", "unet/"))]
    vae = ["config.json", f"diffusion_pytorch_model{late}.safetensors"]
    patterns = components.files_of(("", "vae"), variant)
    assert list(filter_repo_objects([*vae, "sdxl.vae.safetensors"], allow_patterns=patterns)) == vae


def test_a_vae_may_be_a_whole_pipelines(models, tmp_path: Path) -> None:
    model = models["sdxl"]
    base = load_base(ModelSpec(str(model.folder), pretrained_vae_model_name_or_path=str(models["sd"].folder)))
    assert same_weights(base.vae, models["sd"].base.vae)
    with pytest.raises(ModelError, match=r"one file.*AutoencoderKL.from_single_file"):
        load_base(ModelSpec(str(model.folder), pretrained_vae_model_name_or_path="sdxl_vae.safetensors"))
    wide = AutoencoderKL.from_config({**model.base.vae.config, "latent_channels": 8})
    wide.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"latents of 8 channels, its UNet takes 4"):
        load_base(ModelSpec(str(model.folder), pretrained_vae_model_name_or_path=str(tmp_path / "vae")))


def test_a_single_file_without_a_vae_takes_another(models, tmp_path: Path) -> None:
    model, file = models["sdxl"], tmp_path / "model.safetensors"
    state = single_file_state(model.base)
    save_file({name: value for name, value in state.items() if not name.startswith("first_stage")}, file)
    config = {"single_file_config": str(model.folder)}
    with pytest.raises(ModelError, match=r"has no VAE .*pretrained_vae_model_name_or_path"):
        load_base(ModelSpec(str(file), **config))
    base = load_base(ModelSpec(str(file), pretrained_vae_model_name_or_path=str(models["sd"].folder), **config))
    assert same_weights(base.vae, models["sd"].base.vae)
    assert same_weights(base.unet, model.base.unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.diffusion_model.out.2.bias"),
            "not complete: 1 of .* tensors of its unet are missing .conv_out.bias.",
        ),
        (
            lambda s: s.pop("first_stage_model.decoder.conv_in.bias"),
            "not complete: 1 of .* tensors of its vae are missing .decoder.conv_in.bias.",
        ),
        (lambda s: s["first_stage_model.decoder.conv_in.bias"].fill_(math.nan), "the vae of .* has NaN"),
        (lambda s: s.update({"model.diffusion_model.x.y": torch.zeros(1)}), "only a part would be used"),
    ],
)
def test_a_single_file_that_is_not_whole(models, tmp_path: Path, change, message: str) -> None:
    model, file = models["sdxl"], tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in single_file_state(model.base).items()}
    change(state)
    save_file(state, file)
    with pytest.raises(ModelError, match=message) as error:
        load_base(ModelSpec(str(file), single_file_config=str(model.folder)))
    assert str(file) in str(error.value)


def test_quantised_weights_are_no_weights() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"X has quantised weights \(weight\): give the model in float32"):
        check_module("X", layer)


def test_an_open_pipeline_with_a_value_that_is_no_number(models) -> None:
    pipeline = make_pipeline(models["sd"].base)
    pipeline.vae = AutoencoderKL.from_config(pipeline.vae.config)
    pipeline.vae.encoder.conv_in.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ModelError, match=r"the pipeline's vae has NaN .*encoder.conv_in.weight"):
        base_of_pipeline(pipeline)


def test_the_one_known_warning_of_a_vae_is_not_shown(tmp_path: Path) -> None:
    logger, shown = logging.getLogger("diffusers.configuration_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    filters = [*logger.filters]
    try:
        vae = Path(shutil.copytree(Path(base_path()) / "vae", tmp_path / "vae"))
        assert list(components.load_other_vae(str(vae), torch.float32).config.block_out_channels)
        assert shown == []
        assert logger.filters == filters
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps({**config, "colour": 1}))
        components.load_other_vae(str(vae), torch.float32)
    finally:
        logger.removeHandler(handler)
    assert len(shown) == 1
    assert "'colour': 1" in shown[0]
