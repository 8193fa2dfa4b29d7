"""The model of the examples: `--model FOLDER_OR_HUB_ID`, by default the small one that `make demo` makes."""

import argparse
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "demo-output" / "model"


def model_name(description: str | None = None) -> str:
    """Read the option from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT), help="folder or Hub id of an MG-LLaVA model")
    name = parser.parse_args().model
    if name == str(DEFAULT) and not DEFAULT.is_dir():
        parser.exit(1, f"There is no {DEFAULT} yet. Run `make demo`, which makes it, or pass --model.\n")
    return name
