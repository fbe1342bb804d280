"""A model -> a local folder: a folder as it is, a snapshot in the Hub's cache, or a download into that cache.

Safetensors weights, configuration and tokenizer are fetched, never pickled weights or code. huggingface_hub reads its
environment variables when it is imported: engine.cli puts them in order before it imports this module.
"""

from __future__ import annotations

import datetime
import errno
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the base of its HTTP client's errors
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from engine.checkpoint.download import Download
from engine.checkpoint.files import read_model_config
from engine.checkpoint.kinds import refuse_other_kinds
from engine.checkpoint.retries import is_transient_status, with_retries
from engine.checkpoint.safetensors_weights import damage
from engine.checkpoint.weight_files import choose_weight_names, find_weight_files
from engine.link.errors import StartError, fetch_again
from engine.link.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NAMED_TEMPLATES, TEXT_ENDINGS, is_adapter
from engine.link.model_folders import (
    refuse_missing_tokenizer,
    refuse_names,
    refuse_no_adapter,
    refuse_no_model,
    refuse_other_paths,
)
from engine.link.progress import Stage, StartProgress

logger = logging.getLogger(__name__)

_TEMPLATE = re.compile(rf"{NAMED_TEMPLATES}/[^/]+\.jinja")

API_TIMEOUT_S = 30.0
PROGRESS_S = 0.2
"""Seconds between two reports of a file that is on its way."""
LEFTOVER_S = 3600.0
"""Age at which a temporary file is taken for the rest of a download that was killed."""

T = TypeVar("T")


def download_model(model_id: str, revision: str | None, progress: StartProgress | None = None) -> Path:
    """The model's folder; the Hub is asked only if the cache does not have it whole. Raises StartError in words."""
    try:
        if os.path.isdir(model_id):  # Path would take an empty text for the working directory
            if revision is None:
                return _local(Path(model_id))
            if not _is_hub_id(model_id):
                raise StartError("--revision is for models of the Hub: leave it out for a local folder")
        else:
            refuse_other_paths(model_id)
        return _cached(model_id, revision) or _fetched(model_id, revision, progress or StartProgress())
    except (HTTPError, OSError, HFValidationError, json.JSONDecodeError, RuntimeError) as error:
        raise StartError(_sentence(_root(error), model_id, revision)) from error


def download_adapter(model_id: str, revision: str | None, progress: StartProgress | None = None) -> Path:
    """The folder of an adapter of the Hub: its own two files, whatever lies beside them. Raises StartError in words."""
    try:
        for cache in _caches():
            path = try_to_load_from_cache(model_id, ADAPTER_CONFIG, cache_dir=cache, revision=revision)
            if isinstance(path, str) and damage(Path(path).with_name(ADAPTER_WEIGHTS)) is None:
                logger.info("Files are already present on the host. Skipping download.")
                return Path(path).parent
        return _fetched_adapter(model_id, revision, progress or StartProgress())
    except (HTTPError, OSError, HFValidationError, json.JSONDecodeError, RuntimeError) as error:
        raise StartError(_sentence(_root(error), model_id, revision)) from error


def check_may_upload(model_id: str) -> None:
    """Raise StartError if an upload to `model_id` could not even begin."""
    if not _is_hub_id(model_id):
        raise StartError(
            f"--upload-to-model-id {model_id} is not the id of a model on the Hub: give one like me/my-model"
        )
    if is_offline_mode():
        raise StartError("--upload-to-model-id needs a network, and HF_HUB_OFFLINE is set: leave one of them out")
    if not get_token():
        raise StartError("--upload-to-model-id needs a token that may write: set HF_TOKEN")


def upload_model(folder: Path, model_id: str) -> None:
    """Put the folder's files into a model of the Hub, made private if it is new. Raises StartError in words."""
    logger.info("Uploading %s to %s", folder, model_id)
    try:
        api = HfApi()
        api.create_repo(model_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=model_id, folder_path=folder)
    except (HTTPError, OSError, HFValidationError, json.JSONDecodeError, RuntimeError) as error:
        raise StartError(f"{_sentence(_root(error), model_id, None)} ({folder} is complete)") from error


def _is_hub_id(model_id: str) -> bool:
    """Whether the Hub could have a model of that id; `./name` and `/name` are folders only."""
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return True


def _local(folder: Path) -> Path:
    refuse_no_model(folder)
    _check_whole(folder)
    logger.info("Files are already present on the host. Skipping download.")
    return folder


def _cached(model_id: str, revision: str | None) -> Path | None:
    """The snapshot in a cache if it is there and whole; makes no network call."""
    for cache in _caches():
        folder = _snapshot(cache, model_id, revision)
        if folder is None:
            continue
        try:
            _check_whole(folder)
        except StartError as error:
            logger.info("The cache %s does not have all of %s: %s", cache, model_id, error)
            continue
        logger.info("Files are already present on the host. Skipping download.")
        return folder
    return None


def _caches() -> list[str]:
    """The folders where models may lie already; what is fetched goes into the first.

    TGI's images up to 2.0 had their cache in /data, where newer ones and ours have HF_HOME and the cache in its `hub`.
    """
    is_default = Path(constants.HF_HUB_CACHE) == Path(constants.HF_HOME, "hub")
    return [constants.HF_HUB_CACHE, constants.HF_HOME] if is_default else [constants.HF_HUB_CACHE]


def _snapshot(cache: str, model_id: str, revision: str | None) -> Path | None:
    """The model's folder in a cache, whole or not."""
    for name in ("config.json", ADAPTER_CONFIG):
        path = try_to_load_from_cache(model_id, name, cache_dir=cache, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _check_whole(folder: Path) -> None:
    """Raise StartError if a file is missing or cut off; only the headers of the weights are read."""
    if is_adapter(os.listdir(folder)):
        _refuse_damage(folder / ADAPTER_WEIGHTS)
        return
    read_model_config(folder)
    for path in find_weight_files(folder).paths:
        _refuse_damage(path)
    refuse_missing_tokenizer(folder)


def _refuse_damage(path: Path) -> None:
    if reason := damage(path):
        raise StartError(f"{path} is cut off or damaged ({reason}): {fetch_again(path)}")


def _fetched_adapter(model_id: str, revision: str | None, progress: StartProgress) -> Path:
    """Fetch the weights last, as of a model."""
    commit, sizes = _begin_fetching(model_id, revision, progress)
    refuse_no_adapter(sizes, model_id)
    _fetch(model_id, commit, ADAPTER_CONFIG, sizes[ADAPTER_CONFIG], Download(progress))
    download = Download(progress, sizes[ADAPTER_WEIGHTS] or 0)
    path = _fetch(model_id, commit, ADAPTER_WEIGHTS, sizes[ADAPTER_WEIGHTS], download)
    _refuse_damage(path)
    if is_adapter(sizes):  # else the snapshot would pass for one of an adapter where the whole model is asked for
        _note_revision(model_id, revision or constants.DEFAULT_REVISION, commit)
    return path.parent


def _begin_fetching(model_id: str, revision: str | None, progress: StartProgress) -> tuple[str, dict[str, int | None]]:
    """The commit and the files of `revision`, by their sizes."""
    _check_may_fetch(model_id)
    progress.begin(Stage.DOWNLOADING)
    _relay_library_log()
    _remove_leftovers(model_id)
    return _with_retries(lambda: _list_files(model_id, revision))


def _fetched(model_id: str, revision: str | None, progress: StartProgress) -> Path:
    """Fetch the files that the cache lacks, the weights last: a snapshot with all of them has the rest too."""
    commit, sizes = _begin_fetching(model_id, revision, progress)
    refuse_names(sizes, model_id)
    texts, download = Download(progress), Download(progress)
    for name in sorted(name for name in sizes if name.endswith(TEXT_ENDINGS)):
        folder = _fetch(model_id, commit, name, sizes[name], texts).parents[name.count("/")]
    weights = _weights_of(folder, sizes)
    download.num_bytes = sum(sizes[name] or 0 for name in weights)
    start = time.monotonic()
    for num_done, name in enumerate(weights, start=1):
        _fetch(model_id, commit, name, sizes[name], download)
        download.num_whole_bytes += sizes[name] or 0
        eta_s = (time.monotonic() - start) / num_done * (len(weights) - num_done)
        logger.info("Download: [%d/%d] -- ETA: %s", num_done, len(weights), datetime.timedelta(seconds=int(eta_s)))
    _check_whole(folder)
    _note_revision(model_id, revision or constants.DEFAULT_REVISION, commit)
    return folder


def _weights_of(folder: Path, names: Collection[str]) -> list[str]:
    """The weight files to fetch, once all others are there. Raises StartError for a model of another kind."""
    if is_adapter(names):
        return [ADAPTER_WEIGHTS]
    refuse_other_kinds(folder, read_model_config(folder))
    return choose_weight_names(folder, names)


def _check_may_fetch(model_id: str) -> None:
    if is_offline_mode():
        raise StartError(
            f"{model_id} is not in the cache {constants.HF_HUB_CACHE}, or not all of it, and HF_HUB_OFFLINE is set: "
            "fetch it before, where there is a network, or give a local folder"
        )
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise StartError("HF_ENDPOINT is not an address: it begins with http:// or https://")
    # The HTTP client quotes a header that it can't send, token and all, in its error.
    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        raise StartError("The Hub's token holds a character that no token has: set HF_TOKEN anew")


def _list_files(model_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    """The commit of `revision`, and the size of every file at its top level and of every named chat template."""
    info = HfApi().model_info(model_id, revision=revision, files_metadata=True, timeout=API_TIMEOUT_S)
    if info.sha is None:
        raise FileMetadataError(f"no commit in the description of {model_id}")
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    return info.sha, {name: size for name, size in sizes.items() if "/" not in name or _TEMPLATE.fullmatch(name)}


def _fetch(model_id: str, commit: str, name: str, size: int | None, download: Download) -> Path:
    """One file of a snapshot, from the cache if it is there in its full size."""
    cached = try_to_load_from_cache(model_id, name, revision=commit)
    if isinstance(cached, str):
        if size in (None, Path(cached).stat().st_size):
            return Path(cached)
        Path(cached).resolve().unlink()  # the library takes any file for a whole one
    logger.info("Download file: %s", name)
    start = time.monotonic()
    bars = type("Progress", (_Progress,), {"download": download})
    path = _with_retries(lambda: hf_hub_download(model_id, name, revision=commit, tqdm_class=bars))
    logger.info("Downloaded %s in %s.", path, datetime.timedelta(seconds=int(time.monotonic() - start)))
    return Path(path)


def _with_retries(fetch: Callable[[], T]) -> T:
    """`fetch()`, again while the network or the Hub fails. The library goes on with a cut file itself."""
    return with_retries(fetch, lambda error: _reason(_root(error)) if _is_transient(_root(error)) else None)


def _root(error: BaseException) -> BaseException:
    """The error behind the library's `not in the cache either`."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return is_transient_status(error.response.status_code)
    if _is_disk_full(error) or isinstance(error, FileMetadataError):
        return False
    if isinstance(error, OSError):
        return error.errno is None  # the library's own: a file came in another size than announced
    return isinstance(error, (HTTPError, RuntimeError))  # RuntimeError: hf_xet


def _is_disk_full(error: BaseException) -> bool:
    # hf_xet has the system's error only as text.
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or "No space left on device" in str(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"The Hub answered HTTP {error.response.status_code}"
    return f"The Hub can't be reached ({_one_line(str(error)) or type(error).__name__})"


SENTENCES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (HFValidationError, "{model!r} is neither a folder nor the id of a model on the Hub: check the model id"),
    (GatedRepoError, "{model} is gated: accept its terms on its page of {hub}, then set HF_TOKEN to your token"),
    (RevisionNotFoundError, "{model} has no revision {revision!r}: check --revision"),
    (RepositoryNotFoundError, "{model} is not on {hub}, or it is private: check the id, or set HF_TOKEN if it is"),
    (DisabledRepoError, "{model} was disabled by the Hub: choose another model"),
    ((FileMetadataError, json.JSONDecodeError), "{hub} does not answer as a Hub does: check HF_ENDPOINT and the proxy"),
)
"""Kind of error -> its sentence; the first kind that fits counts."""


def _sentence(error: BaseException, model_id: str, revision: str | None) -> str:
    """A sentence that says what went wrong and names the fix."""
    hub = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    for kind, sentence in SENTENCES:
        if isinstance(error, kind):
            return sentence.format(model=model_id, revision=revision or "main", hub=hub)
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{hub} refused {model_id} (HTTP {error.response.status_code}): check that HF_TOKEN is a valid token"
    if isinstance(error, HfHubHTTPError):
        fix = "try again later" if _is_transient(error) else "check the id and HF_ENDPOINT"
        return f"{hub} did not hand out {model_id} (HTTP {error.response.status_code}): {fix}"
    if _is_disk_full(error):
        return f"The disk of {constants.HF_HUB_CACHE} is full: free space, or set HUGGINGFACE_HUB_CACHE to another one"
    if isinstance(error, OSError) and error.errno is not None:
        place = error.filename or constants.HF_HUB_CACHE
        return f"{place} can't be used ({error.strerror}): fix that, or set HUGGINGFACE_HUB_CACHE to another folder"
    return (
        f"{model_id} is not in the cache and {hub} can't be reached ({_one_line(str(error))}): check the network, "
        "HF_ENDPOINT and the proxy, or give a local folder"
    )


def _one_line(text: str) -> str:
    """The text without line breaks, and addresses without the part after `?`, which may be a signature."""
    return re.sub(r"\?\S+", "", " ".join(text.split()))


class _LogRelay(logging.Handler):
    """Logs the library's records as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelno, "%s", _one_line(record.getMessage()))


def _relay_library_log() -> None:
    library = logging.getLogger("huggingface_hub")
    library.handlers = [_LogRelay()]  # in place of the library's, which writes plain text to stderr
    library.propagate = False
    library.setLevel(logging.INFO)  # at this level it says that it waits for another process that fetches the file


def _repository(model_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model_id, repo_type="model"))


def _note_revision(model_id: str, revision: str, commit: str) -> None:
    """Let the cache know which snapshot a branch or tag means."""
    if revision != commit:
        note = _repository(model_id) / "refs" / revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)


def _remove_leftovers(model_id: str) -> None:
    """Delete what a killed download left: the library never goes on with a file of another process."""
    for path in (_repository(model_id) / "blobs").glob("*.incomplete"):
        if time.time() - path.stat().st_mtime > LEFTOVER_S:
            path.unlink(missing_ok=True)


class _Progress(tqdm):
    """Reports to a download in place of the library's progress bar."""

    monitor_interval = 0  # no thread
    download: Download
    """Set in a class of its own for each file: the library makes the instances."""

    def __init__(self, **options: Any) -> None:
        options |= {"disable": False, "file": io.StringIO(), "leave": False, "miniters": 1}
        options |= {"mininterval": PROGRESS_S, "delay": PROGRESS_S}
        options["desc"] = options["desc"].rpartition("/")[2]
        options["bar_format"] = "{desc}: {percentage:.0f} % of {total_fmt}B, {rate_fmt}, ETA: {remaining}"
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            self.download.report(self.n, str(self))

    # Xet reports what came over the network beside what was written; with these there is one line for both.
    def update_transfer(self, num_bytes: float) -> None:
        pass

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass
