"""Write docs/configuration.md: every key of a configuration, from the classes that check them.

    python scripts/configuration_reference.py

A key's meaning is the comment beside it in the source. Run this command after changing one.
"""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from common.files import write_text
from common.keys import list_keys
from common.options import Options
from probing.options import ProbeOptions
from training.config import SoftTargetConfig, TrainConfig
from training.evaluate import EvaluateOptions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

Every key with its type, default and meaning, as `--help` prints them. This page is written by
`scripts/configuration_reference.py`. On the command line, a key is an option, nested keys have a dot:
`--optimizer_args.lr 3e-4`. In `trainconfig/own_*.yaml` some keys are `auto`: their value is chosen from the data, and
logged, when the run starts.
"""
_SECTIONS: dict[str, tuple[str, type[Options]]] = {
    "Training": ("A YAML file for `python run.py train CONFIG.yaml`, see `trainconfig/`.", TrainConfig),
    "Soft targets and embeddings": (
        "A YAML file for `python save_logits.py CONFIG.yaml`, see `logitconfig/`.",
        SoftTargetConfig,
    ),
    "Evaluation": ("Options of `python run.py evaluate MODEL`.", EvaluateOptions),
    "Probe": ("Options of `python run.py probe MODEL`.", ProbeOptions),
}


def describe_section(options: type[Options]) -> Iterator[str]:
    """Yield the lines on the keys of a class, grouped by its headings."""
    for group, keys in groupby(list_keys(options), key=lambda key: key.group):
        yield from ["", f"### {group.partition(';')[0].capitalize()}"] if group else []
        yield ""
        for key in keys:
            default = "must be given" if key.default is None else f"default `{key.default}`"
            yield f"- **`{key.name}`** ({key.kind}; {default}): {key.meaning.replace(' (ours)', '')}"


def create_page() -> str:
    """Return the page in Markdown."""
    lines = [_INTRODUCTION.rstrip()]
    for title, (usage, options) in _SECTIONS.items():
        lines += ["", f"## {title}", "", usage, *describe_section(options)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(PAGE, create_page())
