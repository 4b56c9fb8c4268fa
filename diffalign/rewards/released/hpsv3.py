"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads image, prompt and instruction; a head on one token gives mu and sigma.

    score = mu,   of (mu, sigma) = head(Qwen2-VL(image, text)["<|Reward|>"])

Every image is resized to about 448 x 448. The network computes in bfloat16 as released, the head in float32. It needs
17 GB of memory on the device.

Needed: `HPSv3.safetensors` of MizzenAI/HPSv3; config and tokenizer of Qwen/Qwen2-VL-7B-Instruct; and the authors'
wording of the instruction, which is not part of this package. It is read, never run, from `data_collator_qwen.py` or
the wheel `hpsv3-1.0.0-py3-none-any.whl` in the folder of the weights, or from an installed `hpsv3`.
"""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.rewards.base import ScorerError, check_finite, check_lengths
from diffalign.rewards.clip import hub_file, load_or_explain, load_state
from diffalign.rewards.released.build import build
from diffalign.rewards.released.qwen import MERGE, QwenReward, patches_of, split_qwen

REPO, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
WORDING, WHEEL, PARTS = (
    "data_collator_qwen.py",
    "hpsv3-1.0.0-py3-none-any.whl",
    ("INSTRUCTION", "prompt_with_special_token"),
)
WORDING_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"  # of both parts in a row
BATCH = 8


class HPSv3:
    """About -5 to 15 on ordinary images: the authors' means are -.2 for SD2, 8.2 for SDXL, 10.6 for Kolors."""

    name = "hpsv3"
    span = (-5.0, 15.0)
    tie = 0.05  # above what bfloat16 resolves at 10: 2^-8 of it is .04

    def __init__(
        self, path: str = REPO, *, base: str = BASE, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
    ) -> None:
        """`path`: the file, a folder with it, or a Hub id. `base`: folder or Hub id of config and tokenizer; a folder
        `path` that has a config.json is taken instead."""
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        self.wording = read_wording(folder)
        source = str(folder) if (folder / "config.json").is_file() else base
        file = hub_file(path, FILE)
        self.tokenizer, config = load_base(source)
        self.network = qwen_reward(load_state(file), config, str(file), dtype).to(device)
        self.places = places_of(self.tokenizer, len(self.network.text.embed_tokens.weight), str(file))
        self.device = device

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """mu, [n]. Raises ScorerError naming the prompt of a score that is not finite."""
        check_lengths(self.name, images, prompts)
        self.check_prompts(prompts)
        parts = []
        for start in range(0, len(images), BATCH):
            read = [patches_of(image) for image in images[start : start + BATCH]]
            grids = torch.stack([grid for _, grid in read])
            patches = torch.cat([some for some, _ in read]).to(self.device)
            tokens = self._tokens(prompts[start : start + BATCH], grids)
            given = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
            parts.append(self.network(*given, (patches, grids.to(self.device)), self.places)[:, 0].cpu())
        return check_finite(self.name, torch.cat(parts) if parts else torch.empty(0), prompts)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ScorerError for a prompt that contains one of the two tokens with a place in the text."""
        for prompt in prompts:
            if REWARD in prompt or IMAGE in prompt:
                raise ScorerError(f"hpsv3 cannot read the prompt {prompt!r}: {REWARD} and {IMAGE} have a meaning in it")

    def _tokens(self, prompts: Sequence[str], grids: Tensor) -> Any:
        """Tokens and mask, padded on the right; an image has a token for each merged block of its patches."""
        texts = []
        for prompt, grid in zip(prompts, grids, strict=True):
            said = self.wording[0].format(text_prompt=prompt) + self.wording[1]
            content = [{"type": "image"}, {"type": "text", "text": said}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            texts.append(text.replace(IMAGE, IMAGE * (int(grid.prod()) // MERGE**2)))
        return self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


def read_wording(folder: Path) -> tuple[str, str]:
    """The instruction and what follows it, from the authors' file. Raises ScorerError saying where to get it."""
    source = _wording_source(folder)
    parts = {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found = tuple(str(parts.get(name)) for name in PARTS)
    if hashlib.sha256("".join(found).encode()).hexdigest() != WORDING_SHA256:
        raise ScorerError(
            f"the instruction of hpsv3 ({', '.join(PARTS)} in {WORDING}) is not that of the release 1.0.0, so scores "
            f"would differ; {_HOW}"
        )
    return found[0], found[1]


_HOW = f"put {WHEEL} beside the weights (pip download --no-deps hpsv3==1.0.0), or pip install --no-deps hpsv3==1.0.0"


def _wording_source(folder: Path) -> str:
    if (folder / WORDING).is_file():
        return (folder / WORDING).read_text(encoding="utf-8")
    if (folder / WHEEL).is_file():
        with zipfile.ZipFile(folder / WHEEL) as wheel:
            return wheel.read(f"hpsv3/dataset/{WORDING}").decode("utf-8")
    try:
        installed = Path(str(distribution("hpsv3").locate_file(f"hpsv3/dataset/{WORDING}")))
    except PackageNotFoundError:
        installed = Path()
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    raise ScorerError(f"hpsv3 needs the authors' wording of its instruction (its code is not run): {_HOW}")


def load_base(source: str) -> tuple[Any, Any]:
    """Tokenizer (with the scored token added) and config of Qwen2-VL. Raises ScorerError for a missing file."""
    from transformers import AutoTokenizer, Qwen2VLConfig

    config = load_or_explain(source, lambda: Qwen2VLConfig.from_pretrained(source))
    tokenizer: Any = load_or_explain(source, lambda: AutoTokenizer.from_pretrained(source))
    if not tokenizer.chat_template:
        raise ScorerError(f"the tokenizer in {source} has no chat_template; download {BASE} whole")
    tokenizer.add_tokens([REWARD], special_tokens=True)
    return tokenizer, config


def places_of(tokenizer: Any, rows: int, where: str) -> tuple[int, int]:
    """The ids of an image's tokens and of the scored one. Raises ScorerError unless the latter is the last row."""
    image, reward = (int(tokenizer.convert_tokens_to_ids(token)) for token in (IMAGE, REWARD))
    if reward != rows - 1:
        raise ScorerError(
            f"{where} has {rows} embeddings, and {REWARD} is token {reward} of the tokenizer, not the last of them; "
            f"take the tokenizer of {BASE}"
        )
    return image, reward


def qwen_reward(state: dict[str, Tensor], config: Any, where: str, dtype: torch.dtype) -> QwenReward:
    """The network from the released tensors, its head in float32. Raises ScorerError or ModelError naming a fault."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

    vision, text, head = split_qwen(state)
    if "embed_tokens.weight" not in text:
        raise ScorerError(f"{where} is not HPSv3's weights: it has no embed_tokens.weight")
    config.text_config.vocab_size = len(text["embed_tokens.weight"])
    what = "hpsv3's image encoder", "hpsv3's language model"
    return QwenReward(
        build(what[0], Qwen2VisionTransformerPretrainedModel, config.vision_config, vision, dtype=dtype),
        build(what[1], Qwen2VLTextModel, config.text_config, text, dtype=dtype),
        reward_head(head, where),
    )


def reward_head(state: dict[str, Tensor], where: str) -> nn.Sequential:
    """Three linear layers with ReLU between, the last with two outputs, in float32. Raises ScorerError for others."""
    layers: list[nn.Module] = []
    for number in (0, 3, 5):  # a ReLU and a dropout are between the first two, a ReLU before the last
        weight, bias = state.get(f"{number}.weight"), state.get(f"{number}.bias")
        if weight is None or bias is None or len(state) != 6 or (number == 5 and len(weight) != 2):
            found = {name: tuple(value.shape) for name, value in state.items()}
            raise ScorerError(f"{where} has another reward head than HPSv3: expected layers 0, 3, 5, found {found}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)
