"""One component of a diffusers folder or Hub repository at a time, with errors that say what to do.

Weights come from safetensors only: a pickled .bin or .ckpt can run code when it is opened.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.io.hub import is_hub_id, why_not_fetched
from diffalign.io.loaded_weights import check_module, check_report
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import VAE, TextModel, UNet
from diffalign.models.loading.stored import UNET_STEM, weight_sets, weights_in

log = logging.getLogger(__name__)

TEXT_STEM = "model"  # of transformers' weight files
_TOKENIZER_FILES = "tokenizer.json, or vocab.json and merges.txt,"
_A_BASE_IS = "a base is a diffusers pipeline folder, a Hub id or one .safetensors file"


@dataclass(frozen=True)
class Where:
    """Revision, variant and dtype that all components of one load share."""

    revision: str | None
    variant: str | None
    dtype: torch.dtype

    def load(self, cls: Any, source: str, subfolder: str | None, stem: str, **dtype: torch.dtype) -> Any:
        """`cls.from_pretrained` of safetensors weights, whole and finite; `stem`: `stored.weight_sets`.

        A folder that has one variant of the weights and no plain ones is read as that variant. Raises ModelError
        naming component, cause and remedy.
        """
        what = f"the {subfolder or 'VAE'} of {source!r}"
        try:
            module, report = cls.from_pretrained(
                source,
                subfolder=subfolder or "",
                revision=self.revision,
                variant=self._variant(source, subfolder, stem),
                use_safetensors=True,
                output_loading_info=True,
                **dtype,
            )
        except ModelError:
            raise
        except Exception as error:  # the libraries raise many kinds here, for configs and weights alike
            raise ModelError(_why_no_component(what, source, self.variant, error)) from error
        check_report(what, report, is_text=stem == TEXT_STEM)
        check_module(what, module)
        return module

    def _variant(self, source: str, subfolder: str | None, stem: str) -> str | None:
        """The variant of what is on this machine, its files examined; the one asked for where nothing is here yet."""
        folder = local_folder(source, self.revision)
        if folder is None or not (Path(source).is_dir() or weight_sets(folder / (subfolder or ""), stem)):
            return self.variant
        variant, files = weights_in(folder / (subfolder or ""), stem, self.variant)
        if variant != self.variant:
            log.warning("%s: only variant %s exists; it is used", files[0].parent, variant)
        return variant


def local_folder(source: str, revision: str | None) -> Path | None:
    """The folder on this machine that a source names: itself, or its place in the Hub's cache; None where neither."""
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # huggingface_hub's own are both
        return None


def read_index(source: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's model_index.json. Raises ModelError when there is none to be had."""
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(source, revision=revision))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the latter for JSON that is no object
        raise ModelError(_why_no_pipeline(source, error)) from error


def load_unet(source: str, where: Where) -> UNet:
    """UNet2DConditionModel of a pipeline."""
    from diffusers import UNet2DConditionModel

    return where.load(UNet2DConditionModel, source, "unet", UNET_STEM, torch_dtype=where.dtype)


def outline_unet(source: str, where: Where) -> UNet:
    """The UNet of a pipeline as its config describes it, without weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    try:
        config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=where.revision)
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except Exception as error:  # a config of nonsense fails in as many ways as there are settings
        raise ModelError(_why_no_component(f"the unet of {source!r}", source, where.variant, error)) from error


def load_vae(source: str, subfolder: str | None, where: Where) -> VAE:
    """The autoencoder in `source[/subfolder]`, of the class its config names; of a whole pipeline its vae."""
    if source.endswith(".safetensors"):
        raise ModelError(
            f"the VAE {source!r} is one file, but a diffusers folder or Hub id is required: convert it "
            "once with diffusers' AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER), or "
            "name a pipeline that has it"
        )
    folder = local_folder(source, where.revision)
    if subfolder is None and (_is_pipeline(folder) if folder is not None else _has_vae(source, where.revision)):
        subfolder = "vae"
    return where.load(_vae_class(source, subfolder, where), source, subfolder, UNET_STEM, torch_dtype=where.dtype)


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _has_vae(source: str, revision: str | None) -> bool:
    """Whether a Hub id that is not here yet is of a pipeline, and not of a VAE alone."""
    import diffusers

    for subfolder in (None, "vae"):
        try:
            diffusers.AutoencoderKL.load_config(source, subfolder=subfolder, revision=revision)
        except Exception:  # what is wrong with it, loading says
            continue
        return subfolder is not None
    return False


def load_text(source: str, names: tuple[str, ...], where: Where) -> tuple[tuple[Any, ...], tuple[TextModel, ...]]:
    """Tokenizers and text models; `names` are the model_index keys, e.g. ("", "_2") for both of SDXL."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizers, models = [], []
    for suffix in names:
        cls = CLIPTextModelWithProjection if suffix else CLIPTextModel
        model = where.load(cls, source, f"text_encoder{suffix}", TEXT_STEM, dtype=where.dtype)
        what = f"the tokenizer{suffix} of {source!r}"
        _need_tokenizer_files(what, local_folder(source, where.revision), f"tokenizer{suffix}")
        try:
            loader: Any = CLIPTokenizer  # its annotation wants a revision
            tokenizer = loader.from_pretrained(source, subfolder=f"tokenizer{suffix}", revision=where.revision)
        except Exception as error:  # a damaged file fails in as many ways as there are tokens
            raise ModelError(_why_no_component(what, source, None, error)) from error
        check_tokenizer(what, tokenizer, model)
        models.append(model)
        tokenizers.append(tokenizer)
    return tuple(tokenizers), tuple(models)


def check_tokenizer(what: str, tokenizer: Any, model: nn.Module) -> None:
    """Raises ModelError for a tokenizer that is none (transformers makes an empty one) or is not this text model's."""
    config: Any = model.config
    tokens = len(tokenizer)
    if tokens > config.vocab_size or 2 * tokens < config.vocab_size:
        raise ModelError(
            f"{what} has {tokens} tokens, and its text encoder {config.vocab_size}: {_TOKENIZER_FILES} "
            "are missing or belong to another model; copy the folder again from the base's source"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ModelError(
            f"{what} has model_max_length = {tokenizer.model_max_length:.4g}, and its text encoder takes "
            f"{config.max_position_embeddings} tokens: tokenizer_config.json is missing or belongs to "
            "another model; copy the folder again from the base's source"
        )


def _need_tokenizer_files(what: str, folder: Path | None, subfolder: str) -> None:
    if folder is None:
        return
    there = {file.name for file in (folder / subfolder).iterdir()} if (folder / subfolder).is_dir() else set()
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        raise ModelError(
            f"{what} has no files: it needs {_TOKENIZER_FILES}, and {folder / subfolder} contains "
            f"{', '.join(sorted(there)) or 'nothing'}. Copy that folder from the base's source, or "
            "fetch it with `hf download`"
        )


def load_scheduler_config(source: str, revision: str | None) -> dict[str, Any]:
    """The scheduler's config, completed with the defaults of its own class. Raises ModelError as `schedule_of` does."""
    from diffusers import DDIMScheduler

    try:
        config = dict(DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except OSError as error:
        raise ModelError(f"no scheduler/scheduler_config.json in {source!r}: {_first_line(error)}") from error
    return complete_scheduler_config(config, source)


def complete_scheduler_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """`config` with the keys it leaves out, which mean the defaults of the class it names.

    Raises ModelError as `schedule_of` does, and for a class that lacks a package.
    """
    import diffusers

    schedule_of(config, source)  # refuses before diffusers makes a DDIM of anything
    name = config.get("_class_name")
    try:
        full = dict(config) if name is None else dict(getattr(diffusers, name).from_config(config).config)
    except ImportError as error:  # LMSDiscreteScheduler and others want packages of their own
        raise ModelError(f"the scheduler of {source!r}: {' '.join(str(error).split())}") from error
    return {key: value for key, value in full.items() if not key.startswith("_")} | {
        "_class_name": name or "DDIMScheduler"
    }


def schedule_of(config: dict[str, Any], source: str) -> NoiseSchedule:
    """The noise schedule of a scheduler config. Raises ModelError that names the base for noise not tuned here."""
    try:
        return NoiseSchedule.from_config(config)
    except DiffalignError as error:
        raise ModelError(f"the scheduler of {source!r}: {error}") from error


def _vae_class(source: str, subfolder: str | None, where: Where) -> Any:
    import diffusers

    try:
        config = dict(diffusers.AutoencoderKL.load_config(source, subfolder=subfolder, revision=where.revision))
    except Exception as error:  # one that is no JSON object fails in many ways
        raise ModelError(_why_no_component(f"the {subfolder or 'VAE'} of {source!r}", source, None, error)) from error
    name = str(config.get("_class_name", "AutoencoderKL"))
    if not (name.startswith("A") and "Autoencoder" in name and hasattr(diffusers, name)):
        raise ModelError(
            f"the VAE of {source!r} is a {name!r}; allowed are diffusers' autoencoders (AutoencoderKL, "
            "AutoencoderDC, AutoencoderTiny, …). Use another one with "
            "pretrained_vae_model_name_or_path"
        )
    return getattr(diffusers, name)


def _why_no_pipeline(source: str, error: Exception) -> str:
    folder = Path(source)
    if folder.is_dir():
        if (folder / "unet").is_dir() or list(folder.glob("*.safetensors")):
            return (
                f"{source!r} contains tuned weights but no model_index.json: it is not a base model. Set "
                "pretrained_model_name_or_path to the model it was tuned from, and give this folder as "
                "the tuned weights"
            )
        if (folder / "model_index.json").is_file():
            return f"{source}/model_index.json cannot be read ({_first_line(error)}); download the model again"
        return f"{source!r} has no model_index.json; {_A_BASE_IS}"
    if not is_hub_id(source):
        return f"{source!r} does not exist; {_A_BASE_IS}"
    return f"{source!r} is not a folder on this machine, and {why_not_fetched(source, error)}"


def _why_no_component(what: str, source: str, variant: str | None, error: Exception) -> str:
    """`error` of a library, with what to do."""
    if isinstance(error, OSError) and not Path(source).is_dir() and is_hub_id(source):
        hint = "" if variant else ". If the repository has only fp16 weights, set model.variant: fp16"
        return f"cannot load {what}: {why_not_fetched(source, error)}{hint}"
    return (
        f"cannot load {what}: {type(error).__name__}: {_first_line(error)[:300]}. Its config and its "
        "weights must be complete and belong to one model; download it again, or save it again from a "
        "working copy"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
