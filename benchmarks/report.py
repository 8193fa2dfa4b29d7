"""Report of a benchmark: the machine, the versions, a table, and a JSON file under `benchmarks/results/`."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# Another folder for figures that must not replace those of this git repository, such as a rehearsal's.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def machine() -> dict[str, str | int]:
    """Describe the processor, the accelerator and the versions that a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "transformers", "timm")},
    }


def report(name: str, title: str, rows: list[dict]) -> None:
    """Print `rows` as a table and write them to `benchmarks/results/NAME.json`."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    console.width = max(console.width, 150)  # a log file must not cut the figures
    console.print(table)

    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content = {"title": title, "command": command, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
