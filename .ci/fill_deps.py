"""Write into dvc.yaml which Python files each stage needs, from the import statements.

Run `python .ci/fill_deps.py` in the top folder after a change of imports. Dependencies that are
not Python files, comments and order stay as they are.
"""

import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infini_retrofit.imports import first_party_files  # noqa: E402


def main() -> None:
    """Rewrite dvc.yaml in place."""
    yaml = YAML()
    yaml.width = 100
    path = ROOT / "dvc.yaml"
    pipeline = yaml.load(path)
    for name, stage in pipeline["stages"].items():
        source = ROOT / "stages" / f"{name}.py"
        if not source.is_file():
            print(f"stages/{name}.py does not exist yet, left as it is")
            continue
        files = [file.relative_to(ROOT).as_posix() for file in first_party_files(source)]
        stage["deps"] = files + [dep for dep in stage["deps"] if not dep.endswith(".py")]
    yaml.dump(pipeline, path)


if __name__ == "__main__":
    main()
