"""A model in a bucket of Google's Cloud Storage -> a local folder. Vertex AI names one where it has a model's files.

Safetensors weights, configuration and tokenizer are fetched, never pickled weights or code, and only what is not there
already. The standard library does for that: the storage has plain HTTP routes, and a machine of Google's hands out the
token of its service account by another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from engine.checkpoint.download import Download
from engine.checkpoint.retries import is_transient_status, with_retries
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEXT_ENDINGS, is_weight_name
from engine.link.model_folders import refuse_no_adapter
from engine.link.progress import Stage, StartProgress

logger = logging.getLogger(__name__)

URI = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]*)/?(?P<folder>.*)", re.DOTALL)
STORAGE_URL = "https://storage.googleapis.com"
METADATA_URL = "http://metadata.google.internal"
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
TOKEN_TIMEOUT_S = 5.0
TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a bucket."""

    object_name: str
    size: int
    updated_s: float
    """When it was last written, in seconds since 1970. The local copy gets the same time."""

    @property
    def name(self) -> str:
        return self.object_name.rpartition("/")[2]

    def is_at(self, path: Path) -> bool:
        """Whether a local file is the copy of this one."""
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            return (status.st_size, int(status.st_mtime)) == (self.size, int(self.updated_s))
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The storage's address, and that of the machine's metadata server."""

    url: str = STORAGE_URL
    metadata_url: str = METADATA_URL

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Storage:
        """The addresses, or those that Google's own variables give instead."""
        emulator, metadata = environ.get("STORAGE_EMULATOR_HOST"), environ.get("GCE_METADATA_HOST")
        return cls(
            url=STORAGE_URL if emulator is None else emulator if "://" in emulator else f"http://{emulator}",
            metadata_url=METADATA_URL if metadata is None else f"http://{metadata}",
        )

    def files(self, bucket: str, prefix: str) -> list[StoredFile]:
        """The files right below a folder whose name ends in a slash."""
        files: list[StoredFile] = []
        page: str | None = ""
        while page is not None:
            query = {"prefix": prefix, "delimiter": "/", "pageToken": page}
            with self._open(f"/storage/v1/b/{quote(bucket)}/o?{urlencode(query)}") as response:
                listing = json.load(response)
            files += [_stored_file(item) for item in listing.get("items", [])]
            page = listing.get("nextPageToken")
        return files

    def fetch(self, bucket: str, file: StoredFile, path: Path, download: Download) -> None:
        """Write a file to `path`, and go on where an earlier try ended."""
        part = path.with_name(f".{path.name}.{int(file.updated_s)}.part")
        start = part.stat().st_size if part.exists() else 0
        if start != file.size or file.size == 0:
            start = start if start < file.size else 0
            route = f"/storage/v1/b/{quote(bucket)}/o/{quote(file.object_name, safe='')}?alt=media"
            with self._open(route, {"Range": f"bytes={start}-"} if start else {}) as response:
                with part.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as target:
                    while chunk := response.read(CHUNK_BYTES):
                        target.write(chunk)
                        num_bytes = target.tell()
                        download.report(num_bytes, f"{file.name}: {100 * num_bytes / file.size:.0f} %")
        if part.stat().st_size != file.size:
            raise http.client.IncompleteRead(b"", file.size - part.stat().st_size)
        os.utime(part, (file.updated_s, file.updated_s))
        part.replace(path)

    def _open(self, route: str, headers: Mapping[str, str] | None = None) -> Any:
        token = self._token()
        authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        return _open(self.url + route, {**(headers or {}), **authorization}, TIMEOUT_S)

    def _token(self) -> str | None:
        """The token of the machine's service account. None on other machines, where a bucket may be public."""
        try:
            with _open(self.metadata_url + TOKEN_PATH, {"Metadata-Flavor": "Google"}, TOKEN_TIMEOUT_S) as response:
                return str(json.load(response)["access_token"])
        except (OSError, ValueError, KeyError):
            return None


def _open(url: str, headers: dict[str, str], timeout_s: float) -> Any:
    """The answer to a GET request. Raises HTTPError, whose connection is closed, for a status that is no success."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _stored_file(item: Mapping[str, str]) -> StoredFile:
    updated = datetime.datetime.fromisoformat(item["updated"])
    return StoredFile(item["name"], int(item["size"]), updated.timestamp())


def copy_model(
    uri: str, cache: Path, storage: Storage, progress: StartProgress | None = None, *, is_adapter: bool = False
) -> Path:
    """The local copy of a model's folder in a bucket, below `cache`; of an adapter's files alone if it `is_adapter`.

    Raises StartError in words.
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise StartError(f"{uri} is not the address of a bucket: give gs://BUCKET/FOLDER")
    bucket, folder_name = match["bucket"], match["folder"].strip("/")
    folder = cache / f"gs--{bucket}--{folder_name.replace('/', '--')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = with_retries(lambda: storage.files(bucket, f"{folder_name}/" if folder_name else ""), _reason_to_retry)
        chosen = _files_of_adapter(files, uri) if is_adapter else [file for file in files if _is_of_a_model(file.name)]
        if not chosen:
            raise StartError(f"{uri} has no files of a model: give the folder with config.json and *.safetensors")
        absent = [file for file in chosen if not file.is_at(folder / file.name)]
        if absent and progress is not None:
            progress.begin(Stage.DOWNLOADING)
        download = Download(progress or StartProgress(), sum(file.size for file in absent))
        for file in sorted(absent, key=lambda file: is_weight_name(file.name)):  # the weights last, as from the Hub
            logger.info("Download file: %s", file.name)
            fetch = functools.partial(storage.fetch, bucket, file, folder / file.name, download)
            with_retries(fetch, _reason_to_retry)
            download.num_whole_bytes += file.size
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        raise StartError(_sentence(error, uri, folder)) from error
    return folder


def _files_of_adapter(files: Sequence[StoredFile], uri: str) -> list[StoredFile]:
    refuse_no_adapter([file.name for file in files], uri)
    return [file for file in files if file.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]


def _is_of_a_model(name: str) -> bool:
    return not name.startswith(".") and (name.endswith(TEXT_ENDINGS) or is_weight_name(name) or name == ADAPTER_WEIGHTS)


def _reason_to_retry(error: Exception) -> str | None:
    return _reason(error) if _is_transient(error) else None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return is_transient_status(error.code)
    # Of system errors those of connections; a full disk does not pass.
    return isinstance(error, (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"The storage answered HTTP {error.code}"
    return f"The storage can't be reached ({error})"


def _sentence(error: Exception, uri: str, folder: Path) -> str:
    """A sentence that says what went wrong and names the fix."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            return f"{uri} may not be read: give the service account of this machine the role Storage Object Viewer"
        fix = "check the name of the bucket" if error.code == 404 else "try again later"
        return f"{uri} could not be read (HTTP {error.code}): {fix}"
    if _is_transient(error):
        return f"{uri} can't be reached ({error}): check the network, or give a local folder"
    if isinstance(error, OSError):
        return f"{folder} can't be written ({error.strerror}): set HUGGINGFACE_HUB_CACHE to a folder with space"
    return f"{uri}: the storage does not answer as Google's does: check STORAGE_EMULATOR_HOST"
