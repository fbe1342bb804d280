"""Cloud platforms that start a container in their own way: how each is told, and what its variables mean to us.

`Platform.settings` are variables of ours, read in place of those that the environment has. Flags still win. Standard
library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

MODEL_ID = "MODEL_ID"
ROOT = Path("/")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """The value of a variable of ours, and what says so."""

    value: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """One platform. Without a sign of it nothing of its row is read."""

    name: str
    signs: tuple[str, ...] = ()
    """Variables that are set there and nowhere else."""
    argument: str | None = None
    """The only argument that the platform starts a container with."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our variable, and the platform's, which wins. What names the model is a sign, too, if nothing else names one."""
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our variable, and the value that the platform expects whatever an image sets."""
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our variable, and its value there unless it is set."""
    model_folder: str | None = None
    """Where the platform puts a model. It is served, and a sign, if it is there and nothing names another."""

    def is_here(self, argv: Sequence[str], environ: Mapping[str, str], root: Path) -> bool:
        if list(argv) == [self.argument] or any(name in environ for name in self.signs):
            return True
        if MODEL_ID in environ or any(argument.partition("=")[0] == "--model-id" for argument in argv):
            return False
        return self.variables.get(MODEL_ID) in environ or self.has_model(root)

    def has_model(self, root: Path) -> bool:
        return self.model_folder is not None and (root / self.model_folder.lstrip("/") / "config.json").is_file()

    def settings(self, environ: Mapping[str, str], root: Path = ROOT) -> dict[str, Setting]:
        """Our variables as this platform has them, by name."""
        values = {name: value for name, value in self.defaults.items() if name not in environ} | dict(self.fixed)
        if MODEL_ID not in environ and self.model_folder is not None and self.has_model(root):
            values[MODEL_ID] = self.model_folder
        settings = {name: Setting(value, f"{name} of {self.name}") for name, value in values.items()}
        for name, theirs in self.variables.items():
            if theirs in environ:
                settings[name] = Setting(environ[theirs], f"the variable {theirs}")
        return settings


PLATFORMS = (
    Platform(name="Hugging Face Inference Endpoints", model_folder="/repository"),
    Platform(
        name="Amazon SageMaker",
        signs=("SM_NUM_GPUS", "SAGEMAKER_BIND_TO_PORT"),
        argument="serve",
        variables={
            MODEL_ID: "HF_MODEL_ID",
            "REVISION": "HF_MODEL_REVISION",
            "QUANTIZE": "HF_MODEL_QUANTIZE",
            "TRUST_REMOTE_CODE": "HF_MODEL_TRUST_REMOTE_CODE",
            "NUM_SHARD": "SM_NUM_GPUS",
            "PORT": "SAGEMAKER_BIND_TO_PORT",
        },
        fixed={"PORT": "8080"},
        # It kills a container 30 s after SIGTERM; the processes need up to 10 s after the last request.
        defaults={"GRACEFUL_TERMINATION_TIMEOUT": "15"},
        model_folder="/opt/ml/model",
    ),
    Platform(
        name="Vertex AI",
        signs=("AIP_HTTP_PORT", "AIP_MODE"),
        variables={MODEL_ID: "AIP_STORAGE_URI", "PORT": "AIP_HTTP_PORT"},
        fixed={"PORT": "8080"},
    ),
)


def find_platform(argv: Sequence[str], environ: Mapping[str, str], root: Path = ROOT) -> Platform | None:
    """The platform that started this process, None on a machine like any other."""
    return next((platform for platform in PLATFORMS if platform.is_here(argv, environ, root)), None)
