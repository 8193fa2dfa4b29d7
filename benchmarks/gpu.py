"""Run what needs a GPU, the most important first, in at most 8 minutes.

Each step is a process of its own with a time limit; a step that fails or takes too long does not stop the others. What
happened is in `benchmarks/results/gpu/STEP.json`, next to the figures that the steps store in `benchmarks/results/`.

Usage: `python benchmarks/gpu.py` on a machine with a GPU; `--rehearse` runs all steps with tiny sizes on a CPU.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS = 480.0
# The speed-up of the box detector over the original's algorithm that is expected, per image in a batch of 8.
DETECTOR_SPEEDUP = 8.0
OUTPUT_CHARACTERS = 4000
# With less time left, a step is not started: it would be stopped while it loads.
SHORTEST_SECONDS = 20.0


@dataclass(frozen=True)
class Step:
    """A part of the benchmark.

    Attributes:
        name: Name of its result file.
        command: Script of this folder, or module after `-m`, with its options.
        rehearsal: Options instead, for tiny sizes on a CPU.
        seconds: Its time limit.
        packages: What it imports beyond the packages that this package always needs.
        optional: Whether it is left out if they are missing.
        results: Names of the files of figures that it writes.
    """

    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    seconds: float
    packages: tuple[str, ...] = ()
    optional: bool = False
    results: tuple[str, ...] = ()


def _generation(name: str, weights: str, mode: str, seconds: float, batches: Sequence[int]) -> Step:
    options = ("--weights", weights, "--mode", mode)
    batch = [word for size in batches for word in ("--batch", str(size))]
    return Step(
        name,
        ("generation.py", *options, *batch, "--steps", "64"),
        ("generation.py", *options, "--batch", "1", "--steps", "2", "--preset", "tiny", "--device", "cpu"),
        seconds,
        ("bitsandbytes",),
        results=("generation",),
    )


STEPS = (
    Step(
        "tests",
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/modeling", "tests/processing"),
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/modeling/test_gpu.py"),
        150,
        ("pytest",),
    ),
    Step(
        "detector",
        ("detector.py", "--device", "cuda", "--batch-size", "8"),
        ("detector.py", "--device", "cpu", "--batch-size", "2"),
        90,
        results=("detector",),
    ),
    _generation("generation_bf16", "bf16", "eager", 60, (1, 8)),
    _generation("generation_4_bits", "bitsandbytes-4", "eager", 60, (1,)),
    _generation("generation_8_bits", "bitsandbytes-8", "eager", 60, (1,)),
    _generation("generation_compiled", "bf16", "compiled", 120, (1,)),
    Step(
        "training",
        ("training.py", "--row", "lora", "--row", "qlora", "--seconds", "20"),
        ("training.py", "--row", "lora", "--device", "cpu", "--steps", "1"),
        120,
        ("peft", "datasets"),
        results=("training",),
    ),
    Step(
        "vllm",
        ("vllm_throughput.py",),
        ("vllm_throughput.py", "--requests", "2"),
        120,
        ("vllm",),
        optional=True,
        results=("vllm",),
    ),
)


def missing_packages(steps: Iterable[Step]) -> dict[str, list[str]]:
    """List the packages that are not installed, by the step that needs them."""
    found = {step.name: [name for name in step.packages if find_spec(name) is None] for step in steps}
    return {name: packages for name, packages in found.items() if packages}


def judge_detector(results: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the figures of the detector, if anything is."""
    for content in results.values():
        for row in content.get("rows", []):
            if row.get("stage") == "total" and row["times faster"] < DETECTOR_SPEEDUP:
                return f"{row['times faster']:.3g} times the reference's speed, expected at least {DETECTOR_SPEEDUP:g}"
    return None


def run_step(
    step: Step, words: Sequence[str], seconds: float, folder: Path, judge: Callable[[Any], str | None] | None = None
) -> dict[str, Any]:
    """Run a step, and return what happened."""
    command = [sys.executable, *(words if words[0] == "-m" else [str(HERE / words[0]), *words[1:]])]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "BENCHMARK_RESULTS": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    start = time.monotonic()
    # A session of its own, so that a process that it has started does not outlive its time limit.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=seconds)[0]
        status = "ok" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], f"stopped after {seconds:.0f} seconds"
    except BaseException:
        # Otherwise the step would survive Ctrl-C, and hold the GPU.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    written = [path for path in folder.glob("*.json") if path.stat().st_mtime_ns != before.get(path)]
    results = {path.name: json.loads(path.read_text()) for path in sorted(written)}
    problem = judge(results) if judge is not None and status == "ok" else None
    return {
        "step": step.name,
        "command": shlex.join(["python", *words]),
        "status": problem or status,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(seconds, 1),
        "output": output[-OUTPUT_CHARACTERS:],
        "results": results,
    }


def run_steps(
    steps: Sequence[Step], is_rehearsal: bool, folder: Path, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Run steps until the time is over, and write a file for each."""
    (folder / "gpu").mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, []
    for step in steps:
        left = end - time.monotonic()
        absent = missing_packages([step]).get(step.name)
        if absent or left < min(step.seconds, SHORTEST_SECONDS):
            why = f"left out: {', '.join(absent)} not installed" if absent else "left out: no time left"
            outcome: dict[str, Any] = {"step": step.name, "status": why, "seconds": 0.0, "limit": 0.0}
        else:
            words = step.rehearsal if is_rehearsal else step.command
            judge = judge_detector if step.name == "detector" and not is_rehearsal else None
            outcome = run_step(step, words, min(step.seconds, left), folder, judge)
        (folder / "gpu" / f"{step.name}.json").write_text(json.dumps(outcome, indent=2) + "\n")
        print(f"{step.name}: {outcome['status']} ({outcome['seconds']:.0f} s)", flush=True)
        outcomes.append(outcome)
    return outcomes


def summary(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which steps ran, failed or did not run, one line for each kind."""
    left_out = [outcome for outcome in outcomes if outcome["status"].startswith("left out")]
    failed = [outcome for outcome in outcomes if outcome["status"] != "ok" and outcome not in left_out]
    lines = [f"{len(outcomes) - len(left_out) - len(failed)} of {len(outcomes)} steps are ok."]
    for title, group in (("Failed", failed), ("Did not run", left_out)):
        lines += [f"{title}: {outcome['step']} ({outcome['status']})" for outcome in group]
    return lines


def main(
    rehearse: Annotated[bool, typer.Option("--rehearse", help="tiny sizes on a CPU; figures mean nothing")] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = HERE / "results",
    seconds: Annotated[float, typer.Option(help="time limit of all steps together")] = SECONDS,
) -> None:
    """Check what is installed, then run all steps."""
    import torch

    needed = [step for step in STEPS if not step.optional]
    if missing := sorted({package for packages in missing_packages(needed).values() for package in packages}):
        raise typer.BadParameter(f"These packages must be installed: {', '.join(missing)}. Run `make setup`.")
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("A GPU is needed. `--rehearse` tries the steps with tiny sizes on a CPU.")
    if rehearse and output == HERE / "results":
        raise typer.BadParameter("`--output` must be another folder with `--rehearse`, whose figures mean nothing.")
    for name, packages in missing_packages(step for step in STEPS if step.optional).items():
        print(f"{name} will be left out: {', '.join(packages)} not installed", flush=True)
    outcomes = run_steps(STEPS, rehearse, output.resolve(), seconds)
    print("\n".join(summary(outcomes)), flush=True)
    if any(outcome["status"] != "ok" and not outcome["status"].startswith("left out") for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
