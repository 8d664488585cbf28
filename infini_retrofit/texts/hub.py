"""Download files of one commit of a repository on the Hugging Face Hub."""

import re
import sys
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash

from infini_retrofit.pipeline.files import sha256

# The lines of params.yaml that need no network, by the kind of repository.
_EMBEDDED = {"model": "model: smollm2-135m", "dataset": "corpus: wikipedia-sample"}


def fetch_snapshot(
    repo_id: str, revision: str, patterns: list[str], repo_type: str = "model"
) -> tuple[Path, list[Path]]:
    """Download the files that the cache lacks; return their folder, and the files by name.

    A file that differs from the Hub's hash is an error.
    """
    repository = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    try:
        folder = Path(snapshot_download(**repository, allow_patterns=patterns))
    except (HTTPError, OSError, JSONDecodeError, RuntimeError) as error:  # hf_xet raises the last
        if getattr(error, "errno", None):  # of the disk
            raise
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        shown = re.sub(r"\?[^\s']+", "", str(reason or error))  # an address may hold a signature
        raise ConnectionError(
            f"{repo_id} at {revision} cannot be downloaded: {shown}; check repo_id, revision, "
            f"connection and proxy, or use `{_EMBEDDED[repo_type]}`, which needs no network"
        ) from error
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    paths = [folder / name for name in filter_repo_objects(names, allow_patterns=patterns)]
    for path in paths:
        _check_hash(path)
    try:
        get_cached_repo_tree(**repository)
    except CachedRepoTreeNotFoundError:  # the cache is a copy or old
        found = ", ".join(path.name for path in paths) or "none"
        print(
            f"note: the local cache holds no list of the files of {repo_id}, so a missing file "
            f"cannot be noticed; found of {', '.join(patterns)}: {found}",
            file=sys.stderr,
        )
    return folder, paths


def _check_hash(path: Path) -> None:
    """Compare a file with the hash that is its name in the cache, if the cache has links."""
    name = path.readlink().name if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return
    # Large files have a sha256, the others git's hash.
    digest = sha256(path) if len(name) == 64 else git_hash(path.read_bytes())
    if digest != name:
        raise ValueError(
            f"{path} must have the hash {name} of the Hugging Face Hub, got {digest}: delete "
            f"{path.resolve()} and run this again"
        )
