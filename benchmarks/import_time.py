"""Measure the time that `import mgllava` takes in addition to torch and transformers.

`import transformers` alone loads almost nothing: classes are imported when they are first accessed. So several imports
are compared: the two packages; the Auto classes, which a package must load to register its models; a vision-language
model of transformers with its processor, the minimum for any such model; and mgllava. Each runs several times in a new
interpreter, in turns; wall clock and processor time are the minima of all runs.
"""

import subprocess
import sys
from typing import Annotated

import typer
from report import report

PACKAGES = "import torch, transformers"
AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor"
LLAVA = "from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlamaModel, "
LLAVA += "LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor"
STAGES = {
    "torch, transformers": PACKAGES,
    "+ Auto classes": f"{PACKAGES}\n{AUTO}",
    "+ LLaVA of transformers": f"{PACKAGES}\n{LLAVA}",
    "+ mgllava": f"{PACKAGES}\nimport mgllava",
    "+ LLaVA + mgllava": f"{PACKAGES}\n{LLAVA}\nimport mgllava",
}
MEASURE = """
import sys, time
wall, processor = time.perf_counter(), time.process_time()
{statements}
print(time.perf_counter() - wall, time.process_time() - processor, len(sys.modules))
"""


def measure(statements: str) -> list[float]:
    """Run statements in a new interpreter, and return wall clock and processor seconds and the number of modules."""
    code = MEASURE.format(statements=statements)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()[-3:]]


def main(repeats: Annotated[int, typer.Option(help="runs of each import")] = 7) -> None:
    """Measure every import, and print and store the table."""
    measure(STAGES["+ LLaVA + mgllava"])  # compiles modules to bytecode, and fills the page cache
    runs: dict[str, list[list[float]]] = {stage: [] for stage in STAGES}
    for _ in range(repeats):
        for stage, statements in STAGES.items():
            runs[stage].append(measure(statements))
    base = [min(column) for column in zip(*runs["torch, transformers"], strict=True)]
    rows = []
    for stage, results in runs.items():
        wall, processor, modules = (min(column) for column in zip(*results, strict=True))
        rows.append(
            {
                "import": stage,
                "wall s": wall,
                "beyond the first row s": wall - base[0],
                "processor s": processor,
                "beyond the first row processor s": processor - base[1],
                "modules": int(modules),
            }
        )
    report("import_time", f"Import time, least of {repeats} runs", rows)


if __name__ == "__main__":
    typer.run(main)
