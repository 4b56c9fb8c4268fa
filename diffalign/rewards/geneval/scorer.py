"""GenEval as a scorer: 1 where a detector finds what the prompt asks for, else 0; counted by skill.

Differs from the release, which needs packages that no longer install: any object detector of transformers stands in
place of Mask2Former (`AutoModelForObjectDetection`), and since such a detector gives boxes without masks, the colour is
judged on the whole box. The release paints what is outside the object's mask grey. Confidences of another detector
are on another scale, so figures of two detectors, and those of the paper, do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.io.loaded_weights import check_module, check_report
from diffalign.io.weight_files import check_folder
from diffalign.rewards.base import ScorerError, check_lengths
from diffalign.rewards.clip import Clip, load_clip, load_or_explain
from diffalign.rewards.geneval.prompts import ALIASES, CLASSES, COLOURS, read_prompt
from diffalign.rewards.geneval.rules import CONFIDENCE, Box, Detection, why_wrong

BATCH = 8  # images per forward of the detector
COLOUR_CLIP = "openai/clip-vit-large-patch14"  # the release's


class GenEval:
    """Share of images that show what is asked for; 0 or 1 each."""

    name = "geneval"
    span = (0.0, 1.0)

    def __init__(self, path: str = "", *, device: str = "cpu") -> None:
        """path: DETECTOR or DETECTOR,CLIP, folders or Hub ids; CLIP judges colours and is loaded when one is asked for.

        Raises ScorerError where the detector is missing, damaged or has none of COCO's classes.
        """
        detector, _, clip = path.partition(",")
        if not detector:
            raise ScorerError(
                "geneval needs a detector: give geneval=PATH, a folder or Hub id of transformers' object detection, "
                "e.g. geneval=facebook/detr-resnet-50"
            )
        self.detector_path, self.clip_path, self.device = detector, clip or COLOUR_CLIP, device
        self.processor, self.model, self.labels = _load_detector(detector, device)

    @cached_property
    def clip(self) -> Clip:
        """The judge of colours."""
        return load_clip(self.clip_path, self.clip_path, self.device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ScorerError for a prompt of another form, a class that the detector lacks, or a missing judge of colours."""
        for prompt in prompts:
            things = read_prompt(prompt).things
            for thing in things:
                if thing.name not in self.labels.values():
                    raise ScorerError(
                        f"the detector {self.detector_path} has no class {thing.name!r}, which {prompt!r} needs; give "
                        "one trained on COCO"
                    )
            if any(thing.colour for thing in things):
                _ = self.clip

    def group_of(self, prompt: str) -> str:
        """The skill that the prompt tests."""
        return read_prompt(prompt).skill

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Zeros and ones [n] float32."""
        check_lengths(self.name, images, prompts)
        self.check_prompts(prompts)
        return torch.tensor([float(why is None) for why in self.reasons(images, prompts)])

    def reasons(self, images: Sequence[Image], prompts: Sequence[str]) -> list[str | None]:
        """Why each image is wrong; None where it is right."""
        found: list[str | None] = []
        for start in range(0, len(images), BATCH):
            some = [image.convert("RGB") for image in images[start : start + BATCH]]
            for image, prompt, detections in zip(some, prompts[start : start + BATCH], self.detect(some), strict=True):

                def colour_of(box: Box, name: str, image: Image = image) -> str:
                    return self.colour(image, box, name)

                found.append(why_wrong(read_prompt(prompt), detections, colour_of))
        return found

    @torch.no_grad()
    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """The objects in each image, of COCO's classes alone."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=CONFIDENCE, target_sizes=sizes
        )
        return [
            [
                Detection(self.labels[label], confidence, tuple(box))
                for label, confidence, box in zip(*(one[key].tolist() for key in ("labels", "scores", "boxes")))
                if label in self.labels
            ]
            for one in results
        ]

    def colour(self, image: Image, box: Box, name: str) -> str:
        """The colour of COLOURS whose prompts are nearest to the image in the box, by CLIP."""
        left, top = (min(max(round(box[i]), 0), image.size[i] - 1) for i in (0, 1))
        right, bottom = (max(min(round(box[i + 2]), image.size[i]), (left, top)[i] + 1) for i in (0, 1))
        seen = self.clip.embed_images([image.crop((left, top, right, bottom))])[0]
        return COLOURS[int((self._colour_vectors(name) @ seen).argmax())]

    def _colour_vectors(self, name: str) -> Tensor:
        """One unit vector for each colour [colour, d]: the mean over three ways to say it."""
        ways = ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")
        texts = [way.format(colour) for colour in COLOURS for way in ways]
        return nn.functional.normalize(self.clip.embed_prompts(texts).unflatten(0, (-1, len(ways))).mean(1), dim=-1)


def _load_detector(path: str, device: str) -> tuple[Any, Any, dict[int, str]]:
    """Image processor, model, and the label of each of COCO's classes. Raises ScorerError."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processors: Any = AutoImageProcessor
    models: Any = AutoModelForObjectDetection
    if Path(path).is_dir():
        check_folder(Path(path))
    processor = load_or_explain(path, lambda: processors.from_pretrained(path))
    model, report = load_or_explain(
        path, lambda: models.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    )
    check_report(f"the detector {path!r}", report)
    check_module(f"the detector {path!r}", model)
    names = {int(label): ALIASES.get(name.lower(), name.lower()) for label, name in model.config.id2label.items()}
    labels = {label: name for label, name in names.items() if name in CLASSES}
    if not labels:
        raise ScorerError(
            f"the detector {path} has none of COCO's classes (its first: {list(names.values())[:3]}); give one trained "
            "on COCO"
        )
    if not hasattr(processor, "post_process_object_detection"):
        raise ScorerError(
            f"the detector {path}: {type(processor).__name__} gives no boxes; give an object detector, e.g. "
            "facebook/detr-resnet-50"
        )
    return processor, model.eval().requires_grad_(False).to(device, torch.float32), labels
