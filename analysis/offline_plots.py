"""Make `dvc plots show` work without internet; run once at set-up.

The page of this project loads Vega from the network, and says so where it cannot. This writes
one with the scripts inside and names it in DVC's local configuration, which is not committed: a
configuration that names a missing file would break every `dvc plots`.
"""

import subprocess
import sys
from pathlib import Path

import vl_convert

from infini_retrofit.pipeline.files import write_text

PAGE, TEMPLATE = Path("plots/page.html"), Path("plots/offline.html")  # DVC looks in .dvc
VEGA_LITE = "5.20"
_SCRIPTS = "{scripts}"  # DVC puts the addresses of scripts here


def main() -> None:
    """Write the template and point DVC at it."""
    write_text(Path(".dvc") / TEMPLATE, page())
    setting = ["plots.html_template", str(TEMPLATE)]
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", *setting], check=True)


def page() -> str:
    """Return the project's page of plots with everything that draws inside."""
    scripts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    assert "</script" not in scripts.lower()
    template = (Path(".dvc") / PAGE).read_text(encoding="utf-8")
    assert _SCRIPTS in template
    return template.replace(_SCRIPTS, f"<script>{scripts}</script>")


if __name__ == "__main__":
    main()
