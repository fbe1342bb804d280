"""Models that look like those we serve and are others: each kind is refused by a sentence of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.link.errors import StartError

ONLY_TEXT = "only models that read text and write text are served here"


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Models that are not served."""

    what: str
    """What a folder with such a model is, as the end of a sentence about it."""
    servers: str
    """What serves such models, or makes one of them that is served here."""

    def __str__(self) -> str:
        return f"{self.what}: {self.servers}"

    def refusal(self, subject: str) -> StartError:
        """`subject`: the folder or file that holds such a model."""
        return StartError(f"{subject} {self.what}: {ONLY_TEXT}, {self.servers}")


EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json")
"""Files that `sentence-transformers` writes beside a model of embeddings."""

VLLM_OR_SGLANG = "vLLM and SGLang serve such models"

EMBEDDING_MODEL = Kind(
    "is a model of embeddings, which turns a text into a vector and writes none",
    "Text Embeddings Inference, vLLM and SGLang serve such models",
)
HEADLESS_MODEL = Kind(f"{EMBEDDING_MODEL.what}, or a decoder that was saved without its head", EMBEDDING_MODEL.servers)
REWARD_MODEL = Kind("is a reward model, which gives a text a score and writes none", VLLM_OR_SGLANG)
SEQUENCE_CLASSIFIER = Kind(
    "is a classifier, which labels a text and writes none (reward models and rerankers are saved like this, too)",
    "Text Embeddings Inference, vLLM and SGLang serve such models",
)
CLASSIFIER = Kind("is a classifier, which labels a text and writes none", "vLLM serves such models")
ANSWER_MARKER = Kind(
    "is a model that marks answers in a text and writes none", "the pipelines of `transformers` run such models"
)
UNMERGED = Kind("holds an adapter (LoRA) that is not merged", "merge it with `peft`, merge_and_unload()")
QUANTIZED = Kind(
    "is quantised, and otherwise than its config.json says",
    "fetch config.json, and quantize_config.json if there is one",
)

ARCHITECTURES: tuple[tuple[str, Kind], ...] = (
    ("RewardModel", REWARD_MODEL),
    ("ForSequenceClassification", SEQUENCE_CLASSIFIER),
    ("ForTokenClassification", CLASSIFIER),
    ("ForQuestionAnswering", ANSWER_MARKER),
    ("Model", HEADLESS_MODEL),
)
"""The end of a name in config.json's `architectures` -> what such a model is; the first that fits counts."""

TASKS: dict[str, Kind] = {
    "SEQ_CLS": SEQUENCE_CLASSIFIER,
    "TOKEN_CLS": CLASSIFIER,
    "QUESTION_ANS": ANSWER_MARKER,
    "FEATURE_EXTRACTION": EMBEDDING_MODEL,
}
"""`task_type` of adapter_config.json -> what the adapter's model is."""

LANGUAGE_MODEL = "LMHeadModel"
"""The end of a name that ends like one of `ARCHITECTURES` by chance."""

VISION_MODEL = Kind("is a vision-language model, which reads images as well", VLLM_OR_SGLANG)
AUDIO_MODEL = Kind("is an audio-language model, which reads sound as well", VLLM_OR_SGLANG)
MODEL_TYPES: tuple[tuple[str, Kind], ...] = (
    ("_vl", VISION_MODEL),
    ("_audio", AUDIO_MODEL),
    ("_omni", Kind("is a model of text, images and sound", VLLM_OR_SGLANG)),
)
"""A part of config.json's `model_type` -> what such a model is."""
PARTS: tuple[tuple[str, Kind], ...] = (("vision_config", VISION_MODEL), ("audio_config", AUDIO_MODEL))
"""A key of config.json, for a part that a language model lacks -> what such a model is."""

TENSORS: tuple[tuple[str, Kind], ...] = (
    (".base_layer.", UNMERGED),
    (".lora_", UNMERGED),
    (".score.", REWARD_MODEL),
    (".v_head.", REWARD_MODEL),
    (".classifier.", CLASSIFIER),
    (".visual.", VISION_MODEL),
    (".vision_", VISION_MODEL),
    (".audio_", AUDIO_MODEL),
    *((f".{leaf}", QUANTIZED) for leaf in "qweight qzeros scales g_idx weight_packed weight_scale".split()),
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
    if config.get("is_causal") is False:  # gte-Qwen2: every token sees all others
        kinds.append(EMBEDDING_MODEL)
    if kinds:
        raise kinds[0].refusal(str(folder))


def kind_of_tensor(name: str) -> Kind | None:
    """What a model with such a tensor is, if it tells."""
    return next((kind for part, kind in TENSORS if part in f".{name}"), None)
