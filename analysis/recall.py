"""What a memory of so many bytes recalls, by rule: its capacity, before any training.

A memory writes each token's embedding under a key of the state before it. The key is the first
principal components of what the last layer is given, whitened, so that nothing is trained. Asked
at every token that follows the same two tokens as once behind the window, and is what came then:
is the embedding of that token the nearest to what is recalled? A pointer is right by choice of
these tokens. Prints a table and the rows of results/recall.tsv.

Reads: params.yaml (corpora), models/base

Axes:
    T  token of a document
    A  token that is asked for
    D  model width
    W  word of the vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.context_worth import corpus_options, draw_documents
from analysis.programs import BASE, open_model, print_growing
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.evaluation.pointer import Stored
from infini_retrofit.layer.attention import InfiniAttention
from infini_retrofit.layer.compressive_memory import INITIAL_FLOOR, INITIAL_SHARPNESS
from infini_retrofit.layer.feature_maps import elu1
from infini_retrofit.layer.form import BYTES_PER_STATE_VALUE, InfiniParams, slot_bytes
from infini_retrofit.layer.memory import (
    UNIT_RULES,
    MemoryState,
    UpdateRule,
    Write,
    empty_state,
    match,
    retrieve,
    scan_states,
    slot_states,
    with_slots,
)
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.texts.splits import group_of
from infini_retrofit.training.whitening import whiten_keys

SEGMENT, WINDOW, TOKENS = 256, 256, 4096
WHITENED = 8  # documents, apart from those that are asked
MATCHED = 2  # tokens that were the same before
# Features, each of as many channels as the model is wide.
FEATURES = (16, 48, 144, 432, 576)
RULES: dict[UpdateRule, str] = {
    "linear": "sums (ELU + 1)",
    "delta": "delta rule as printed (ELU + 1)",
    "delta_gamma": "delta rule, ARMT's normaliser (ELU + 1)",
    "gated_delta": "delta rule token by token (length 1)",
    "neural_cache": "the last tokens' keys and ids (64, length 1)",
}
CACHE_FEATURES = 64  # of a slot: with its id, 132 bytes
FORM = InfiniParams(
    memory_layers=[-1],
    insertion="parallel",
    init="random_attention",
    local="none",
    positions="none",
    heads="single",
    update_rule="gated_delta",
    memory_key="before",
    memory_value="embedding",
    feature_map="unit",
    gate="head",
    decay="none",
    local_context=WINDOW,
    segment_length=SEGMENT,
)
ROWS = Path("results/recall.tsv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask each memory, and print a row of the table as soon as it is there."""
    about = "Ask untrained memories of every rule what they hold, by their bytes."
    options = corpus_options("recall", about, arguments)
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    model, _ = open_model(BASE)
    drawn = draw_documents(options.corpus, options.documents + WHITENED, TOKENS)
    documents = torch.stack([torch.from_numpy(d.input_ids).long() for d in drawn])
    documents = documents.to(model.device)
    asked, others = documents[: options.documents], documents[options.documents :]
    insert_infini(model, FORM)
    whiten_keys(model, others, SEGMENT, model.dtype)
    notes = [note_document(model, ids) for ids in tqdm(asked, "read documents", leave=False)]
    sources = [group_of(document) for document in drawn[: options.documents]]
    words = word_values(model)
    found = []

    def rows() -> Iterator[list[str]]:
        for rule, name in RULES.items():
            shares = {}
            for size in FEATURES:
                rights = [recall(*note, words, rule, size) for note in notes]
                shares[size] = [float(right.double().mean()) for right in rights]
                found.extend(
                    {"rule": rule, "bytes": state_bytes(words, size), "source": s, "share": share}
                    for s, share in zip(sources, shares[size], strict=True)
                )
            yield [name, *(write_share(shares[size], sources) for size in FEATURES)]

    heads = [f"{state_bytes(words, size):,} bytes" for size in FEATURES]
    print_growing(["rule (features)", *heads], rows())
    num_asked = sum(len(note[2]) for note in notes)
    print(f"{num_asked:,} tokens of {len(notes)} documents were asked for")
    write_text(ROWS, pd.DataFrame(found).to_csv(sep="\t", index=False, float_format="%.6f"))


def state_bytes(words: Float[Tensor, "W D"], num_features: int) -> int:
    """Return the bytes of a memory in 16 bits, its normalizer apart."""
    return num_features * words.shape[1] * BYTES_PER_STATE_VALUE["bfloat16"]


@torch.inference_mode()
def word_values(model: PreTrainedModel) -> Float[Tensor, "W D"]:
    """Return the value that is written for each word, of length 1."""
    embeddings = model.get_input_embeddings().weight
    values = branch_of(model).v_proj(F.rms_norm(embeddings, embeddings.shape[-1:]))
    return F.normalize(values.float(), dim=-1)


def branch_of(model: PreTrainedModel) -> InfiniAttention:
    """Return the branch beside the last layer."""
    return infini_modules(model)[model.config.num_hidden_layers - 1]


@torch.inference_mode()
def note_document(
    model: PreTrainedModel, ids: Int[Tensor, "T"]
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"], Int[Tensor, "A"], Int[Tensor, "T"]]:
    """Return each token's key and value, which tokens are asked for, and all ids."""
    noted: list[Tensor] = []
    branch = branch_of(model)

    def note(_: object, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        noted.extend((branch.k_proj(hidden), branch.v_proj(kwargs["embeddings"])))

    hook = branch.register_forward_pre_hook(note, with_kwargs=True)
    run_folded(model, ids[None], SEGMENT)
    hook.remove()
    key, value = (x.flatten(0, 1).float() for x in noted)
    stored = Stored(segment_length=SEGMENT, window=WINDOW, num_stored=len(ids))
    lengths, is_hit = (x[0] for x in stored.matches(ids[None]))
    asked = ((lengths >= MATCHED) & is_hit).nonzero()[:, 0] + 1
    return key, value, asked.to(ids.device), ids


@torch.inference_mode()
def recall(
    key: Float[Tensor, "T D"],
    value: Float[Tensor, "T D"],
    asked: Int[Tensor, "A"],
    ids: Int[Tensor, "T"],
    words: Float[Tensor, "W D"],
    rule: UpdateRule,
    num_features: int,
) -> Bool[Tensor, "A"]:
    """Write a document behind its window, and return which tokens are recalled."""
    if rule == "neural_cache":
        room, num_features = state_bytes(words, num_features), min(CACHE_FEATURES, key.shape[1])
        num_slots = max(1, room // slot_bytes(num_features, "bfloat16"))
        value = ids[:, None] + 1
    chosen = key[:, :num_features]
    feature = F.normalize(chosen, dim=-1) if rule in UNIT_RULES else elu1(chosen)
    # Token t is written under the key of the token before it, as `memory_key: before` does.
    old = F.pad(feature[:-1], (0, 0, 1, 0)).unflatten(0, (-1, SEGMENT))[None, :, None]
    write = Write(old, value.unflatten(0, (-1, SEGMENT))[None, :, None])
    if rule == "gated_delta":
        ones = torch.ones_like(old[..., 0])
        write = replace(write, strength=ones, log_decay=torch.zeros_like(ones))
    first = empty_state(write)
    if rule == "neural_cache":
        memories, _ = slot_states(write, with_slots(first, num_slots))
    else:
        memories, _ = scan_states(write, rule, first)
    query = asked - 1
    # A query sees what left the window before its own segment began.
    late = WINDOW // SEGMENT
    segment = (query // SEGMENT - late).clamp_min(0)
    if rule == "neural_cache":  # by segments: a memory for each query would take gigabytes
        recalled = words.new_zeros(len(asked), words.shape[1])
        for s in segment.unique():
            memory = memories.map(lambda x, s=s: x[0, s])
            recalled[segment == s] = _found(feature[query[segment == s]], memory, words)
    else:
        own = memories.map(lambda x: x[0, segment])
        recalled = retrieve(feature[query][:, None, None], own)[0][:, 0, 0]
    return (recalled @ words.T).argmax(dim=-1) == ids[asked]


def _found(
    feature: Float[Tensor, "A D"], memory: MemoryState, words: Float[Tensor, "W D"]
) -> Float[Tensor, "A D"]:
    """Return what a neural cache finds for queries of one segment."""
    scales = (feature.new_tensor([x]) for x in (INITIAL_SHARPNESS, INITIAL_FLOOR))
    return match(feature[None], memory, *scales)[0] @ words[(memory.normalizer[0] - 1).clamp_min(0)]


def write_share(shares: Sequence[float], sources: Sequence[str]) -> str:
    """Write the share that is recalled, with its interval."""
    mean, low, high = paired_bootstrap(shares, sources)
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"
