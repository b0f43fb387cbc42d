"""Fetching one file whose checksum is known."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from fastcm.errors import DataError

TIMEOUT_S = 60
CHUNK_BYTES = 2**20


def download_file(url: str, target: Path, md5: str) -> Path:
    """Fetch ``url`` to ``target``, which appears whole and checked or not at all; returns ``target``.

    Raises DataError if the server cannot be reached, the disk refuses, or the md5 differs.
    """
    temporary = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, temporary.open("wb") as file:
            found = _copy(response, file, target.name)
        if found != md5:
            raise DataError(
                f"{url} has md5 {found}, expected {md5}: the download is damaged or the file has changed; try again"
            )
        os.replace(temporary, target)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url} cannot be fetched: HTTP {error.code}; fetch it by hand to {target}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} cannot be fetched to {target}: {error}; check the network and the disk, or fetch it by hand"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _copy(response: BinaryIO, file: BinaryIO, name: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    total = int(getattr(response, "headers", {}).get("Content-Length") or 0) or None
    with tqdm(total=total, desc=f"fetching {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while chunk := response.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
