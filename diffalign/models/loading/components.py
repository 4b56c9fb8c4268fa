"""The components of a diffusers pipeline folder, one at a time, with errors that say what to do.

Weights come from safetensors only: a pickled .bin or .ckpt can run code when it is opened.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.engine.schedule import NoiseSchedule
from diffalign.engine.scheduler_override import changes, overridden
from diffalign.errors import DiffalignError
from diffalign.io.hub import is_hub_id, why_not_fetched
from diffalign.io.loaded_weights import check_module, check_report
from diffalign.io.weight_files import check_weights
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import VAE, TextModel, UNet
from diffalign.models.loading.stored import UNET_STEM, choose_weights, weight_sets
from diffalign.models.spec import ModelSpec

log = logging.getLogger(__name__)

TEXT_STEM = "model"  # of transformers' weight files
PIPELINE = ("unet", "vae", "text_encoder", "text_encoder_2")  # components with weights
_TOKENIZER_FILES = "tokenizer.json, or vocab.json and merges.txt,"
_VAE_IS = (
    "allowed are diffusers' autoencoders (AutoencoderKL, AutoencoderDC, AutoencoderTiny, …). Use another one with "
    "pretrained_vae_model_name_or_path"
)
_BLOCKS_OF_DC = re.compile(r"The config attributes \{'block_out_channels': [^:{}]*\} were passed to AutoencoderDC,")
_A_BASE_IS = "a base is a diffusers pipeline folder, a Hub id or one .safetensors file"


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline, or a VAE alone, whose files are on this machine. Part "" is the folder itself."""

    spec: ModelSpec
    path: Path
    dtype: torch.dtype

    def what(self, part: str) -> str:
        """A component as messages name it."""
        return f"the {part or 'VAE'} of {self.spec.name!r}"

    def read(self, file: str, why: Callable[[Exception], str]) -> dict[str, Any]:
        """The JSON object in a file. Raises ModelError with the text of `why` where there is none."""
        try:
            found = json.loads((self.path / file).read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"{file} is not a JSON object")
        except (OSError, ValueError) as error:
            raise ModelError(why(error)) from error
        return found

    def config(self, part: str) -> dict[str, Any]:
        """A component's config. Raises ModelError where it is missing or not a JSON object."""
        return self.read(f"{part}/config.json".lstrip("/"), partial(_why_no_component, self.what(part)))

    def load(self, cls: Any, part: str, stem: str = UNET_STEM) -> Any:
        """A component with all of its weights, all finite. `stem` is that of its weight files (`stored`).

        A folder that has one variant of the weights and no plain ones is read as that variant. Raises ModelError
        naming component, cause and remedy.
        """
        what, folder = self.what(part), self.path / part
        if not Path(self.spec.name).is_dir() and not weight_sets(folder, stem):
            raise ModelError(_not_fetched(what, self.spec))
        variant, files = choose_weights(folder, stem, self.spec.variant)
        if variant != self.spec.variant:
            log.warning("%s: only variant %s exists; it is used", files[0].parent, variant)
        dtype = {"dtype" if stem == TEXT_STEM else "torch_dtype": self.dtype}
        options = {"variant": variant, "use_safetensors": True, "output_loading_info": True, **dtype}
        try:
            module, report = cls.from_pretrained(self.path, subfolder=part, local_files_only=True, **options)
        except Exception as error:  # the libraries raise many kinds here, for configs and weights alike
            for file in files:
                check_weights(file)  # names a file that contains something else than weights
            raise ModelError(_why_no_component(what, error)) from error
        check_report(what, report, is_text=stem == TEXT_STEM)
        check_module(what, module)
        return module


def find_folder(spec: ModelSpec, parts: Iterable[str], dtype: torch.dtype = torch.float32) -> ModelFolder:
    """The folder that a spec names; of a Hub id the place in the Hub's cache, with the files of `parts` fetched.

    OWNER/NAME::FOLDER is a folder of a repository. Raises ModelError where there is none.
    """
    name, _, inside = spec.name.partition("::")
    if Path(spec.name).is_dir():
        return ModelFolder(spec, Path(spec.name), dtype)
    if not is_hub_id(name):
        raise ModelError(f"{spec.name!r} does not exist; {_A_BASE_IS}")
    from huggingface_hub import snapshot_download

    patterns = [f"{inside}/{file}".lstrip("/") for file in files_of(parts, spec.variant)]
    try:
        path = snapshot_download(name, revision=spec.revision, allow_patterns=patterns)
    except Exception as error:  # the Hub's, the connection's and the disk's
        raise ModelError(f"{name!r} is not a folder on this machine, and {why_not_fetched(name, error)}") from error
    return ModelFolder(spec, Path(path) / inside, dtype)


def files_of(parts: Iterable[str], variant: str | None) -> list[str]:
    """Patterns for the files of a repository that loading reads: configs, tokenizers, one variant of the weights."""
    late = "" if variant is None else f".{variant}"
    patterns = ["model_index.json", "scheduler/*", "unet/config.json"]
    for part in parts:
        stem = f"{part}/{TEXT_STEM if part.startswith('text_encoder') else UNET_STEM}".removeprefix("/")
        patterns += [f"{part}/config.json".removeprefix("/"), f"{stem}*.index*.json"]
        patterns += [f"{stem}{late}.safetensors", f"{stem}{late}-?????-of-?????.safetensors"]
        patterns += [f"{stem}-?????-of-?????{late}.safetensors"]
        if part.startswith("text_encoder"):
            patterns.append(f"{part.replace('text_encoder', 'tokenizer')}/*")
    return patterns


def read_index(folder: ModelFolder) -> dict[str, Any]:
    """The pipeline's model_index.json. Raises ModelError for a folder that is no pipeline."""
    return folder.read("model_index.json", partial(_why_no_pipeline, folder))


def outline_unet(folder: ModelFolder) -> UNet:
    """The UNet of a pipeline as its config describes it, without weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    config = folder.config("unet")
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except Exception as error:  # a config of nonsense fails in as many ways as there are settings
        raise ModelError(_why_no_component(folder.what("unet"), error)) from error


def load_other_vae(name: str, dtype: torch.dtype) -> VAE:
    """The autoencoder of a folder or Hub id; of a whole pipeline its vae."""
    if name.endswith(".safetensors"):
        raise ModelError(
            f"the VAE {name!r} is one file, but a diffusers folder or Hub id is required: convert it "
            "once with diffusers' AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER), or "
            "name a pipeline that has it"
        )
    folder = find_folder(ModelSpec(name), ("", "vae"), dtype)
    return load_vae(folder, "vae" if (folder.path / "model_index.json").is_file() else "")


def load_vae(folder: ModelFolder, part: str = "vae") -> VAE:
    """The autoencoder of a folder, of the class that its config names."""
    import diffusers

    name = str(folder.config(part).get("_class_name", "AutoencoderKL"))
    if not (name.startswith("A") and "Autoencoder" in name and hasattr(diffusers, name)):
        raise ModelError(f"the VAE of {folder.spec.name!r} is a {name!r}; {_VAE_IS}")
    with _known_attributes():
        return folder.load(getattr(diffusers, name), part)


@contextmanager
def _known_attributes() -> Iterator[None]:
    """Without diffusers' warning of `block_out_channels` in the config of an AutoencoderDC, and with every other.

    SD's pipelines read the downsampling factor from this entry (`vae_factor`), which that class does not have.
    """
    logger = logging.getLogger("diffusers.configuration_utils")

    def shown(record: logging.LogRecord) -> bool:
        return not _BLOCKS_OF_DC.match(record.getMessage())

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def load_text(folder: ModelFolder, suffix: str) -> tuple[Any, TextModel]:
    """A tokenizer and its text model; suffix "" is the first, "_2" SDXL's second."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    cls = CLIPTextModelWithProjection if suffix else CLIPTextModel
    model = folder.load(cls, f"text_encoder{suffix}", TEXT_STEM)
    path, what = folder.path / f"tokenizer{suffix}", folder.what(f"tokenizer{suffix}")
    if not (path / "tokenizer.json").is_file() and not {"vocab.json", "merges.txt"} <= {f.name for f in path.glob("*")}:
        raise ModelError(_no_tokenizer(what, path))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged file fails in as many ways as there are tokens
        raise ModelError(_why_no_component(what, error)) from error
    check_tokenizer(what, tokenizer, model)
    return tokenizer, model


def check_tokenizer(what: str, tokenizer: Any, model: nn.Module) -> None:
    """Raises ModelError for a tokenizer that is empty (without files transformers makes such) or not this model's."""
    config: Any = model.config
    tokens, length, again = len(tokenizer), tokenizer.model_max_length, "copy the folder again from the base's source"
    if tokens > config.vocab_size or 2 * tokens < config.vocab_size:
        raise ModelError(
            f"{what} has {tokens} tokens, and its text encoder {config.vocab_size}: {_TOKENIZER_FILES} "
            f"are missing or belong to another model; {again}"
        )
    if length > config.max_position_embeddings:
        raise ModelError(
            f"{what} has model_max_length = {length:.4g}, and its text encoder takes {config.max_position_embeddings} "
            f"tokens: tokenizer_config.json is missing or belongs to another model; {again}"
        )


def _no_tokenizer(what: str, folder: Path) -> str:
    names = ", ".join(sorted(file.name for file in folder.glob("*")))
    return (
        f"{what} has no files: it needs {_TOKENIZER_FILES} and {folder} contains {names or 'nothing'}. Copy that "
        "folder from the base's source, or fetch it with `hf download`"
    )


def load_scheduler(folder: ModelFolder) -> tuple[dict[str, Any], NoiseSchedule]:
    """The scheduler's config and its noise, as `complete_scheduler` gives them."""
    file = "scheduler/scheduler_config.json"
    return complete_scheduler(folder.read(file, partial(_why_no_scheduler, folder.spec.name)), folder.spec)


def complete_scheduler(config: dict[str, Any], spec: ModelSpec) -> tuple[dict[str, Any], NoiseSchedule]:
    """A scheduler config with the defaults of the class that it names, and the noise that it describes.

    The spec's prediction type and scheduler settings replace the config's, and the log says what that changes. Raises
    ModelError that names the base for noise not tuned here, and for a class that lacks a package.
    """
    import diffusers

    override = dict(spec.scheduler or {})
    if spec.prediction_type is not None:
        override["prediction_type"] = spec.prediction_type
    try:
        own, config = config, overridden(config, override) if spec.scheduler else config | override
        schedule = NoiseSchedule.from_config(config)
        if override:
            _log_changes(spec.name, own, schedule)
        name = config.get("_class_name")
        full = config if name is None else dict(getattr(diffusers, name).from_config(config).config)
    except (DiffalignError, ImportError) as error:  # LMSDiscreteScheduler and others want packages of their own
        raise ModelError(f"the scheduler of {spec.name!r}: {' '.join(str(error).split())}") from error
    plain = {key: value for key, value in full.items() if not key.startswith("_")}
    return plain | {"_class_name": name or "DDIMScheduler"}, schedule


def _log_changes(source: str, own: dict[str, Any], schedule: NoiseSchedule) -> None:
    with suppress(DiffalignError):  # the config's own settings may be what the override corrects
        if changed := changes(NoiseSchedule.from_config(own), schedule):
            log.info("the scheduler of %s: %s", source, changed)


def _why_no_scheduler(source: str, error: Exception) -> str:
    return f"no scheduler/scheduler_config.json in {source!r} that can be read: {_first_line(error)}"


def _why_no_pipeline(folder: ModelFolder, error: Exception) -> str:
    source = folder.spec.name
    if (folder.path / "model_index.json").is_file():
        return f"{source}/model_index.json cannot be read ({_first_line(error)}); download the model again"
    if (folder.path / "unet").is_dir() or list(folder.path.glob("*.safetensors")):
        return (
            f"{source!r} contains tuned weights but no model_index.json: it is not a base model. Set "
            "pretrained_model_name_or_path to the model it was tuned from, and give this folder as "
            "the tuned weights"
        )
    return f"{source!r} has no model_index.json; {_A_BASE_IS}"


def _not_fetched(what: str, spec: ModelSpec) -> str:
    hint = "" if spec.variant else ". If the repository has only fp16 weights, set model.variant: fp16"
    return f"cannot load {what}: {why_not_fetched(spec.name, FileNotFoundError('no weights'))}{hint}"


def _why_no_component(what: str, error: Exception) -> str:
    """`error` of a library, with what to do."""
    return (
        f"cannot load {what}: {type(error).__name__}: {_first_line(error)[:300]}. Its config and its "
        "weights must be complete and belong to one model; download it again, or save it again from a "
        "working copy"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
