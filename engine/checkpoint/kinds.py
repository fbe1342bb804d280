"""Models that look like those we serve and are others: each kind is refused by a sentence of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.link.errors import StartError

EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json")
"""Files that `sentence-transformers` writes beside a model of embeddings."""

EMBEDDING_MODEL = "is a model of embeddings, which turns a text into a vector and writes none"
REWARD_MODEL = "is a reward model, which gives a text a score and writes none"
UNMERGED = "holds an adapter (LoRA) that is not merged: merge it with `peft`, merge_and_unload()"
CLASSIFIER = "is a classifier, which labels a text and writes none"

ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("RewardModel", REWARD_MODEL),
    ("ForSequenceClassification", CLASSIFIER + " (reward models are saved like this, too)"),
    ("ForTokenClassification", CLASSIFIER),
    ("ForQuestionAnswering", "is a model that marks answers in a text and writes none"),
    ("Model", EMBEDDING_MODEL + ", or a decoder that was saved without its head"),
)
"""The end of a name in config.json's `architectures` -> what such a model is; the first that fits counts."""

LANGUAGE_MODEL = "LMHeadModel"
"""The end of a name that ends like one of `ARCHITECTURES` by chance."""

VISION_MODEL = "is a vision-language model, which reads images as well"
AUDIO_MODEL = "is an audio-language model, which reads sound as well"
MODEL_TYPES: tuple[tuple[str, str], ...] = (
    ("_vl", VISION_MODEL),
    ("_audio", AUDIO_MODEL),
    ("_omni", "is a model of text, images and sound"),
)
"""A part of config.json's `model_type` -> what such a model is."""
PARTS: tuple[tuple[str, str], ...] = (("vision_config", VISION_MODEL), ("audio_config", AUDIO_MODEL))
"""A key of config.json, for a part that a language model lacks -> what such a model is."""

TENSORS: tuple[tuple[str, str], ...] = (
    (".base_layer.", UNMERGED),
    (".lora_", UNMERGED),
    (".score.", REWARD_MODEL),
    (".v_head.", REWARD_MODEL),
    (".classifier.", CLASSIFIER),
    (".visual.", VISION_MODEL),
    (".vision_", VISION_MODEL),
    (".audio_", AUDIO_MODEL),
)
"""A part of a tensor's name that no model of ours knows -> what such a model is."""


def refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Raise StartError for a folder whose files say that it holds no model that writes text."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    kinds = [kind for part, kind in MODEL_TYPES if isinstance(model_type, str) and part in model_type]
    kinds += [kind for key, kind in PARTS if config.get(key) is not None]
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for name in names:
        kinds += [kind for end, kind in ARCHITECTURES if name.endswith(end) and not name.endswith(LANGUAGE_MODEL)]
    if any((folder / name).is_file() for name in EMBEDDING_FILES):
        kinds.append(EMBEDDING_MODEL)
    if kinds:
        raise StartError(f"{folder} {kinds[0]}: only models that read text and write text are served")


def kind_of_tensor(name: str) -> str | None:
    """What a model with such a tensor is, if it tells."""
    return next((kind for part, kind in TENSORS if part in f".{name}"), None)
