"""pytgi as a library: an LLM whose engine runs in a process of its own, and the exceptions that it raises.

Importing this loads nothing else. The command line is `pytgi.commands`.
"""

from typing import TYPE_CHECKING, Any

from pytgi.host import check_host

if TYPE_CHECKING:
    from pytgi.errors import PytgiError, RequestError, ServerDiedError, StartError
    from pytgi.llm import LLM
    from pytgi.parameters import ChatParameters, GenerateParameters
    from pytgi.results import ChatPiece, ChatResult, GenerateResult, Token

    __version__: str

__all__ = [
    "LLM",
    "ChatParameters",
    "ChatPiece",
    "ChatResult",
    "GenerateParameters",
    "GenerateResult",
    "PytgiError",
    "RequestError",
    "ServerDiedError",
    "StartError",
    "Token",
    "__version__",
]

_MODULES = {
    "LLM": "pytgi.llm",
    "ChatParameters": "pytgi.parameters",
    "ChatPiece": "pytgi.results",
    "ChatResult": "pytgi.results",
    "GenerateParameters": "pytgi.parameters",
    "GenerateResult": "pytgi.results",
    "PytgiError": "pytgi.errors",
    "RequestError": "pytgi.errors",
    "ServerDiedError": "pytgi.errors",
    "StartError": "pytgi.errors",
    "Token": "pytgi.results",
}
"""Name -> the module that has it, imported on first use."""


def __getattr__(name: str) -> Any:
    """A public name. Raises ImportError with a sentence where pytgi can't run."""
    import importlib
    import importlib.metadata

    if name == "__version__":
        return importlib.metadata.version("pytgi")
    if name not in _MODULES:
        raise AttributeError(f"module 'pytgi' has no attribute {name!r}")
    check_host()
    return getattr(importlib.import_module(_MODULES[name]), name)
