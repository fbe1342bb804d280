"""adapter_config.json: what an adapter is made of, and with which factor. Importing this module loads no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.kinds import TASKS
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, read_json

OTHER_KINDS: tuple[tuple[str, str], ...] = (
    ("use_dora", "DoRA"),
    ("trainable_token_indices", "single tokens (trainable_token_indices)"),
    ("layer_replication", "repeated layers (layer_replication)"),
    ("alora_invocation_tokens", "a part of each prompt only (aLoRA)"),
    ("use_qalora", "QALoRA"),
)
"""A key of adapter_config.json that must say nothing -> what the adapter is made of where it says something."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` of adapters whose training has begun by changing the base model."""
MAX_NAME_CHARS = 200
"""Characters of its model's name that a refusal of an adapter tells."""
MAX_SCALING = 3.4028234e38
"""The largest number in float32."""
MAX_CONFIG_BYTES = 4 << 20
"""Largest adapter_config.json. `peft` writes some kilobytes, also with settings for every module; who parses a file of
hundreds of megabytes while requests run takes gigabytes."""
TABLE, HEAD = "embed_tokens", "lm_head"
MERGE_WITH_PEFT = (
    "merge it with `peft`, merge_and_unload() and save_pretrained(...), and give the folder that this writes"
)


@dataclasses.dataclass(frozen=True, slots=True)
class _ByModule:
    """A number of adapter_config.json, and others for the modules whose names end in what a pattern matches."""

    default: Any
    patterns: Sequence[tuple[re.Pattern[str], Any]]

    def value(self, module: str) -> Any:
        return next((value for pattern, value in self.patterns if pattern.fullmatch(module)), self.default)


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterSettings:
    """The part of adapter_config.json that says which change each module has."""

    folder: Path
    base_model: str | None
    """The model that it was made for, in its author's words."""
    ranks: _ByModule
    alphas: _ByModule
    is_rank_stabilized: bool
    target_parameters: Sequence[str]
    """The ends of names of parameters that are changed, beside modules."""
    saved_modules: Sequence[str]
    """The ends of names of modules that are stored whole."""
    has_saved_biases: bool
    """Whether biases of the base model are stored whole."""
    has_biases: bool
    """Whether each change of a matrix has one of its bias."""
    is_tying: bool
    """Whether embeddings and the head were trained as one tensor, if they are one in the base model."""

    def is_target_parameter(self, name: str) -> bool:
        return any(f".{name}".endswith(f".{target}") for target in self.target_parameters)

    def is_saved(self, module: str, leaf: str) -> bool:
        """Whether the tensor `leaf` of a module is stored whole."""
        # With the table `peft` stores a head that is tied to it, which it does not name.
        is_tied = self.is_tying and module == HEAD and any(saved.endswith(TABLE) for saved in self.saved_modules)
        is_named = any(f"{saved}." in f"{module}." for saved in self.saved_modules)
        return is_named or is_tied or (leaf == "bias" and self.has_saved_biases)

    def scaling(self, name: str, *, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA; `rank` is what is stored. Raises StartError.

        `name` is the module's, or that of the parameter that is changed.
        """
        stated = self.ranks.value(name)
        if stated is not None and stated != rank:
            raise StartError(
                f"{self.folder} changes {name} by matrices of rank {rank}, and {ADAPTER_CONFIG} says {stated!r:.20}: "
                "they do not belong together"
            )
        try:
            alpha = float(self.alphas.value(name))
            scaling = alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)
            if not abs(scaling) <= MAX_SCALING:  # nor NaN
                raise ValueError(f"the change of {name} would be multiplied by {scaling:g}")
            return scaling
        except (TypeError, ValueError, ArithmeticError) as error:
            raise unusable(self.folder, error) from error


def read_settings(folder: Path, config: Mapping[str, Any]) -> AdapterSettings:
    """The settings of `config`, the folder's adapter_config.json. Raises StartError for an adapter of another kind.

    Patterns are compiled here: there may be one for each of hundreds of modules.
    """
    _refuse_other_kinds(folder, config)
    base_model = config.get("base_model_name_or_path")
    try:
        ranks, alphas = (
            _ByModule(
                config.get(key),
                [(re.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in (config.get(of) or {}).items()],
            )
            for key, of in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        return AdapterSettings(
            folder=folder,
            base_model=base_model[:MAX_NAME_CHARS] if isinstance(base_model, str) and base_model else None,
            ranks=ranks,
            alphas=alphas,
            is_rank_stabilized=bool(config.get("use_rslora")),
            target_parameters=_names(config, "target_parameters"),
            saved_modules=_names(config, "modules_to_save"),
            has_saved_biases=config.get("bias", "none") != "none",
            has_biases=bool(config.get("lora_bias")),
            is_tying=bool(config.get("ensure_weight_tying")),
        )
    except (AttributeError, TypeError, RecursionError, OverflowError, re.error) as error:
        raise unusable(folder, error) from error


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    """Raises TypeError for what is no list of names."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{key} is no list of names")
    return names


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    task = config.get("task_type")
    if isinstance(task, str) and task in TASKS:
        raise TASKS[task].refusal(f"{folder} is an adapter whose model")
    kinds = [kind for key, kind in OTHER_KINDS if config.get(key)]
    if config.get("peft_type") != "LORA":
        kinds.append(f"{config.get('peft_type')!s:.40}")
    if task not in (None, "CAUSAL_LM"):
        kinds.append(f"a model for another task ({task!s:.40})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        kinds.append(f"a base model that its training has changed ({start:.40})")
    if kinds:
        raise StartError(f"{folder} is an adapter of {kinds[0]}, and only plain LoRA is merged here: {MERGE_WITH_PEFT}")


def unusable(folder: Path, error: Exception | str) -> StartError:
    return StartError(f"{folder / ADAPTER_CONFIG} cannot be used ({error}): fetch the adapter again")


def read_config(folder: Path) -> dict[str, Any]:
    """Raises StartError for a file that can't be read, or is larger than any that `peft` writes."""
    return read_json(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
