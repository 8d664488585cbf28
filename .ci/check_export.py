"""Compare an exported model, opened without this project, with the model here.

Run `python .ci/check_export.py [models/finetuned]` in the top folder after `make repro`. It exports
the model and opens it in a virtual environment of torch, transformers and safetensors alone: first
as requirements.txt pins them, then with the newest transformers of the package index. All continue
the first test document in float32.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = ("torch", "transformers", "safetensors")  # torch first: others may pull another build
PROMPT_TOKENS, NEW_TOKENS = 600, 40  # the prompt crosses two borders of the default's segments

OPEN_EXPORTED = """
import importlib.util, sys, torch, transformers
from transformers import AutoModelForCausalLM
strange = [n for n in ("infini_retrofit", "jaxtyping", "peft") if importlib.util.find_spec(n)]
assert not strange, strange
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model = model.float().eval()
"""
OPEN_HERE = """
import sys, torch, transformers
from pathlib import Path
from infini_retrofit import enable_generation, load_retrofit
model, form = load_retrofit(Path("models/base"), Path(sys.argv[1]), torch.float32)
enable_generation(model, form)
"""
GENERATE = """
ids = torch.tensor([list(map(int, sys.argv[2].split(",")))])
with torch.no_grad():
    last = model(ids, use_cache=False).logits[0, -1]
new = model.generate(ids, max_new_tokens=int(sys.argv[3]), do_sample=False)[0, ids.shape[1]:]
print(",".join(map(str, new.tolist())), float(last.double().square().sum()), end=" ")
print("transformers", transformers.__version__)
"""


def main() -> None:
    """Print all results; exit with 1 if the tokens differ."""
    retrofit = sys.argv[1] if len(sys.argv) > 1 else "models/finetuned"
    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder, "model"))
        run(sys.executable, "-m", "infini_retrofit.share.export", retrofit, exported)
        python = make_environment(Path(folder, "venv"))
        prompt = ",".join(map(str, first_tokens()))
        here = generate(sys.executable, OPEN_HERE, retrofit, prompt, Path.cwd())
        there = [generate(python, OPEN_EXPORTED, exported, prompt, Path(folder))]
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "transformers")
        there.append(generate(python, OPEN_EXPORTED, exported, prompt, Path(folder)))
    print("\n".join([f"here:  {here}", *(f"there: {line}" for line in there)]))
    same = {line.split()[0] for line in there} == {here.split()[0]}
    print(f"{NEW_TOKENS} tokens are {'the same' if same else 'NOT the same'}")
    sys.exit(0 if same else 1)


def make_environment(folder: Path) -> str:
    """Make a virtual environment with the few packages, and return its Python."""
    pinned = Path("requirements.txt").read_text(encoding="utf-8")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for package in PACKAGES:
        version = re.search(rf"^{package}==\S+", pinned, re.MULTILINE).group()
        run(python, "-m", "pip", "install", "--quiet", version)
    return python


def first_tokens() -> list[int]:
    """Return the prompt: the beginning of the first test document."""
    import pandas

    document = pandas.read_parquet("data/longdocs/test.parquet").iloc[0]
    return [int(token) for token in document["input_ids"][:PROMPT_TOKENS]]


def generate(python: str, opening: str, model: str, prompt: str, folder: Path) -> str:
    """Return the new tokens, and the sum of squares of the prompt's last logits."""
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [python, "-c", opening + GENERATE, model, prompt, str(NEW_TOKENS)]
    done = subprocess.run(words, cwd=folder, env=alone, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def run(*command: str) -> None:
    """Run a command; it must succeed."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
