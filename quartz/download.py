"""Files from the web, and the parquet files of a data set on the Hugging Face hub: resumed where a download broke off,
and compared with the sums that the hub states. No code is fetched. HF_ENDPOINT names another server than the hub.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from quartz import files
from quartz.errors import NO_MORE, UserError, in_words

HUB = "https://huggingface.co"
TIMEOUT = 60  # seconds without a byte
TRIES = 6  # in a row that bring nothing; between them 1, 2, 4, … seconds
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # HTTP errors that pass
BLOCK = 2**20
OTHERWISE = "run it again to go on, or use --source=PATH with a copy"


class _WrongSum(ValueError):
    pass


class Remote(NamedTuple):
    """A file on a server."""

    url: str
    name: str
    size: int
    sha256: str


def hub_files(repo: str, places: Sequence[tuple[str, str]], folder: Path, max_files: int = 0) -> list[Path]:
    """Downloads the parquet files of a data set into `folder`, as far as they are not there; returns their paths.

    places: (revision, folder in the repository), of which the first that holds such files counts. max_files: how many
    of the files, by name; 0 is all. Raises UserError where the hub can't be reached or the disk has no room for them.
    """
    if max_files < 0:
        raise UserError(f"max_files must be 0 (all) or a number of files, not {max_files}")
    try:
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            listed = folder / "files.json"
            if not listed.exists():
                files.write(listed, json.dumps(_list(repo, places)).encode())
        remotes = [Remote(*entry) for entry in json.loads(listed.read_text(encoding="utf-8"))]
    except OSError as error:
        raise UserError(f"{listed} can't be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'files.json'} is damaged: delete it, and run it again") from error
    remotes = remotes[: max_files or None]
    paths = [folder / remote.name.replace("/", "-") for remote in remotes]
    missing = [(remote, path) for remote, path in zip(remotes, paths, strict=True) if not path.exists()]
    begun = sum(part.stat().st_size for _, path in missing if (part := _partial(path)).exists())
    needed, free = sum(remote.size for remote, _ in missing) - begun, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{len(missing)} files of {repo} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free in {folder}: "
            "make room, or take fewer with --max_files"
        )
    if missing:
        print(f"downloading {len(missing)} files of {repo} to {folder}, {needed / 1e9:.2f} GB", flush=True)
    with tqdm(total=needed, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for remote, path in missing:
            fetch(remote.url, path, remote.sha256, tries=TRIES, bar=bar)
    return paths


def _list(repo: str, places: Sequence[tuple[str, str]]) -> list[Remote]:
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    for revision, inside in places:
        at = urllib.parse.quote(revision, safe="")
        url, found = f"{hub}/api/datasets/{repo}/tree/{at}/{urllib.parse.quote(inside)}?recursive=true", []
        try:
            while url:
                with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
                    found += json.load(reply)
                    following = re.search(r'<([^>]+)>;\s*rel="next"', reply.headers.get("Link", ""))
                url = following and following[1]
            found = [entry for entry in found if entry["path"].endswith(".parquet")]
            remotes = [
                Remote(
                    f"{hub}/datasets/{repo}/resolve/{at}/{urllib.parse.quote(entry['path'])}",
                    entry["path"],
                    entry["size"],
                    entry["lfs"]["oid"],
                )
                for entry in found
            ]
        except urllib.error.HTTPError as error:
            if error.code == 404:  # no such revision, or folder
                continue
            raise UserError(f"{url} can't be read ({error}): {OTHERWISE}") from error
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise UserError(f"{url} can't be read ({error}): {OTHERWISE}") from error
        if remotes:
            return sorted(remotes, key=lambda remote: remote.name)
    raise UserError(f"{hub} has no parquet files of {repo} where they are expected: use --source=PATH with a copy")


def fetch(
    url: str, path: Path, sha256: str = "", otherwise: str = OTHERWISE, tries: int = 1, bar: tqdm | None = None
) -> None:
    """Downloads `url` to `path`, which holds the whole file or nothing.

    With its sum it goes on where an earlier download broke off. `tries` counts those in a row that brought no byte.
    Raises UserError, whose end is `otherwise`.
    """
    partial, failed = _partial(path), 0
    if not sha256:
        partial.unlink(missing_ok=True)
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _append(url, partial, before, bar)
            if sha256 and _sum(partial) != sha256:
                partial.unlink()
                raise _WrongSum("its contents do not have the sum that the server states")
            files.replace(partial, path)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, PermissionError) or getattr(error, "errno", None) in NO_MORE:
                raise UserError(f"{partial} can't be written: {in_words(error)}; {otherwise}") from error
            has_grown = partial.exists() and partial.stat().st_size > before
            failed = 0 if has_grown else failed + 1
            final = isinstance(error, urllib.error.HTTPError) and error.code not in RETRIED
            final = final or (isinstance(error, _WrongSum) and not before)  # that came from the server in one piece
            if failed >= tries or final or (tries == 1 and not sha256):
                raise UserError(f"{url} can't be downloaded ({error}); {otherwise}") from error
            time.sleep(2.0 ** (failed - 1) if failed else 0)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _append(url: str, partial: Path, have: int, bar: tqdm | None) -> None:
    """Adds to a file what it lacks. Raises OSError where the connection breaks off."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: it is whole, or not what it should be
            return
        raise
    with reply:
        goes_on = reply.status == 206
        if have and not goes_on:
            have = 0
        with open(partial, "ab" if have else "wb") as file:
            while block := reply.read(BLOCK):
                file.write(block)
                if bar:
                    bar.update(len(block))
            got = file.tell() - have
        if got != int(reply.headers.get("Content-Length", got)):
            raise OSError("the connection broke off")


def _sum(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
