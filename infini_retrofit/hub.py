"""Files of one commit of a repository on the Hugging Face Hub.

Knows neither models nor corpora.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def fetch_snapshot(
    repo_id: str,
    revision: str,
    patterns: list[str],
    *,
    embedded: str,
    repo_type: str = "model",
) -> Path:
    """Fetch what is not in the local cache yet, and return the folder that holds it.

    Args:
        repo_id: such as `EleutherAI/pythia-70m`.
        revision: a commit; branches and tags move.
        patterns: of the files wanted.
        embedded: the line of params.yaml that needs no network, for the message.
        repo_type: `model` or `dataset`.

    Raises:
        ValueError: if the Hub has no such repository or commit, or none open to this user.
        ConnectionError: if the Hub cannot be reached and the cache does not hold the commit.
    """
    try:
        folder = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=patterns
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"repo_id and revision must name a {repo_type} of the Hugging Face Hub that is open to "
            f"you, got {repo_id!r} at {revision}"
        ) from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"{repo_id} is not in the local cache and the Hugging Face Hub cannot be reached; "
            f"the embedded default (`{embedded}`) needs no network"
        ) from error
    return Path(folder)
