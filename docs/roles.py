"""Docstrings are written with Sphinx's roles; the site reads Markdown."""

import re
import textwrap
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1.+\n)*", re.MULTILINE)
ONE_LINE = re.compile(r"^( *)\.\. math:: (.+)$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Returns a docstring with its formulas, examples and references as Markdown has them."""

    def block(found: re.Match[str]) -> str:
        formula = textwrap.dedent(found[2]).strip()
        if "&" in formula:
            formula = f"\\begin{{aligned}}\n{formula}\n\\end{{aligned}}"
        return textwrap.indent(f"\n\\[\n{formula}\n\\]\n\n", found[1])

    text = ONE_LINE.sub(lambda found: f"{found[1]}\\[{found[2]}\\]", BLOCK.sub(block, text + "\n"))
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r":(?:func|class|meth|mod|data):`([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`")
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}{found[1]}```\n", text)


class Roles(griffe.Extension):
    """Translates every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Translates that of one object."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
