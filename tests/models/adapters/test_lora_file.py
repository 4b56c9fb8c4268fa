"""LoRA files of every common layout are applied whole; all others are refused by name in every command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.evaluation.recipe import weights_fingerprint
from diffalign.export.kohya import export_kohya
from diffalign.models.adapters.lora import LORA_FILE, add_lora, load_lora, lora_layers, lora_parameters, save_lora
from diffalign.models.adapters.lora_file import PEFT_FILE, read_lora
from diffalign.models.adapters.merge import merge_into, merge_tuned
from diffalign.models.adapters.save_load import apply_tuned, find_tuned, load_pipeline, make_pipeline
from diffalign.models.loading.family import ModelError
from tests.models.conftest import Model, move_lora, picture

ALPHA = 10.0
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sd(models: dict[str, Model]) -> Model:
    return models["sd"]


@pytest.fixture(scope="module")
def trained(sd: Model) -> torch.nn.Module:
    unet = sd.unet()
    add_lora(unet, rank=4, alpha=ALPHA)
    move_lora(unet)
    return unet


@pytest.fixture(scope="module")
def state(sd: Model, trained: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> State:
    """The adapter's tensors by bare names."""
    file = save_lora(trained, tmp_path_factory.mktemp("lora"), sd.base.family)
    return {name.removeprefix("unet."): value for name, value in load_file(file).items()}


def renamed(state: State, prefix: str, adapter: str = "") -> State:
    return {prefix + name.replace(".weight", f"{adapter}.weight"): value for name, value in state.items()}


def old_names(state: State) -> State:
    return {
        f"unet.{name}".replace("lora_A.weight", "lora.down.weight").replace("lora_B.weight", "lora.up.weight"): value
        for name, value in state.items()
    }


def with_alphas(state: State, prefix: str = "unet.") -> State:
    alphas = {f"{prefix}{name.rsplit('.', 2)[0]}.alpha": torch.tensor(ALPHA) for name in state}
    return renamed(state, prefix) | alphas


FIELDS = {"r": 4, "lora_alpha": ALPHA, "peft_type": "LORA", "target_modules": ["to_q"], "lora_dropout": 0.3}


def write_peft(folder: Path, state: State, fields: dict | None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(renamed(state, "base_model.model."), folder / PEFT_FILE)
    if fields is not None:
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def same_adapter(unet: torch.nn.Module, trained: torch.nn.Module) -> bool:
    ours, theirs = lora_parameters(unet), lora_parameters(trained)
    scales = {layer.scaling["default"] for layer in lora_layers(unet)}
    return scales == {ALPHA / 4} and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", ["unet.", "bare", "old names", "an adapter's name"])
def test_layouts_with_an_alpha_of_each_module(sd: Model, trained, state: State, tmp_path: Path, layout: str) -> None:
    alphas = {name: value for name, value in with_alphas(state, "").items() if name.endswith(".alpha")}
    tensors = {
        "unet.": with_alphas(state),
        "bare": with_alphas(state, ""),
        "old names": old_names(state) | alphas,
        "an adapter's name": renamed(state, "unet.", ".default") | alphas,
    }[layout]
    save_file(tensors, tmp_path / "x.safetensors")
    unet = sd.unet()
    load_lora(unet, tmp_path / "x.safetensors")
    assert same_adapter(unet, trained)


def test_pefts_own_folder_with_its_config(sd: Model, trained, state: State, tmp_path: Path) -> None:
    folder = write_peft(tmp_path, state, FIELDS)
    assert find_tuned(folder).path == folder / PEFT_FILE
    unet = sd.unet()
    load_lora(unet, folder)
    assert same_adapter(unet, trained)
    assert {layer.lora_dropout["default"].__class__.__name__ for layer in lora_layers(unet)} == {"Identity"}
    write_peft(tmp_path, state, FIELDS | {"use_rslora": True, "lora_alpha": ALPHA / 2})  # alpha / sqrt(rank)
    assert set(read_lora(folder, sd.unet()).alphas.values()) == {ALPHA / 2 * math.sqrt(4)}


def test_a_layer_without_an_alpha_has_its_rank(sd: Model, state: State, tmp_path: Path) -> None:
    tensors = with_alphas(state)
    gone = sorted(name for name in tensors if name.endswith(".alpha"))[0]
    del tensors[gone]
    save_file(tensors, tmp_path / "x.safetensors")
    alphas = read_lora(tmp_path / "x.safetensors", sd.unet()).alphas
    assert alphas.pop(gone.removeprefix("unet.").removesuffix(".alpha")) == 4
    assert set(alphas.values()) == {ALPHA}


def test_a_pipeline_makes_the_image_of_the_trained_unet(sd: Model, trained, state: State, tmp_path: Path) -> None:
    folder = write_peft(tmp_path, state, FIELDS)
    pipeline = make_pipeline(sd.base)
    plain = picture(pipeline)
    pipeline.unet = trained
    expected = picture(pipeline)
    assert np.abs(expected - plain).max() > 0.01
    assert np.array_equal(picture(load_pipeline(str(sd.folder), tuned=str(folder))), expected)


HOMELESS = "does not fit this base: "  # where LyCORIS files are merged, and such a module is missing


# what is in the file -> what is said of it
def refused(state: State) -> dict[str, tuple[State, str]]:
    first = min(state)
    module = first.removesuffix(".lora_A.weight")
    n = len(state)
    odd = {f"{module}.lora_B.weight": state[f"{module}.lora_B.weight"][:, :2].contiguous()}
    hada = {f"lora_unet_x.hada_w{i}_{side}": torch.zeros(2, 2) for i in (1, 2) for side in "ab"}
    return {
        "a transformer's": (renamed(state, "transformer."), rf"0 of its {n} tensors.*SD3 or Flux.*Nothing was applied"),
        "another prefix": (renamed(state, "model."), rf"0 of its {n} tensors.*no layer for model\..*and {n - 3} more"),
        "one layer too many": (
            renamed(state, "unet.") | renamed({"extra.lora_A.weight": torch.zeros(4, 8)}, "unet."),
            rf"{n} of its {n + 1} tensors.*no layer for extra.lora_A.weight",
        ),
        "half a layer": ({f"unet.{k}": v for k, v in state.items() if k != first}, "required: its other half"),
        "another shape": (renamed(state | odd, "unet."), rf"does not fit.*{module}.*; required: "),
        "DoRA of peft": (
            renamed(state, "unet.") | {f"unet.{module}.lora_magnitude_vector": torch.ones(33)},
            r"lora_magnitude_vector is \[33\]; required: one length for each output.*has no lora_magnitude_vector",
        ),
        "DoRA of kohya": (
            {"lora_unet_x.dora_scale": torch.ones(1)},
            f"(is kohya's DoRA|{HOMELESS}1 of its 1 tensors).*lora_unet_x.dora_scale",
        ),
        "LoHa": (hada, f"(is LoHa, and not a plain LoRA.*|{HOMELESS})4 of its 4 tensors"),
        "LoKr": (
            {"lora_unet_x.lokr_w1": torch.zeros(2, 2)},
            f"is LoKr, and not a plain LoRA|{HOMELESS}1 of its 1 tensors",
        ),
        "a bias": (
            renamed(state, "unet.") | {f"unet.{module}.lora_B.bias": torch.zeros(32)},
            rf"no layer for {module}.lora_B.bias",
        ),
        "NaN": (renamed(state | {first: state[first] * math.nan}, "unet."), rf"NaN or infinite values in {module}"),
        "an alpha of 0": (with_alphas(state) | {f"unet.{module}.alpha": torch.tensor(0.0)}, "alpha is one finite"),
        "an alpha of nothing": (
            renamed(state, "unet.") | {"unet.x.alpha": torch.tensor(1.0)},
            "an alpha without a LoRA for x",
        ),
        "two adapters": (renamed(state, "unet.") | renamed(state, "unet.", ".b"), "some layers twice"),
        "kohya's, cut": ({"lora_unet_mid_block_x.lora_down.weight": torch.zeros(4, 4)}, "diffusers cannot convert it"),
        "nothing": ({}, "is not a LoRA: none of its 0 tensors"),
    }


CASES = [
    "a transformer's",
    "another prefix",
    "one layer too many",
    "half a layer",
    "another shape",
    "DoRA of peft",
    "DoRA of kohya",
    "LoHa",
    "LoKr",
    "a bias",
    "NaN",
    "an alpha of 0",
    "an alpha of nothing",
    "two adapters",
    "kohya's, cut",
    "nothing",
]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_applied_whole_is_refused_everywhere(sd: Model, state: State, tmp_path: Path, case: str) -> None:
    tensors, message = refused(state)[case]
    file = tmp_path / LORA_FILE
    save_file({name: value.clone() for name, value in tensors.items()}, file)
    unet = sd.unet()
    pipeline = make_pipeline(sd.base)
    base = str(sd.folder)
    ways = {
        "train, reference": lambda: load_lora(unet, file),
        "generate, evaluate": lambda: apply_tuned(pipeline, file),
        "merge": lambda: merge_tuned(sd.base, [(str(file), 1.0)], tmp_path / "merged"),
        "reference of full tuning": lambda: merge_into(unet, [(str(file), 1.0)]),
        "export": lambda: export_kohya(file, tmp_path / "out.safetensors", base=base),
    }
    for way, attempt in ways.items():
        with pytest.raises(ModelError, match=message) as error:
            attempt()
        assert str(file) in str(error.value), way
    assert not lora_layers(unet)  # nothing was applied
    assert not lora_layers(pipeline.unet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "adapter_config.json beside it, which contains alpha, is missing"),
        (FIELDS | {"r": 8}, "has rank 8 and alpha 10.0 for .*, whose tensors have rank 4"),
        (FIELDS | {"lora_alpha": "x"}, "alpha 'x'"),
        (FIELDS | {"use_dora": True}, "use_dora = True"),
        (FIELDS | {"peft_type": "LOHA"}, "LOHA"),
        (FIELDS | {"init_lora_weights": "pissa_niter_16"}, "training changed the base"),
        (FIELDS | {"modules_to_save": ["conv_in"]}, "modules_to_save"),
        (FIELDS | {"alpha_pattern": "x"}, "alpha_pattern is 'x', .*save the LoRA again"),
        (FIELDS | {"rank_pattern": {"(": 4}}, "rank_pattern is {'\\(': 4}, .*save the LoRA again"),
    ],
)
def test_fields_of_peft_that_are_not_a_plain_loras(sd, state: State, tmp_path: Path, fields, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_lora(sd.unet(), write_peft(tmp_path, state, fields))


def test_a_text_encoders_part_that_matches_nothing(sd: Model, state: State, tmp_path: Path) -> None:
    text = {f"text_encoder.nowhere.q_proj.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(renamed(state, "unet.") | text, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"text_encoder"):
        load_pipeline(str(sd.folder), tuned=str(tmp_path / "x.safetensors"))
    with pytest.raises(ModelError, match=rf"text_encoder: 2 of its {len(state) + 2} tensors.*ignoring the rest"):
        load_lora(sd.unet(), tmp_path / "x.safetensors")


def kohya_text(generator: torch.Generator) -> State:
    """A LoRA of both text encoders in kohya's layout, with alpha 2 everywhere but in one layer."""
    state: State = {}
    for encoder, width in (("te1", 32), ("te2", 48)):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"lora_{encoder}_text_model_encoder_layers_1_self_attn_{part}"
            state[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
            state[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
            state[f"{name}.alpha"] = torch.tensor(2.0)
    return state


def test_text_encoders_parts_act_with_the_alpha_of_each_layer(models, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    state = kohya_text(torch.Generator().manual_seed(0))
    save_file(state, file)
    folder = models["sdxl"].folder
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    plain = picture(theirs)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    expected = picture(theirs)
    assert np.abs(expected - plain).max() > 0.01
    assert np.array_equal(picture(load_pipeline(str(folder), tuned=str(file))), expected)
    state["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.alpha"] = torch.tensor(4.0)
    save_file(state, file)
    encoder = load_pipeline(str(folder), tuned=str(file)).text_encoder_2
    scales = [layer.scaling["default"] for layer in lora_layers(encoder)]  # diffusers has 0.5 for all
    assert sorted(scales) == [0.5, 0.5, 0.5, 1.0]


def test_a_second_lora_does_not_replace_the_first(sd: Model, state: State, tmp_path: Path) -> None:
    folder = write_peft(tmp_path, state, FIELDS)
    pipeline = load_pipeline(str(sd.folder), tuned=str(folder))
    with pytest.raises(ModelError, match=r"already has a LoRA.*load a new pipeline"):
        apply_tuned(pipeline, folder)


def test_an_alpha_beside_the_file_is_part_of_what_made_an_image(state: State, tmp_path: Path) -> None:
    file = write_peft(tmp_path, state, FIELDS) / PEFT_FILE
    before = weights_fingerprint(file)
    write_peft(tmp_path, state, FIELDS | {"lora_alpha": 2 * ALPHA})
    assert weights_fingerprint(file) != before
