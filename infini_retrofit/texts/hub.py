"""Files of one commit of a repository on the Hugging Face Hub.

Knows neither models nor corpora.
"""

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from infini_retrofit.pipeline.files import sha256


def fetch_snapshot(
    repo_id: str,
    revision: str,
    patterns: list[str],
    *,
    embedded: str,
    repo_type: str = "model",
) -> Path:
    """Fetch what is not in the local cache yet, and return the folder that holds it.

    A download leaves a list of the commit's files in the cache, and without network a file of it
    that is missing is noticed. A cache that was copied by hand, or filled by an old version of
    huggingface_hub, may have none: what it holds is then taken for all, and stderr says so.

    Args:
        repo_id: such as `EleutherAI/pythia-70m`.
        revision: a commit; branches and tags move.
        patterns: of the files wanted.
        embedded: the line of params.yaml that needs no network, for the message.
        repo_type: `model` or `dataset`.

    Raises:
        ValueError: if the Hub has no such repository or commit, or none open to this user, or if
            a file is not what the Hub says it is.
        ConnectionError: if something is not in the cache and cannot be fetched; why is said.
    """
    with _explained(repo_id, repo_type, revision, embedded):
        folder = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=patterns
        )
    found = matching_files(Path(folder), patterns)
    for path in found:
        _check_content(path)
    if not _is_listed(repo_id, repo_type, revision):
        names = ", ".join(path.name for path in found) or "none"
        print(
            f"note: the local cache holds no list of the files of {repo_id}, so that a missing one "
            f"would not be noticed; found of {', '.join(patterns)}: {names}",
            file=sys.stderr,
        )
    return Path(folder)


@contextlib.contextmanager
def _explained(repo_id: str, repo_type: str, revision: str, embedded: str) -> Iterator[None]:
    """Turn what a download fails with into what a user can do about it."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"repo_id and revision must name a {repo_type} of the Hugging Face Hub that is open to "
            f"you, got {repo_id!r} at {revision}"
        ) from error
    except (HTTPError, OSError, JSONDecodeError, RuntimeError) as error:  # hf_xet raises the last
        if getattr(error, "errno", None):  # the disk's
            raise
        raise ConnectionError(
            f"{repo_id} is not in the local cache and {_reason(error)}; "
            f"the embedded default (`{embedded}`) needs no network"
        ) from error


def _is_listed(repo_id: str, repo_type: str, revision: str) -> bool:
    """Tell whether the local cache knows which files a commit has."""
    try:
        get_cached_repo_tree(repo_id, repo_type=repo_type, revision=revision)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def matching_files(folder: Path, patterns: list[str]) -> list[Path]:
    """List the files of a snapshot that match a pattern, sorted by name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [folder / name for name in filter_repo_objects(names, allow_patterns=patterns)]


def _reason(error: BaseException) -> str:
    """Say why a file could not be fetched: the first of the error's causes that tells."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to fetch it"
    if isinstance(error, HfHubHTTPError):
        answer = error.response  # the query of its address may hold a signature
        address = str(answer.request.url).partition("?")[0]
        return f"the Hugging Face Hub answered {answer.status_code} to {address}"
    if isinstance(error, (JSONDecodeError, FileMetadataError)):
        return "what answered is not the Hugging Face Hub: is a proxy in the way?"
    if isinstance(error, HTTPError):
        return f"the connection to the Hugging Face Hub failed ({error})"
    if error.__cause__:
        return _reason(error.__cause__)
    return f"fetching it from the Hugging Face Hub failed ({error})"


def _check_content(path: Path) -> None:
    """Compare a file with the hash that the Hub's cache names it by, where it does.

    Raises:
        ValueError: if they differ.
    """
    name = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", name):
        got = sha256(path)
    elif re.fullmatch("[0-9a-f]{40}", name):
        got = hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()
    else:
        return
    if got != name:
        raise ValueError(
            f"{path} must have the hash {name}, as the Hugging Face Hub says, got {got}: delete "
            f"{path.resolve()} and run this again"
        )
