"""An exported model: a complete folder that opens without this library.

Knows nothing of the pipeline that made the model.
"""

import re
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from infini_retrofit.generation import modeling
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_tokenizer, read_about
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.files import MANIFEST, whole_folder, write_manifest, write_text
from infini_retrofit.share import shapes
from infini_retrofit.share.card import About, card_text

MODELING, SHAPES = Path(modeling.__file__), Path(shapes.__file__)
LIBRARY = MODELING.parents[1]
_OURS = re.compile(rf"^from {LIBRARY.name}\.(\w+)\.(\w+) import", re.MULTILINE)


def export_model(
    base_dir: Path, folder: Path, out: Path, about: About, other_layers: str | None = None
) -> None:
    """Write a retrofit's folder and its base's as one complete folder `out`, or nothing.

    `other_layers` is `segment` or `full`; None: as the retrofit says.
    """
    check_new(out)
    model, params = load_retrofit(base_dir, folder, torch.float32)
    if other_layers is not None:
        model.config.other_layers = other_layers
    names, seen = (out.name, folder.name), model.config.other_layers
    card = card_text(about, names, asdict(read_about(base_dir)), params, seen)
    with whole_folder(out) as new:
        as_exported(model).save_pretrained(new)
        load_tokenizer(base_dir).save_pretrained(new)
        write_code(new)
        write_text(new / "README.md", card)
        write_manifest(new)
        # safetensors writes what its owner alone can read: give every file the usual mode.
        for path in filter(Path.is_file, new.rglob("*")):
            path.chmod((new / MANIFEST).stat().st_mode)


def check_new(out: Path) -> None:
    """Refuse to write into a folder that exists."""
    if out.exists():
        raise FileExistsError(f"{out} must be a new folder, got one that exists: remove it first")


def as_exported(model: PreTrainedModel) -> PreTrainedModel:
    """Return a loaded retrofit as the model that an exported folder opens as, weights shared.

    The retrofit itself generates with an `InfiniCache` from then on, as the exported model does.
    """
    enable_generation(model, InfiniParams(**model.config.infini))
    kind = modeling.model_class(model.config.model_type)
    fields = model.config.to_dict()
    del fields["model_type"]
    fields["auto_map"] = {
        "AutoConfig": f"{MODELING.stem}.{kind.config_class.__name__}",
        "AutoModelForCausalLM": f"{MODELING.stem}.{kind.__name__}",
        "AutoModel": f"{MODELING.stem}.{modeling.body_name(kind.__name__)}",
    }
    config = kind.config_class(**fields)
    exported = kind.from_pretrained(None, config=config, state_dict=model.state_dict())
    exported.generation_config = model.generation_config
    return exported.eval()


def write_code(out: Path) -> None:
    """Write the modelling code: every file that it needs of this library, side by side."""
    sources, waiting = {SHAPES}, {MODELING}
    while waiting:
        sources.add(source := waiting.pop())
        names = _OURS.findall(source.read_text(encoding="utf-8"))
        waiting |= {LIBRARY / room / f"{module}.py" for room, module in names} - sources
    for source in sources:
        text = _OURS.sub(r"from .\2 import", source.read_text(encoding="utf-8"))
        text = text.replace("\nfrom jaxtyping import", f"\nfrom .{SHAPES.stem} import")
        origin = source.relative_to(LIBRARY.parent).as_posix()
        write_text(out / source.name, f"# Made from {origin}: change it there.\n{text}")
