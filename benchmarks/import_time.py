"""Time that `import mgllava` takes in addition to torch and transformers, by stage.

`import transformers` alone loads almost nothing: classes are imported when they are first accessed. So there are
stages, each in fresh interpreters that take turns: the two packages; the Auto classes, which a package must load to
register its models; a vision-language model of transformers and its processor (what any model of that kind costs); and
mgllava. Wall clock and processor time, the minimum of all runs.
"""

import argparse
import subprocess
import sys

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
    """Run statements in a new interpreter; seconds of wall clock and processor, and the number of modules."""
    code = MEASURE.format(statements=statements)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()[-3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each stage")
    repeats = parser.parse_args().repeats
    measure(STAGES["+ LLaVA + mgllava"])  # compiles what is not compiled yet, and fills the page cache
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
    main()
