"""The model of the examples: `--model FOLDER_OR_HUB_ID`, by default the small one of this git repository."""

import argparse
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "small_world" / "model"


def model_name(description: str | None = None) -> str:
    """Read the option from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT), help="folder or Hub id of an MG-LLaVA model")
    name: str = parser.parse_args().model
    return name
