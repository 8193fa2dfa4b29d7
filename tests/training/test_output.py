"""The output folder of a training: which contents are refused, resuming, and that results only appear complete."""

import json
import shutil

import pytest
from transformers import AutoProcessor, TrainingArguments
from typer.testing import CliRunner

from mgllava.cli import app
from mgllava.folder_lock import FolderLock, FolderLockedError
from mgllava.training import MGLlavaTrainer, TrainingError, load_recipe, train
from tests.processing.detectors import OWLV2
from tests.training.conftest import losses, write_samples

SHORT = ("training.max_steps=2", "training.lr_scheduler_type=constant", "training.warmup_steps=0")


def run(recipe, *changes, resume=False):
    return train(load_recipe(recipe, *changes), resume=resume)


@pytest.mark.parametrize("present", ["thesis.txt", "model.safetensors"])
def test_folder_with_other_files_is_refused_and_kept(cpu_recipe, tmp_path, present):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / present).write_text("mine")
    with pytest.raises(TrainingError, match=rf"output_dir.*contains other files \({present}\)"):
        run(cpu_recipe, *SHORT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [present]


def test_folder_with_other_files_is_refused_before_a_starting_model_is_built(cpu_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    parts = [f"model.parts.{name}=missing" for name in ("llm", "vision_tower", "high_res_tower")]
    with pytest.raises(TrainingError, match="contains other files"):
        run(cpu_recipe, *SHORT, "model.name=null", "model.parts.prompt_template=vicuna", *parts)


def test_finished_training_is_not_overwritten(cpu_recipe):
    run(cpu_recipe, *SHORT, "training.save_strategy=no")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="contains a finished training"):
            run(cpu_recipe, *SHORT, "training.save_strategy=no", resume=resume)


def test_second_training_in_a_locked_folder_is_refused(cpu_recipe, tmp_path):
    with FolderLock(tmp_path / "out", "training"), pytest.raises(FolderLockedError, match="training"):
        run(cpu_recipe, *SHORT)
    assert not (tmp_path / "out").exists()


def test_training_that_is_killed_while_saving_its_result_leaves_no_partial_model(cpu_recipe, tmp_path, monkeypatch):
    save_model = MGLlavaTrainer.save_model

    def killed(self, output_dir=None, _internal_call=False):
        save_model(self, output_dir, _internal_call)
        if not _internal_call:
            raise KeyboardInterrupt

    monkeypatch.setattr(MGLlavaTrainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cpu_recipe, *SHORT)
    output = tmp_path / "out"
    assert not list(output.glob("*.safetensors")) and not (output / "config.json").exists()
    monkeypatch.undo()
    run(cpu_recipe, *SHORT, resume=True)
    assert (output / "model.safetensors").is_file() and not list(output.glob("_*"))


# A change of the recipe, and how the error describes it.
DIFFERENCES = [
    ("training.learning_rate=1e-3", "training.learning_rate: 0.01 -> 0.001"),
    ("training.seed=7", "training.seed: 42 -> 7"),
    ("train=[fusion]", "train: "),
    ("data.max_text_length=100", "data.max_text_length: 1472 -> 100"),
    ("data.on_bad_sample=skip", 'data.on_bad_sample: "error" -> "skip"'),
    ("global_batch_size=2", "global_batch_size: 4 -> 2"),
    ("training.max_steps=4", "training.max_steps: 2 -> 4"),
    ("model.attn_implementation=eager", 'model.attn_implementation: null -> "eager"'),
]


def test_resuming_with_another_recipe_is_refused_with_the_differences(cpu_recipe, tmp_path):
    changes = ("training.max_steps=2",)
    output = run(cpu_recipe, *changes)
    before = (output / "recipe.yaml").read_text()
    for change, difference in DIFFERENCES:
        with pytest.raises(TrainingError) as caught:
            run(cpu_recipe, *changes, change, resume=True)
        assert "`resume`" in str(caught.value) and difference in str(caught.value)
    adapters = ("lora.yaml", f"training.output_dir={tmp_path / 'adapters'}")
    run(cpu_recipe, *changes, *adapters)
    with pytest.raises(TrainingError, match=r"lora\.lora_alpha: 256 -> 8"):
        run(cpu_recipe, *changes, *adapters, "lora.lora_alpha=8", resume=True)
    assert (output / "recipe.yaml").read_text() == before


def test_resuming_with_other_samples_under_the_same_name_is_refused(cpu_recipe, tmp_path):
    write_samples(tmp_path / "own")
    own = [
        f"data.{name}={tmp_path / 'own' / file}" for name, file in (("samples", "samples.json"), ("images", "images"))
    ]
    own.append(f"data.boxes={tmp_path / 'own' / 'boxes.json'}")
    run(cpu_recipe, *own, "training.max_steps=2")
    for file in ("boxes.json", "samples.json"):
        path = tmp_path / "own" / file
        text = path.read_text()
        path.write_text(text.replace("It is", "It was").replace("0.9", "0.8"))
        with pytest.raises(TrainingError, match="contents of the files of samples or boxes"):
            run(cpu_recipe, *own, "training.max_steps=2", resume=True)
        path.write_text(text)
    run(cpu_recipe, *own, "training.max_steps=2", resume=True)


def test_allowed_changes_on_resuming_are_written_to_the_recipe(cpu_recipe):
    """Changes logging and the batch size per device and, since the learning rate is constant, the number of steps."""
    output = run(cpu_recipe, *SHORT)
    changes = (*SHORT[1:], "training.max_steps=4", "training.logging_steps=2")
    run(cpu_recipe, *changes, "training.per_device_train_batch_size=4", resume=True)
    assert len(losses(output)) == 3 and json.loads((output / "run.json").read_text())["steps"] == 4
    text = (output / "recipe.yaml").read_text()
    assert text.startswith("# Resumed from checkpoint-2, with ")
    assert "training.logging_steps: 1 -> 2" in text and "training.max_steps: 2 -> 4" in text
    assert load_recipe(output / "recipe.yaml").training["max_steps"] == 4
    shutil.rmtree(output / "checkpoint-4")
    run(cpu_recipe, *changes, resume=True)
    assert (output / "recipe.yaml").read_text().count("# Resumed from checkpoint-2") == 2


def test_processor_is_saved_with_the_detector_of_the_recipe(cpu_recipe):
    detector = (f"data.detector.detector={OWLV2}", "data.detector.labels=[square, circle]")
    output = run(cpu_recipe, *SHORT, *detector, "data.detector.mode=clean")
    processor = AutoProcessor.from_pretrained(output)
    config = processor.box_detector_config
    assert (config["tagger"], config["mode"]) == (["square", "circle"], "clean")
    # The detector is a folder here, so it is copied.
    assert config["detector"] == "./box_detector/detector" and (output / "box_detector" / "detector").is_dir()
    assert processor.box_detector.config["mode"] == "clean"


def test_detector_from_the_hub_is_saved_by_its_id(cpu_recipe):
    output = run(cpu_recipe, *SHORT, "data.detector.tagger=coco80", "training.save_strategy=no")
    config = AutoProcessor.from_pretrained(output).box_detector_config
    assert config["detector"] == "google/owlv2-large-patch14-ensemble" and len(config["tagger"]) == 80


def test_options_of_data_loader_workers_are_ignored_without_workers(cpu_recipe):
    """The package's recipes set them, and PyTorch refuses them without workers."""
    changes = ("training.dataloader_num_workers=0", "training.dataloader_persistent_workers=true")
    run(cpu_recipe, *SHORT, *changes, "training.dataloader_prefetch_factor=4", "training.save_strategy=no")


REFUSED = [
    ("training.eval_strategy=steps", "`training.eval_strategy` needs samples"),
    ("evaluation.samples=x.json", "`evaluation` would not be used"),
    ("training.do_train=true", "`training.do_train` has no effect"),
    ("training.auto_find_batch_size=true", "would change `global_batch_size`"),
    ("training.lr_scheduler_kwargs={nonsense: 1}", "`training.lr_scheduler_type` cannot be used"),
    ("training.report_to=nobody", "`training` cannot be used"),
    ("data.samples=gone.json", "`data.samples`: gone.json does not exist"),
    ("evaluation={samples: x.json, streaming: true}", "`evaluation.streaming` must be false"),
    pytest.param(
        *("training.activation_checkpointing=true", "are two names of one option, got False and True"),
        marks=pytest.mark.skipif(
            not hasattr(TrainingArguments, "activation_checkpointing"), reason="5.16 has only the older name"
        ),
    ),
    ("model.config.projector_hidden_actt=relu", "Did you mean `model.config.projector_hidden_act`?"),
    ("model.config.fusion_type=none", "weights are missing or unused, such as model.fusion."),
    ("model.config.fusion_type=round", "`model.config` cannot be used"),
    ("lora={target_modules: [nothing]}", "`lora` cannot be used"),
    ("training.output_dir=null", "`training.output_dir` must say where to write"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED)
def test_settings_that_contradict_each_other_are_refused_in_one_line(cpu_recipe, change, expected):
    changes = ("training.lr_scheduler_type=cosine", change) if "scheduler" in change else (change,)
    changes = ("train=[fusion]", change) if change.startswith("lora") else changes
    result = CliRunner().invoke(app, ["train", str(cpu_recipe), *SHORT, *changes])
    assert result.exit_code == 1 and "Wrote" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "Traceback" not in result.stderr


def test_training_without_a_step_is_an_error(cpu_recipe):
    with pytest.raises(TrainingError, match="Nothing would be trained: 12 samples"):
        run(
            cpu_recipe,
            "training.dataloader_drop_last=true",
            "training.per_device_train_batch_size=16",
            "global_batch_size=16",
        )


def test_result_is_saved_with_the_changed_configuration(cpu_recipe, small_repository):
    """Nested values are merged with those of the starting model."""
    changes = ("model.config.projector_hidden_act=relu", "model.config.text_config.rms_norm_eps=1e-3")
    output = run(cpu_recipe, *SHORT, *changes, "training.save_strategy=no", "model.family=mgllava")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (small_repository, output))
    assert before["projector_hidden_act"] != after["projector_hidden_act"] == "relu"
    own = {"dtype": None, "rms_norm_eps": None}
    assert after["text_config"]["rms_norm_eps"] == 1e-3 != before["text_config"]["rms_norm_eps"]
    assert {**after["text_config"], **own} == {**before["text_config"], **own}


def test_model_that_cannot_be_trained_is_refused(cpu_recipe, tmp_path):
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger" / "config.json").write_text('{"model_type": "ram_plus"}')
    with pytest.raises(TrainingError, match=r"`model.name`: .*tagger cannot be trained.*'ram_plus'"):
        run(cpu_recipe, f"model.name={tmp_path / 'tagger'}")
    (tmp_path / "tagger" / "config.json").rename(tmp_path / "tagger" / "adapter_config.json")
    with pytest.raises(TrainingError, match=r"`model.name`: .*tagger has only adapters"):
        run(cpu_recipe, f"model.name={tmp_path / 'tagger'}")


def test_learning_rate_that_was_always_zero_is_a_warning(cpu_recipe, caplog):
    run(cpu_recipe, "training.max_steps=1", "training.warmup_steps=1", "training.save_strategy=no")
    assert "The learning rate was 0 in all 1 steps" in caplog.text
