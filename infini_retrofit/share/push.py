"""Push an exported folder to the Hugging Face Hub.

Needs `hf auth login`, or a token in HF_TOKEN. Knows nothing of models.
"""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError


def open_repository(repo_id: str) -> None:
    """Make a model repository, or find it: before a model is exported for nothing.

    Raises:
        ConnectionError: if the Hub cannot be reached or does not let this user write.
        ValueError: if `repo_id` is no name of a repository.
    """
    try:
        create_repo(repo_id, repo_type="model", exist_ok=True)
    except (HTTPError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{repo_id} cannot be made on the Hugging Face Hub ({_reason(error)}): run "
            "`hf auth login` with a token that may write, or leave out --push"
        ) from error


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder in one commit, and return its address.

    Raises:
        ConnectionError: if the Hub cannot be reached or refuses; the folder stays.
    """
    try:
        commit = upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Export {folder.name}"
        )
    except (HTTPError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{folder} cannot be pushed to {repo_id} ({_reason(error)}): run `hf upload {repo_id} "
            f"{folder}` to try again"
        ) from error
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    """Return what the Hub said, in one line."""
    return " ".join(str(error).split())
