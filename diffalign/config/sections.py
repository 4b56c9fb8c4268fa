"""The sections of a config: every setting with its type, its bounds and its default."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from diffalign.config.data_sections import (
    BucketsSection,
    CurriculumSection,
    Scores,
    axes_of,
    checked_scores,
    count_or_path,
    packaged_asset,
    share_or_path,
)
from diffalign.config.scheduler_section import SchedulerSection
from diffalign.config.value_types import (
    Confidence,
    Count,
    CountOrNone,
    Decay,
    Fraction,
    Guidance,
    LearningRate,
    MergeWeight,
    NotNegative,
    Number,
    PathText,
    Pixels,
    Positive,
    Section,
    Seed,
    Share,
    Skipped,
    Switch,
    Text,
    Workers,
)
from diffalign.data.prompt_sets.known import named
from diffalign.data.spec import DataSpec, PairsOfRanking
from diffalign.data.table.score_aggregation import Aggregate, Axis
from diffalign.errors import DiffalignError
from diffalign.models.spec import ModelSpec
from diffalign.models.text.spec import TextSpec, text_spec_of

# Settings that only a run with an objective has.
OBJECTIVE_ONLY = {
    "model": ("gradient_checkpointing", "compile", "channels_last", "fused_kernels"),
    "data": (
        "cache_dir",
        "cache_variants",
        "cache_dtype",
        "cache_trajectories",
        "draws_per_pair",
        "cache_reference_errors",
        "scores",
        "aggregate",
        "relabel",
        "curriculum",
        "aspect_buckets",
        "users",
        "proportion_empty_prompts",
    ),
    "training": (
        "ema_decay",
        "max_unet_forwards",
        "reference_batch_size",
        "ref_model_sync_steps",
        "ref_model_mixup_alpha",
        "ref_model_decay",
        "ref_model_max_distance",
    ),
}
STORED_BEFORE = {"gradient_checkpointing": "none"}  # 0.1.0's default, which its preference-model runs stored
ADAM_ONLY = ("adam_beta1", "adam_beta2", "adam_epsilon")


class ModelSection(Section):
    """The base model."""

    _shipped = field_validator("pretrained_model_name_or_path", mode="before")(packaged_asset)

    pretrained_model_name_or_path: PathText  # diffusers folder, Hub id, or a single-file .safetensors checkpoint
    pretrained_vae_model_name_or_path: PathText | None = None  # e.g. an fp16-safe SDXL VAE
    revision: Text | None = None
    variant: Text | None = None  # e.g. fp16
    single_file_config: PathText | None = None  # folder with the configs of a single-file checkpoint, for work offline
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None  # null: the scheduler config's
    # LoRA files (paths or Hub ids) that become part of the base, each with its weight
    merge_lora: dict[PathText, MergeWeight] = {}  # noqa: RUF012 - pydantic copies it
    scheduler: SchedulerSection | None = None  # other settings in place of the scheduler config's
    # training alone, for bases whose release trained and sampled differently; null: the base's own
    rescale_betas_zero_snr: Switch | None = None  # SDXL-Turbo in Diffusion-DPO's release: true
    force_zeros_for_empty_prompt: Switch | None = None  # SDXL's null prompt; Diffusion-DPO's release encodes "": false
    max_token_length: Count | None = None  # tokens of a prompt without BOS and EOS: 75, 150, 225, …; null: one chunk
    chunk_layout: Literal["kohya", "webui"] = "kohya"  # of several chunks: BOS and EOS once, or around each chunk
    clip_skip: Skipped = 0  # last layers of the text encoders left out, as in diffusers: one less than A1111's number
    prompt_weights: Literal["literal", "refuse"] | None = None  # (word:1.2) as plain text; null: with a warning
    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "math"] = "auto"
    # true means full, false none; auto: full for SDXL on CUDA
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    compile: Switch = False  # torch.compile of each transformer and resnet block
    channels_last: Switch = False  # convolutions in NHWC
    fused_kernels: Switch = False  # Triton kernels for GroupNorm with SiLU, and GEGLU; needs channels_last

    @property
    def spec(self) -> ModelSpec:
        """How the base is loaded."""
        values = self.model_dump(include={field.name for field in fields(ModelSpec)})
        return ModelSpec(**values | {"scheduler": None if self.scheduler is None else self.scheduler.given})

    @property
    def text(self) -> TextSpec:
        """How prompts become embeddings."""
        return text_spec_of(self)

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {"true": "full", "yes": "full", "false": "none", "no": "none"}.get(str(value).lower(), value)


class DataSection(Section):
    """The preference pairs and how they become latents."""

    _shipped = field_validator("path", "users", mode="before")(packaged_asset)

    path: PathText  # file, folder, Hub id, or the URL of parquet shards
    format: Text = "auto"
    split: Text = "train"
    # part -> column where names differ, e.g. {prompt: text, chosen: winner}
    columns: dict[Text, Text] = {}  # noqa: RUF012 - pydantic copies it
    max_pairs: Count | None = None
    invert_preference: Switch = False
    # of rankings of several images (HPDv2's json): all pairs, the best with the worst, or neighbours in the ranking
    pairs_of_ranking: PairsOfRanking = "all"
    # files of scores by `diffalign data score`, in place of score columns: one, several, or named axes with weights
    scores: Scores | None = None
    aggregate: Aggregate = "sum"  # how several axes of scores become a pair's two
    relabel: Switch = False  # the image with the higher of these scores is the chosen one, whatever the labels say
    users: PathText | None = None  # file of users' embeddings, where the pairs name their user by an id
    resolution: Pixels | None = None  # pixels; null: the model family's
    aspect_buckets: BucketsSection | None = None  # sizes beside the square; null: every pair becomes a square
    center_crop: Switch = True
    random_flip: Switch = False
    proportion_empty_prompts: Fraction = 0.0
    verify: Literal["none", "header", "full"] = "header"
    cache_dir: PathText | None = None  # encode once, train without VAE and text encoders
    cache_variants: Count = 1  # crops/flips of each pair in the cache
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of moments and embeddings in the cache
    cache_trajectories: Switch = False  # cache the reference's inversions, for objectives that use them
    draws_per_pair: Count | None = None  # a pair's visits repeat after so many: latent, t, noise; null: never
    cache_reference_errors: Switch = False  # evaluate the reference once for each draw and cache its errors
    dataloader_num_workers: Workers = 0
    shuffle_buffer: Count | None = None  # of remote shards: pairs that are mixed; null: 1,024
    curriculum: CurriculumSection | None = None  # null: every pair from the start

    _scores = field_validator("scores", mode="before")(checked_scores)

    @property
    def axes(self) -> list[Axis]:
        """The files of scores with names and weights; empty without any."""
        return axes_of(self.scores)

    @property
    def spec(self) -> DataSpec:
        """How the rows are read as pairs."""
        shared = {
            name: getattr(self, name)
            for name in ("format", "split", "max_pairs", "invert_preference", "verify", "pairs_of_ranking")
        }
        return DataSpec(columns=self.columns or {}, **shared)


class DecaySection(Section):
    """The share that the reference keeps of itself: min(rate · max(0, updates − after), at_most), 0 until then."""

    after: CountOrNone = 0  # optimiser updates of the run
    rate: Annotated[Fraction, Field(gt=0)] = 0.001  # for each update
    at_most: Annotated[Fraction, Field(lt=1)] = 0.5


class TrainingSection(Section):
    """Optimisation, precision, checkpoints, logging."""

    max_train_steps: Count = 2000
    max_unet_forwards: Count | None = None  # end before the step that would exceed so many images through the UNet
    train_batch_size: Count = 1  # pairs per device and micro-step
    gradient_accumulation_steps: Count = 1
    reference_batch_size: Count | None = None  # pairs in one forward of the reference; null: train_batch_size
    # the reference follows the policy: (1 - alpha) reference + alpha policy after every so many steps; TRL's names
    ref_model_sync_steps: Count | None = None  # null: the reference stays as it is
    ref_model_mixup_alpha: Annotated[Fraction, Field(gt=0)] = 1.0  # 1: a copy of the policy
    ref_model_decay: DecaySection | None = (
        None  # in place of alpha: a share of the reference that grows; null: 1 - alpha
    )
    ref_model_max_distance: Positive | None = None  # of the reference from its start, relative; null: no bound
    learning_rate: LearningRate = 1e-5
    scale_lr: Switch = False  # learning_rate × processes × accumulation × batch
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    lr_warmup_steps: CountOrNone = 0
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16", "adamw_8bit_bf16", "adafactor"] = "adamw"
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_weight_decay: NotNegative = 1e-2
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0  # null: no clipping; the norm is logged either way
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where CUDA computes in it, else no
    allow_tf32: Switch = False
    ema_decay: Decay | None = None  # null: no EMA
    checkpointing_steps: Count | None = None  # null: only the final weights
    checkpoints_total_limit: Count | None = None
    async_checkpoints: Switch = False  # flush, hash and rename beside the next steps
    resume_from_checkpoint: PathText | None = None  # a checkpoint folder, or "latest"
    logging_steps: Count = 10
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @property
    def bf16_weights(self) -> bool:
        """Whether the trained weights are bfloat16 themselves, without a float32 master."""
        return self.optimizer in ("adamw_bf16", "adamw_8bit_bf16")


class ValidationSection(Section):
    """What is measured during training: images of some prompts, and pairs that are not trained on."""

    KEY: ClassVar[str] = "validation"
    OLD_NAMES: ClassVar[dict[str, str]] = {"steps": "num_inference_steps"}  # 0.1.0

    _pairs = field_validator("pairs", mode="before")(share_or_path)
    _guard_prompts = field_validator("guard_prompts", mode="before")(count_or_path)

    prompts: tuple[Text, ...] = ()
    every: Count = 100  # optimiser steps
    num_inference_steps: Count = 25
    guidance_scale: Guidance = 5.0
    seed: Seed = 0  # of the images' noise
    user: Text | None = None  # an id in data.users: whom the images are for
    pairs: Share | PathText | None = None  # held-out pairs: a share of the training pairs, by prompt, or other pairs
    pairs_seed: Seed = 0  # of the prompts that are held out, and of the points of their pairs
    pairs_every: Count = 100  # optimiser steps, a multiple of training.logging_steps
    pairs_split: Text | None = None  # of the other pairs; null: data.split
    max_pairs: Count | None = None  # hold out, or use of the other pairs, at most so many
    points_per_pair: Annotated[Count, Field(multiple_of=4)] = 4  # (t, noise), the same at every measurement
    pairs_batch_size: Count | None = None  # pairs in a forward; null: training.train_batch_size
    early_stopping_patience: Count | None = None  # measurements without improvement; null: they do not end the run
    early_stopping_threshold: NotNegative = 0.0  # a change of the metric up to this is no improvement
    early_stopping_confidence: Confidence | None = 0.95  # that a change is not chance; null: any change counts
    on_plateau: Literal["stop", "continue"] = "stop"  # continue: only what is worse than the best counts as a failure
    plateau_weights: Literal["best", "latest"] = "best"  # final ones; latest: that is not worse by more than chance
    least_diversity: Share | None = None  # of images of one prompt, relative to the start; below, the run ends
    faithfulness: Text | None = None  # a scorer of how well these images follow their prompts
    least_faithfulness: Annotated[Number, Field(le=0)] | None = None  # change of its mean; below, the run ends
    guard_prompts: Count | Text = 48  # for which these images are sampled: so many of the held-out pairs', or a file
    guard_images: Annotated[Count, Field(ge=2)] = 4  # of each of these prompts
    load_best_model_at_end: Switch = False  # the final weights are those of the best measurement
    metric_for_best_model: Literal["score", "accuracy", "loss"] = "score"  # of the held-out pairs

    @property
    def stops_or_loads(self) -> bool:
        """Whether a measurement of held-out pairs decides when the run ends or which weights are final."""
        return self.ends_early or self.load_best_model_at_end

    @property
    def ends_early(self) -> bool:
        """Whether a measurement may end the run."""
        limits = (self.early_stopping_patience, self.least_diversity, self.least_faithfulness)
        return any(limit is not None for limit in limits)

    @property
    def guards(self) -> bool:
        """Whether images are sampled and measured where the held-out pairs are."""
        return self.least_diversity is not None or self.faithfulness is not None

    @property
    def samples(self) -> bool:
        """Whether the run samples images, for which it needs the VAE and the text encoders until its end."""
        return bool(self.prompts) or self.guards

    @field_validator("prompts")
    @classmethod
    def _texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in value:
            if (found := named(prompt)) is not None:
                raise DiffalignError(
                    f"{prompt!r} is a set of {found[0].rows} prompts; write the prompts themselves, "
                    f"e.g. some of `diffalign data prompts {prompt} --out prompts.jsonl`"
                )
        return value


class PreferenceModelSection(Section):
    """A preference model, trained to judge noisy images at any timestep: decoded (SPO's), or as latents (LPO's)."""

    _shipped = field_validator("pretrained_model_name_or_path", mode="before")(packaged_asset)

    kind: Literal["step_aware", "latent"] = "step_aware"  # a CLIP of decoded x̂_0, or the base's own blocks on x_t
    pretrained_model_name_or_path: PathText = "yuvalkirstain/PickScore_v1"  # the CLIP it starts from: folder or Hub id
    tokenizer: PathText = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # where that folder has none
    text_projection: PathText | None = None  # kind latent, SD: the CLIP whose text projection it starts from
    guidance_scale: Guidance = 5.0  # of the base's predictions (the SPO release's); latent: of its middle features
    relabel_with: Text | None = None  # a scorer whose verdict on the clean images replaces the labels
    relabel_gap: Fraction = 0.1  # difference of probabilities within which that verdict is a tie

    @model_validator(mode="after")
    def _of_its_kind(self) -> PreferenceModelSection:
        """Raises DiffalignError for a setting that only the other kind has."""
        other = ("text_projection",) if self.kind == "step_aware" else ("pretrained_model_name_or_path", "tokenizer")
        if idle := [k for k in other if getattr(self, k) != type(self).model_fields[k].default]:
            raise DiffalignError(f"{', '.join(idle)}: kind {self.kind} has no such setting; remove it")
        return self
