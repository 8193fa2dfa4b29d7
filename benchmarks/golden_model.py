"""The small checkpoint of the tests, converted."""

from pathlib import Path

from mgllava.conversion import convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def convert_golden(output: Path) -> Path:
    """Convert the checkpoint to a model folder, and return that folder."""
    return convert_checkpoint(
        checkpoint=GOLDEN / "xtuner" / "iter_10.pth",
        llm=GOLDEN / "llm",
        vision_tower=GOLDEN / "clip",
        high_res_tower=GOLDEN / "convnext",
        prompt_template="vicuna",
        output=output,
    )
