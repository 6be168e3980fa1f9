"""The pictures of results, which the site shows from where the experiments leave them."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def on_files(files: Files, config: Any) -> None:
    """Adds the pictures of experiments to the site."""
    for picture in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Leads links to pictures, which are relative to the repository, to where they are here."""
    return markdown.replace("../experiments/results/", "results/")
