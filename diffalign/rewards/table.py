"""The built-in scorers: where each is, what its scores are, which weights it needs, and their licence.

A licence is that of the released weights, or of the authors' repository where the weights name none (marked *).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScorerEntry:
    """A built-in scorer, known without loading it."""

    target: str  # module:attribute
    score: str  # unit and usual range
    needs: str = "nothing"  # Hub ids or files
    licence: str = "Apache-2.0"  # of the weights


PICKSCORE = "yuvalkirstain/PickScore_v1"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

SCORERS = {
    "world": ScorerEntry("diffalign.world.scorer:WorldReward", "true reward of the embedded world, 0 to 1.9"),
    "world-size": ScorerEntry("diffalign.world.scorer:WorldSize", "a second true reward, 0 to 2"),
    "world-bold": ScorerEntry("diffalign.world.scorer:WorldBold", "true reward of one user, -1.5 to 2"),
    "world-quiet": ScorerEntry("diffalign.world.scorer:WorldQuiet", "true reward of another user, -1.5 to 2"),
    "world-accuracy": ScorerEntry("diffalign.world.scorer:WorldAccuracy", "0 or 1: the caption is right"),
    "world-step-aware": ScorerEntry(
        "diffalign.contrib.step_aware.scorer:world_step_aware", "exp(scale) * cos, of any timestep", "in the package"
    ),
    "world-latent-judge": ScorerEntry(
        "diffalign.contrib.latent_judge.scorer:world_latent_judge",
        "exp(scale) * cos of noisy latents, for the source rollout alone",
        "in the package",
    ),
    "emoji": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiReward", "true reward of the emoji world, -1 to 2", "in the package"
    ),
    "emoji-size": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiSize", "a second true reward, 0 to 2", "in the package"
    ),
    "emoji-accuracy": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiAccuracy", "0 or 1: the caption is right", "in the package"
    ),
    "emoji-classic": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiClassic", "probability of the style, 0 to 1", "in the package"
    ),
    "emoji-flat": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiFlat", "probability of the style, 0 to 1", "in the package"
    ),
    "emoji-glossy": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiGlossy", "probability of the style, 0 to 1", "in the package"
    ),
    "emoji-taste-glossy": ScorerEntry(
        "diffalign.world.emoji.scorer:EmojiTasteGlossy", "emoji + 2 x emoji-glossy, -1 to 4", "in the package"
    ),
    "pickscore": ScorerEntry(
        "diffalign.rewards.pickscore:PickScore",
        "exp(scale) * cos in logits, about 17 to 24",
        f"{PICKSCORE}, tokenizer of {_CLIP_H}",
        "MIT*",
    ),
    "hpsv2.1": ScorerEntry(
        "diffalign.rewards.hpsv21:HPSv21",
        "cos, about .2 to .33",
        f"xswu/HPSv2 (HPS_v2.1_compressed.pt), tokenizer of {_CLIP_H}",
    ),
    "imagereward": ScorerEntry(
        "diffalign.rewards.released.imagereward:ImageReward",
        "standard deviations of the training reward, about -2.5 to 2",
        "THUDM/ImageReward (ImageReward.pt), tokenizer of google-bert/bert-base-uncased",
    ),
    "hpsv3": ScorerEntry(
        "diffalign.rewards.released.hpsv3:HPSv3",
        "mu in logits, about -5 to 15",
        "MizzenAI/HPSv3 (17 GB), config and tokenizer of Qwen/Qwen2-VL-7B-Instruct, the wording in hpsv3==1.0.0",
        "MIT*",
    ),
    "mps": ScorerEntry(
        "diffalign.rewards.released.mps:MPS",
        "exp(scale) * cos in logits",
        f"RE-N-Y/mpsv1 (or MPS_overall_checkpoint.pth, converted), tokenizer of {_CLIP_H}",
        "MIT*",
    ),
    "clip": ScorerEntry(
        "diffalign.rewards.clip_score:ClipScore",
        "100 * cos, about 15 to 35",
        "openai/clip-vit-large-patch14",
        "MIT*",
    ),
    "geneval": ScorerEntry(
        "diffalign.rewards.geneval.scorer:GenEval",
        "0 or 1: a detector finds what the prompt asks for",
        "geneval=PATH: an object detector; openai/clip-vit-large-patch14 for colours",
        "that of PATH",
    ),
    "aesthetic": ScorerEntry(
        "diffalign.rewards.aesthetic:Aesthetic",
        "rating from 1 to 10, about 4 to 7",
        "trl-lib/ddpo-aesthetic-predictor (aesthetic-model.pth), openai/clip-vit-large-patch14",
        "Apache-2.0*",
    ),
    "ensemble": ScorerEntry(
        "diffalign.rewards.ensemble:Ensemble",
        "mean - k * std over scorers, in standard deviations of the measured images",
        "ensemble=FILE, which `diffalign score --ensemble FILE` writes",
        "those of its members",
    ),
    "remote": ScorerEntry(
        "diffalign.rewards.remote.client:Remote",
        "the server's unit and tie",
        "remote=URL of a scorer that is served elsewhere, e.g. by `diffalign serve-scorer`",
        "that of the scorer",
    ),
    "step-aware": ScorerEntry(
        "diffalign.contrib.step_aware.scorer:StepAware",
        "exp(scale) * cos in logits, of any timestep",
        "step-aware=PATH: a run's output folder, or the released file",
        "that of PATH",
    ),
    "latent-judge": ScorerEntry(
        "diffalign.contrib.latent_judge.scorer:LatentScorer",
        "exp(scale) * cos in logits, of noisy latents, for the source rollout alone",
        "latent-judge=PATH: a run's output folder, or a released folder",
        "that of PATH",
    ),
}
