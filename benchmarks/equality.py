"""Measure the greatest absolute difference from the original in each stage, over the golden cases.

Usage: `python benchmarks/equality.py` in the root folder of the git repository.
"""

import sys
import tempfile
from pathlib import Path

import torch
from golden_model import convert_golden
from report import report
from transformers import AutoModel, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.golden_cases import cases, load_tensors, process, run, stage_pairs


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_folder = convert_golden(Path(folder) / "model")
        model = AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(model_folder, backend="pil")

    differences: dict[str, float] = {}
    for golden in cases("image"):
        stages = run(model, process(processor, golden))
        for stage, actual, expected in stage_pairs(stages, load_tensors(f"cases/{golden['name']}")):
            differences[stage] = max(differences.get(stage, 0.0), (actual - expected).abs().max().item())
    rows = [{"stage": stage, "max difference": difference} for stage, difference in differences.items()]
    report("equality", f"Greatest difference from the original over {len(cases('image'))} images, float32 CPU", rows)


if __name__ == "__main__":
    main()
