"""The layout that the README draws: which part may import which."""

import ast

import pytest

from tests.helpers import ROOT

# Each imports only what stands before it.
TRAINING = (
    "errors",
    "records",
    "config",
    "workdir",
    "signals",
    "multihost",
    "state",
    "sharding",
    "compilation_cache",
    "metrics",
    "step",
    "plan",
    "data",
    "feeds.feed",
    "feeds.resident",
    "feeds.streamed",
    "feeds",
    "checkpoints.reading",
    "checkpoints.saving",
    "checkpoints",
    "reporting.curves",
    "reporting.tensorboard",
    "reporting.console",
    "reporting.reporter",
    "loop",
    "run",
    "export",
)
INPUT_PIPELINE = (
    "errors",
    "cloud",
    "classes",
    "command_line",
    "specs",
    "patience",
    "cores",
    "batch",
    "jpeg",
    "prepared",
    "resident",
    "streaming",
    "folders",
    "imagenet",
    "prepare",
)
MAY_IMPORT = {
    "agd_jax": set(),
    "models": set(),
    "input_pipeline": set(),
    "training": {"agd_jax", "models", "input_pipeline"},
    "experiments": {"agd_jax", "models", "input_pipeline", "training"},
}


def imports(file):
    """The modules of this repository that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                child = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                yield f"{node.module}.{alias.name}" if child.exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_is_below_them(package):
    others = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    for file in (ROOT / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & others, file


@pytest.mark.parametrize(
    ("package", "order"), [("training", TRAINING), ("input_pipeline", INPUT_PIPELINE)]
)
def test_modules_import_only_those_before_them(package, order):
    files = {
        ".".join(file.relative_to(ROOT / package).with_suffix("").parts).removesuffix(
            ".__init__"
        ): file
        for file in (ROOT / package).rglob("*.py")
    }
    files.pop("__init__")
    assert set(order) == files.keys() - {"reporting"}
    for place, name in enumerate(order):
        found = {
            i.removeprefix(f"{package}.") for i in imports(files[name]) if i.startswith(package)
        }
        assert found <= {*order[:place], package}, name
