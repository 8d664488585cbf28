"""Types of the fields in params.yaml: what a number, a name or a path can be at all.

Knows no section. The ranges that only one field has stand with its dataclass.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated

from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, Field

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Batch = Annotated[int, Field(gt=0, le=65_536)]  # rows that are in memory at once
Epochs = Annotated[int, Field(gt=0, le=1_000_000)]
EpochsOrZero = Annotated[int, Field(ge=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
LearningRate = Annotated[float, Field(ge=1e-12, le=10)]  # a lower one moves no float32 weight
Factor = Annotated[float, Field(ge=0, le=1000)]
Weight = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _must_match(pattern: str, wanted: str, advice: str = "") -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"must be {wanted}, got {text!r}{advice}")
        return text

    return AfterValidator(check)


def _check_path(path: str) -> str:
    """Refuse what no file system could hold; `..` may be meant."""
    if not path.strip():
        raise ValueError(f"must be a path, got {path!r}")
    if max(len(part.encode()) for part in path.split("/")) > 255:
        raise ValueError("must be a path of names of at most 255 bytes")
    return path


def _check_inside(path: str) -> str:
    """Refuse a path that leads out of its package or repository."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(f"must be a relative path without .., got {path!r}")
    return path


def _check_repo_id(repo_id: str) -> str:
    validate_repo_id(repo_id)
    return repo_id


LocalPath = Annotated[str, AfterValidator(_check_path)]
InnerPath = Annotated[LocalPath, AfterValidator(_check_inside)]
Commit = Annotated[
    str,  # no branch or tag, which moves
    _must_match(
        "[0-9a-f]{40}",
        "a commit of 40 lower-case hexadecimal digits",
        ": copy one from the history of the repository on the Hugging Face Hub",
    ),
]
Sha256 = Annotated[str, _must_match("[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
RepoId = Annotated[str, AfterValidator(_check_repo_id)]
Package = Annotated[str, _must_match(r"[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?", "a package's name")]
Version = Annotated[str, _must_match(r"[a-zA-Z0-9][\w.!+-]*", "a package's version")]
Requirement = Annotated[
    str,
    _must_match(
        r"[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?==[a-zA-Z0-9][\w.!+-]*", "a package's name==version"
    ),
]
# DVC gives the launcher to a shell, to which other characters have a meaning.
Launcher = Annotated[
    str,
    _must_match(
        r"[\w./][\w./=:,@%+-]*( [\w./=:,@%+-]+)*",
        "a command such as python",
        ": write words of letters, digits and _ . / = : , @ % + - with one blank between two, for "
        "DVC gives it to a shell",
    ),
]
