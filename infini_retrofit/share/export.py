"""A retrofitted model as one complete folder, which opens without this library.

`python -m infini_retrofit.share.export models/finetuned OUT` writes weights, tokenizer, modelling
code and a model card. `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` opens it.
"""

import argparse
import ast
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from infini_retrofit.generation import modeling
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.checkpoints import OTHER_LAYERS, load_retrofit
from infini_retrofit.pipeline.files import MANIFEST, write_manifest, write_text
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.share import shapes
from infini_retrofit.share.card import Card, write_card
from infini_retrofit.share.imports import first_party_files
from infini_retrofit.share.record import read_record

PACKAGE = "infini_retrofit"
MODELING, SHAPES = Path(modeling.__file__), Path(shapes.__file__)
_OURS = re.compile(rf"^(\s*)from {PACKAGE}\.\w+\.(\w+) import", re.MULTILINE)
_JAXTYPING = re.compile(r"^(\s*)from jaxtyping import", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model card says that the model's folders do not.

    Attributes:
        metrics: results by the name of their file; a nested one has a column for each model.
        training: parameters by stage; empty, as metrics may be: not recorded.
        license: an identifier of the Hugging Face Hub; None: the base's, if its source is known.
        base_model: the base's name on the Hub; None: what its source tells.
    """

    metrics: dict[str, Any]
    training: dict[str, Any]
    license: str | None = None
    base_model: str | None = None


def export_model(
    base_dir: Path, folder: Path, out: Path, about: About, other_layers: str | None = None
) -> None:
    """Write the complete folder, all of it or nothing.

    Args:
        base_dir: the base model's folder.
        folder: the retrofit's folder.
        out: the new folder.
        about: for the model card.
        other_layers: `segment` or `full`; None: what the retrofit says.

    Raises:
        FileExistsError: if there is something at `out` already.
        NotADirectoryError: if `out` would lie below a file.
        ValueError: if a file was changed or the base is another.
    """
    _check_out(out)
    model, params = load_retrofit(base_dir, folder, torch.float32)
    if other_layers is not None:
        model.config.other_layers = other_layers
    card = Card(
        name=out.name,
        column=folder.name,
        base=_about_base(base_dir),
        infini=params,
        other_layers=model.config.other_layers,
        **vars(about),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as partial:
        new = Path(partial) / out.name
        as_exported(model).save_pretrained(new)
        load_tokenizer(base_dir).save_pretrained(new)
        write_code(new)
        write_card(card, new / "README.md")
        write_manifest(new)
        _let_others_read(new)
        shutil.move(new, out)


def as_exported(model: PreTrainedModel) -> PreTrainedModel:
    """Return a loaded retrofit as the model that an exported folder opens as, weights shared.

    The retrofit itself generates with an `InfiniCache` from then on, as the exported model does.
    """
    enable_generation(model, InfiniParams(**model.config.infini))
    kind = modeling.MODELS[model.config.model_type]
    fields = model.config.to_dict()
    del fields["model_type"]
    fields["auto_map"] = {
        "AutoConfig": f"{MODELING.stem}.{kind.config_class.__name__}",
        "AutoModelForCausalLM": f"{MODELING.stem}.{kind.__name__}",
    }
    config = kind.config_class(**fields)
    exported = kind.from_pretrained(None, config=config, state_dict=model.state_dict())
    exported.generation_config = model.generation_config
    return exported.eval()


def write_code(out: Path) -> None:
    """Write the modelling code: files of this library, which import each other by name there."""
    for source in first_party_files(MODELING, MODELING.parents[2]):
        if source.stem != "__init__":
            write_text(out / source.name, _standing_alone(source))
    write_text(out / SHAPES.name, _standing_alone(SHAPES))


def _standing_alone(source: Path) -> str:
    """Return a file's text with this library's modules beside it, and none of jaxtyping's."""
    text = _OURS.sub(r"\1from .\2 import", source.read_text(encoding="utf-8"))
    text = _JAXTYPING.sub(rf"\1from .{SHAPES.stem} import", text)
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        left = {name.split(".")[0] for name in names} & {PACKAGE, "jaxtyping"}
        assert not left, f"{source} imports {left} in a form that is not rewritten"
    return f"# Made from {PACKAGE}/{source.name}: change it there.\n{text}"


def _about_base(base_dir: Path) -> dict[str, Any]:
    """Return what the pipeline noted of a base; of a user's own folder there is only its name."""
    path = base_dir / "base.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"name": base_dir.name, "source": f"a folder named {base_dir.name}", "note": "none"}


def _check_out(out: Path) -> None:
    """Refuse a place where no new folder can be made."""
    if out.exists():
        raise FileExistsError(f"{out} must be a new folder, got one that exists: remove it first")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{out} must be a new folder, but {parent} is a file")


def _let_others_read(folder: Path) -> None:
    """Give every file the usual mode: safetensors writes what its owner alone can read."""
    mode = (folder / MANIFEST).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _named(path: Path | None, default: str, option: str) -> Path:
    """Return the default, or a path that was named, which must be there."""
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path} is missing: {option} must name what the pipeline wrote")
    return path or Path(default)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.export", description=__doc__)
    parser.add_argument("folder", type=Path, help="the retrofitted model, such as models/finetuned")
    parser.add_argument("out", type=Path, help="the folder to make")
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("--base", type=Path, default=Path("models/base"), help=f"folder of its base {default}")
    add("--metrics", type=Path, help="results for the card (default: metrics, if there)")
    add("--lock", type=Path, help="says what made the model (default: dvc.lock, if there)")
    parser.add_argument("--license", help="of the weights, as the Hugging Face Hub names it")
    parser.add_argument("--base-model", help="the base's name on the Hugging Face Hub")
    add("--other-layers", choices=OTHER_LAYERS, help="what they see (default: as the model says)")
    given = parser.parse_args(arguments)
    metrics = _named(given.metrics, "metrics", "--metrics")
    lock = _named(given.lock, "dvc.lock", "--lock")
    record = read_record(given.folder, metrics, lock)
    about = About(
        metrics=record.metrics,
        training=record.training,
        license=given.license,
        base_model=given.base_model,
    )
    export_model(given.base, given.folder, given.out, about, given.other_layers)
    if record.doubts:
        print(f"note: {'; '.join(record.doubts)}", file=sys.stderr)
    opened = f'AutoModelForCausalLM.from_pretrained("{given.out}", trust_remote_code=True)'
    print(f"wrote {given.out}; open it by {opened}")


if __name__ == "__main__":
    run_stage(main)
