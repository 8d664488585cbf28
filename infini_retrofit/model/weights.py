"""Weights from disk: every tensor there, no other, of the right shape and type, finite.

Exported folders hold a copy of this file. Knows no file of this project by name.
"""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

_SIZES = dict.fromkeys(["hidden_size", "intermediate_size", "vocab_size"], 2**31)
_SIZES |= {"num_attention_heads": 2**16, "num_hidden_layers": 1000}
_FLOATS = {"F32", "BF16", "F16"}  # as safetensors names them
# What transformers raises for damaged files: it has no error of its own for them.
_OF_TRANSFORMERS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
)


def check_sizes(config: Mapping[str, Any], source: object, advice: str) -> None:
    """Refuse sizes that no model has, before transformers builds anything of them.

    Raises:
        ValueError: names the key of `config`, the contents of a file config.json.
    """
    for name, most in _SIZES.items():
        size = config.get(name)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"{name} of {source} must be in 1..{most}, got {size!r}: {advice}")


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors by name, and what it says of itself.

    `advice` is the way out, for errors.

    Raises:
        ValueError: if the file is of another kind or cut off, or holds NaN or infinity.
    """
    with _whole(path, advice), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    check_finite(tensors, path, advice)
    return tensors, about


def kind_of(x: Tensor) -> str:
    """Return the number type and shape of a tensor, such as `float32 [3, 4]`."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def check_kinds(
    found: Mapping[str, str], wanted: Mapping[str, str], source: object, advice: str
) -> None:
    """Refuse the first tensor that is missing, strange or of another kind, as `kind_of` says."""
    for name in sorted(found.keys() | wanted.keys()):
        want, got = (side.get(name, "no tensor") for side in (wanted, found))
        if want != got:
            raise ValueError(f"{name} of {source} must be {want}, got {got}: {advice}")


def check_finite(tensors: Mapping[str, Tensor], source: object, advice: str) -> None:
    """Refuse NaN and infinity; tensors on the device `meta` hold nothing."""
    for name, x in tensors.items():
        if x.is_floating_point() and not x.is_meta and not x.isfinite().all():
            raise ValueError(f"{name} of {source} must be finite, got NaN or infinity: {advice}")


def load_whole(
    load: Callable[..., Any], plan: PreTrainedModel, folder: Path | str, advice: str, **options: Any
) -> PreTrainedModel:
    """Call a `from_pretrained` on a folder, or a name on the Hub, and refuse damaged weights.

    transformers makes up what is missing, and leaves out what is strange. `plan` is the model of
    the folder's configuration, on the device `meta`; `options` are for `load`.

    Raises:
        ValueError: if the files are not whole, or do not hold what `plan` needs.
    """
    wanted = sum(x.numel() for x in plan.parameters())
    found = _check_headers(Path(folder), plan, advice) if Path(folder).is_dir() else wanted
    if wanted > 2 * found:  # transformers would fill the machine's memory
        raise ValueError(
            f"{folder}/config.json must describe {found:,} values, as the weights hold, got "
            f"{wanted:,}: {advice}"
        )
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with read_by_transformers(folder, advice):
        model, loading = load(folder, use_safetensors=True, **options)
    for name, got, want in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"{name} of the weights of {folder} must be {list(want)}, got {list(got)}: {advice}"
        )
    for fault in ("missing", "unexpected"):
        for name in sorted(loading[f"{fault}_keys"]):
            raise ValueError(f"{name} of the weights of {folder} is {fault}: {advice}")
    if found != wanted and sum(x.numel() for x in model.parameters()) != wanted:
        raise ValueError(
            f"tie_word_embeddings of {folder}/config.json must be false, for the weights of head "
            f"and embeddings differ, got true: {advice}"
        )
    check_finite(dict(model.named_parameters()), f"the weights of {folder}", advice)
    return model


def _check_headers(folder: Path, plan: PreTrainedModel, advice: str) -> int:
    """Refuse files that are cut off or hold no floats; return how many values they hold.

    All are of one number type, but what stays float32 in a model of a shorter one.
    """
    _check_shards(folder, advice)
    types, values = {}, Counter()
    for path in sorted(folder.glob("model*.safetensors")):
        with _whole(path, advice), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not _is_ignored(name, plan):
                    x = file.get_slice(name)
                    types[f"{name} of {path}"] = x.get_dtype()
                    values[x.get_dtype()] += math.prod(x.get_shape())
    if not values:
        raise FileNotFoundError(f"{folder} holds no weights in model*.safetensors: {advice}")
    usual = values.most_common(1)[0][0]
    for name, got in types.items():
        if got not in {usual, "F32"} & _FLOATS:
            raise ValueError(f"{name} must be {usual} or F32, got {got}: {advice}")
    return values.total()


def _check_shards(folder: Path, advice: str) -> None:
    """Refuse weights in several files of which one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lost = sorted(name for name in names if not (folder / name).is_file())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{index} must name a file for each weight: {advice}") from error
    if lost:
        told = f"{folder / lost[0]} is missing, which {index.name} names"
        raise FileNotFoundError(f"{told}: {advice}")


def _is_ignored(name: str, model: PreTrainedModel) -> bool:
    """Return whether a family's older files hold this tensor, and its models do not."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns)


@contextlib.contextmanager
def read_by_transformers(source: object, advice: str) -> Iterator[None]:
    """Turn what transformers raises for a damaged file into one ValueError.

    Raises:
        ValueError: with the sentence of transformers.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _OF_TRANSFORMERS as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"transformers cannot read {source} ({told}): {advice}") from error


@contextlib.contextmanager
def _whole(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file ({error}): {advice}") from error
