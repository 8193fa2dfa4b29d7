"""Convert a checkpoint of the original from Python: `python examples/convert.py [FOLDER]`.

`mgllava convert` does the same on the command line. Each source may be a folder or a Hub id; here they are the small
ones of the tests.
"""

import json
import sys
from pathlib import Path

from mgllava.conversion import convert_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "tests" / "golden"


def main() -> None:
    repository = convert_checkpoint(
        checkpoint=SMALL / "xtuner" / "iter_10.pth",  # mg_llava's iter_10805.pth, or a DeepSpeed folder
        llm=SMALL / "llm",  # lmsys/vicuna-7b-v1.5
        vision_tower=SMALL / "clip",  # openai/clip-vit-large-patch14-336
        high_res_tower=SMALL / "convnext",  # laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup
        prompt_template="vicuna",
        output=Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output/converted"),
        overwrite=True,
    )
    report = json.loads((repository / "conversion_report.json").read_text())
    kind = report["checkpoint"]["kind"]
    print(f"Wrote {repository}: {len(report['tensors'])} tensors, the checkpoint being of kind {kind!r}")
    for source, reasons in report["dropped"].items():
        for reason, names in reasons.items():
            print(f"  left out: {len(names)} tensors of {source}, {reason}")


if __name__ == "__main__":
    main()
