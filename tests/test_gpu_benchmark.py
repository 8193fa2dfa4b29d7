"""`make bench-gpu`, rehearsed on a CPU: its steps exist, none can stop the others, and time limits hold."""

import ast
import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
import typer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def options_of(script):
    """List the options of a script without importing it, which takes seconds."""
    tree = ast.parse((BENCHMARKS / script).read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return {f"--{argument.arg.replace('_', '-')}" for argument in main.args.args}


def test_steps_fit_and_their_options_exist(gpu):
    assert sum(step.seconds for step in gpu.STEPS[:5]) <= gpu.SECONDS == 480
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)
    for step in gpu.STEPS:
        for script, *options in (step.command, step.rehearsal):
            if script == "-m":
                assert [word for word in options if word.startswith("tests/")]
                assert all((BENCHMARKS.parent / word).exists() for word in options if word.startswith("tests/"))
                continue
            assert {word for word in options if word.startswith("--")} <= options_of(script)


def python(name, seconds=30.0, packages=(), module="platform", **options):
    gpu = sys.modules["gpu"]
    return gpu.Step(name, ("-m", module), ("-m", module), seconds, packages, **options)


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(gpu, tmp_path):
    steps = [
        python("fails", module="no_such_module"),
        python("hangs", seconds=0.2, module="http.server"),
        python("absent", packages=("no_such_package",), optional=True),
        python("works"),
    ]
    outcomes = gpu.run_steps(steps, True, tmp_path)
    assert [outcome["status"] for outcome in outcomes] == [
        "exit status 1",
        "stopped after 0 seconds",
        "left out: no_such_package not installed",
        "ok",
    ]
    for step, outcome in zip(steps, outcomes, strict=True):
        assert json.loads((tmp_path / "gpu" / f"{step.name}.json").read_text()) == outcome
    assert "no_such_module" in outcomes[0]["output"] and outcomes[1]["seconds"] < 20
    # A step that would be stopped at once is not started.
    left_out = gpu.run_steps(steps[3:], True, tmp_path, seconds=gpu.SHORTEST_SECONDS - 1)
    assert left_out[0]["status"] == "left out: no time left"
    assert gpu.summary([*outcomes, *left_out]) == [
        "1 of 5 steps are ok.",
        "Failed: fails (exit status 1)",
        "Failed: hangs (stopped after 0 seconds)",
        "Did not run: absent (left out: no_such_package not installed)",
        "Did not run: works (left out: no time left)",
    ]


def test_a_step_ends_with_the_benchmark(gpu, tmp_path, monkeypatch):
    started = []

    class Interrupted(gpu.subprocess.Popen):
        def communicate(self, *args, **kwargs):
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_step(python("hangs", module="http.server"), ("-m", "http.server", "0"), 30, tmp_path)
    assert started[0].wait(20) == -signal.SIGKILL


def test_what_will_be_left_out_is_said_first(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", (python("works"), python("vllm", packages=("no_such_package",), optional=True)))
    gpu.main(rehearse=True, output=tmp_path, seconds=60)
    assert capsys.readouterr().out.splitlines()[0] == "vllm will be left out: no_such_package not installed"


def test_figures_of_a_step_are_in_its_file(gpu, tmp_path, monkeypatch):
    script = BENCHMARKS / "report.py"
    assert "BENCHMARK_RESULTS" in script.read_text()
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    code = "import os, pathlib\npathlib.Path(os.environ['BENCHMARK_RESULTS'], 'x.json').write_text('{\"rows\": []}')\n"
    (tmp_path / "writes.py").write_text(code)
    (tmp_path / "old.json").write_text("{}")
    outcome = gpu.run_step(gpu.Step("a", ("writes.py",), ("writes.py",), 30), ("writes.py",), 30, tmp_path)
    assert outcome["status"] == "ok" and outcome["results"] == {"x.json": {"rows": []}}


def test_missing_packages_and_devices_are_named_before_anything_starts(gpu, monkeypatch, tmp_path):
    steps = (python("a", packages=("no_such_package", "json")), python("b", packages=("nor_this",)))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "run_steps", lambda *arguments: pytest.fail("started"))
    with pytest.raises(typer.BadParameter, match=r"must be installed: no_such_package, nor_this\."):
        gpu.main(rehearse=True, output=tmp_path, seconds=1)
    monkeypatch.setattr(gpu, "STEPS", ())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="A GPU is needed"):
        gpu.main(rehearse=False, output=tmp_path, seconds=1)
    with pytest.raises(typer.BadParameter, match="must be another folder"):
        gpu.main(rehearse=True, output=BENCHMARKS / "results", seconds=1)


def test_a_slow_detector_is_named(gpu):
    def rows(speed):
        return {"detector_cuda.json": {"rows": [{"stage": "text", "times faster": 1.0}, {"stage": "total", **speed}]}}

    assert gpu.judge_detector(rows({"times faster": 8.5})) is None
    assert "7.5 times the reference's speed" in gpu.judge_detector(rows({"times faster": 7.5}))


def test_operations_are_counted_without_values(gpu):
    generation = importlib.import_module("generation")
    assert min(generation.count_flops(generation.make_config("tiny"))) > 0


def test_generation_is_measured_on_a_tiny_model(gpu):
    row = importlib.import_module("generation").measure("tiny", "bf16", [1], ["eager"], 1, "cpu")[0]
    assert row["first token ms"] > 0 and row["weights GB"] > 0


@pytest.mark.slow
def test_the_whole_rehearsal(gpu, tmp_path):
    steps = [step for step in gpu.STEPS if not step.optional]
    outcomes = gpu.run_steps(steps, True, tmp_path, seconds=1500)
    assert {outcome["step"]: outcome["status"] for outcome in outcomes} == {step.name: "ok" for step in steps}
