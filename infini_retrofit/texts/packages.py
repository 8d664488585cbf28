"""Python sources of installed packages: text that needs a long memory, on every machine the same.

Knows nothing of splits on disk and of tokens.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from infini_retrofit.pipeline.progress import note
from infini_retrofit.texts.corpora import PackagesCorpus
from infini_retrofit.texts.splits import SPLITS, Article, check_splits, title_order

# Folders of tests and of code that was copied from elsewhere.
_LEFT_OUT = {"tests", "test", "testing", "_vendor", "vendor", "vendored", "_vendored_packages"}
_LONG_LINE = 20  # characters without indentation; shorter lines stand everywhere
_MOST_KNOWN = 0.5  # of a file's long lines; beyond, it is a near copy


def read_packages(corpus: PackagesCorpus) -> dict[str, list[Article]]:
    """Read the .py files of each split's packages, near copies once.

    A file is left out if most of its lines stood in a file before it; the files of test come
    first, those of train last, so that no file of train is a near copy of one of test.

    Raises:
        ValueError: if a package is not installed in the version that the corpus names.
    """
    known: set[str] = set()
    splits: dict[str, list[Article]] = {}
    for split in reversed(SPLITS):
        splits[split] = []
        for requirement in getattr(corpus, split):
            files = _read_package(requirement)
            new = [file for file in files if _is_new(file, known)]
            if near := len(files) - len(new):
                note(f"{requirement}: {near:,} of {len(files):,} files are near copies, left out")
            long = [file for file in new if len(file.text) >= corpus.min_characters]
            splits[split] += sorted(long, key=title_order)[: corpus.files_per_package]
    check_splits(splits)
    return {split: splits[split] for split in SPLITS}


def _read_package(requirement: str) -> list[Article]:
    """Read a package `name==version`, in the order of the files' names."""
    name, _, version = requirement.partition("==")
    found = _installed(name, requirement)
    if found.version.partition("+")[0] != version:  # of torch, +cpu is the same text
        raise ValueError(
            f"corpora.<preset> must name installed packages, got {requirement}: {found.version} is "
            f"installed; run `python -m pip install {requirement}`"
        )
    paths = sorted(path for path in found.files or [] if path.suffix == ".py")
    kept = [path for path in paths if not _LEFT_OUT & set(path.parts)]
    texts = {str(path): path.locate().read_text(encoding="utf-8") for path in kept}
    return [
        Article(f"{name}: {path}", text, source=name)
        for path, text in texts.items()
        if text.strip()
    ]


def _installed(name: str, requirement: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise ValueError(
            f"corpora.<preset> must name installed packages, got {requirement}: "
            f"run `python -m pip install {requirement}`"
        ) from error


def _is_new(file: Article, known: set[str]) -> bool:
    """Return whether a file is no near copy; then its lines are known from now on."""
    lines = {line for raw in file.text.splitlines() if len(line := raw.strip()) >= _LONG_LINE}
    if len(lines & known) >= max(_MOST_KNOWN * len(lines), 1):
        return False
    known |= lines
    return True
