"""Make `dvc plots show` work without internet; run once at set-up.

DVC's page loads Vega from the network and stays blank without it. This writes a page template
with the scripts inside and names it in DVC's local configuration, which is not committed: a
configuration that names a missing file would break every `dvc plots`.
"""

import subprocess
import sys
from pathlib import Path

import vl_convert

from infini_retrofit.pipeline.files import write_text

TEMPLATE = Path("plots/offline.html")  # DVC reads it relative to its own folder
VEGA_LITE = "5.20"
_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>DVC plots</title>
<script>{scripts}</script>
<style>body {{font-family: sans-serif}} img {{max-width: 100%}}</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def main() -> None:
    """Write the template and point DVC at it."""
    write_text(Path(".dvc") / TEMPLATE, page())
    setting = ["plots.html_template", str(TEMPLATE)]
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", *setting], check=True)


def page() -> str:
    """Return a page with DVC's two placeholders and everything that draws inside."""
    scripts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    assert "</script" not in scripts.lower()
    return _PAGE.format(scripts=scripts)


if __name__ == "__main__":
    main()
