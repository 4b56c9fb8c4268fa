"""A CLIP model as every scorer here needs it: unit vectors of images and of prompts.

The projections are called by hand, because `CLIPModel.get_image_features` returns a tensor in transformers 4
and an output object in transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.io.loaded_weights import check_module, check_report
from diffalign.io.pickles import torch_reason
from diffalign.io.weight_files import check_folder, check_weights
from diffalign.rewards.base import ScorerError
from diffalign.rewards.preprocess import Fit, clip_pixels, crop

T = TypeVar("T")
BATCH = 32  # images or prompts per forward: ViT-H in float32 stays below 3 GiB


class Clip:
    """A frozen CLIPModel with its tokenizer, in float32 on one device."""

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self.model: Any = model.requires_grad_(False).eval().to(device, torch.float32)
        self.tokenizer = tokenizer
        self.device = device
        self.image_size: int = self.model.config.vision_config.image_size

    @property
    def logit_scale(self) -> Tensor:
        """The learned factor on the cosine, exp already taken."""
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image], fit: Fit = crop) -> Tensor:
        """Unit vectors "n d" on the CPU."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = clip_pixels(images[start : start + BATCH], self.image_size, fit).to(self.device)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            parts.append(nn.functional.normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.projection_dim)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors "n d" on the CPU; a prompt that occurs several times is encoded once.

        Prompts are cut to the model's context (77 tokens), as the published scorers do.
        """
        unique = list(dict.fromkeys(prompts))
        parts = []
        for start in range(0, len(unique), BATCH):
            tokens = self.tokenizer(
                unique[start : start + BATCH],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            out = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            parts.append(nn.functional.normalize(self.model.text_projection(out.pooler_output), dim=-1).cpu())
        if not parts:
            return torch.empty(0, self.model.config.projection_dim)
        place = {prompt: i for i, prompt in enumerate(unique)}
        return torch.cat(parts)[[place[prompt] for prompt in prompts]]

    def cosine(self, images: Sequence[Image], prompts: Sequence[str], fit: Fit = crop) -> Tensor:
        """Cosine of image i and prompt i, [n]."""
        return (self.embed_images(images, fit) * self.embed_prompts(prompts)).sum(-1)


def load_clip(path: str, tokenizer: str, device: str) -> Clip:
    """CLIPModel weights (safetensors only) from a folder or Hub id.

    The tokenizer is taken from `path` when that is a folder with one, else from `tokenizer`.
    """
    from transformers import CLIPModel

    cls: Any = CLIPModel  # its annotation has no loading info
    if Path(path).is_dir():
        check_folder(Path(path))
    model, report = load_or_explain(
        path, lambda: cls.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    )
    check_report(f"the CLIP model {path!r}", report)
    check_module(f"the CLIP model {path!r}", model)
    return Clip(model, load_tokenizer(path, tokenizer), device)


def load_tokenizer(path: str, default: str) -> Any:
    """The CLIP tokenizer lying in the folder `path`, else the one at `default`."""
    from transformers import CLIPTokenizer

    own = any((Path(path) / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    source = path if own else default
    return load_or_explain(source, lambda: CLIPTokenizer.from_pretrained(source))


def hub_file(path: str, filename: str, other: str = "") -> Path:
    """The weight file at `path` (a file, or a folder with `filename` or `other`), or from the Hub id `path`."""
    local = Path(path)
    if local.is_file():
        return local
    for name in filter(None, (filename, other)):
        if (local / name).is_file():
            return local / name
    from huggingface_hub import hf_hub_download

    return Path(load_or_explain(path, lambda: hf_hub_download(path, filename), filename))


def load_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle file read without running its code."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_weights(file)
        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint, or contains code
        raise ScorerError(
            f"{file} cannot be read as weights ({torch_reason(error)}); download it again, give a "
            ".safetensors file, or convert it once: diffalign convert FILE --out NEW.safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ScorerError(f"{file} has no state dict (names and tensors); download it again")
    return state


def load_or_explain(source: str, load: Callable[[], T], filename: str = "") -> T:
    """What `load` returns; a missing file becomes a ScorerError that names what to download, and where to put it."""
    _hide_loading_bars()
    try:
        return load()
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise ScorerError(f"the files in {source} cannot be used: {error}") from error
        raise ScorerError(
            f"'{source}' is neither a folder on this machine nor in the Hub cache, and it could not be "
            f"downloaded. On a machine with a network run\n    hf download {source} {filename}\n"
            "which fills the Hub cache ($HF_HOME), or copy the folder here and name it after the scorer, "
            "as in --scorer pickscore=/path/to/folder"
        ) from error


def _hide_loading_bars() -> None:
    """No bars for reading local files, as where models are loaded; downloads keep theirs."""
    import transformers.utils.logging
    from huggingface_hub.utils import enable_progress_bars

    transformers.utils.logging.disable_progress_bar()  # switches the Hub's bars off as well
    enable_progress_bars()
