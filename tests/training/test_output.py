"""The output folder of a training: which contents are refused, resuming, and that results only appear complete."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, TrainingArguments
from typer.testing import CliRunner

from mgllava.cli import app
from mgllava.folder_lock import FolderLock, FolderLockedError
from mgllava.training import MGLlavaTrainer, Recipe, TrainingError, load_recipe, train
from mgllava.training.recipe import DataOptions
from mgllava.training.run import _check_trainer
from mgllava.training.run_record import check_same_training, refuse_other_files, write_start
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


def test_what_a_killed_start_leaves_is_no_other_file(tmp_path):
    left = ["start", "start.incomplete", "start.lock", "recipe.yaml", "run.json", "_saving.incomplete", "runs"]
    for name in (*left, "recipe.yaml.ab.partial", "checkpoint-3"):
        (tmp_path / name).mkdir()
    refuse_other_files(tmp_path)
    refuse_other_files(tmp_path / "absent")
    for name in ("model", "checkpoint"):
        (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match=r"contains other files \(checkpoint, model\)"):
        refuse_other_files(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"`training\.output_dir`: .* is a file"):
        refuse_other_files(tmp_path / "file")


@pytest.mark.parametrize("noted", [None, "{}", "[", "other"])
def test_starting_model_of_other_or_unknown_parts_is_refused(cpu_recipe, tmp_path, noted):
    parts = {"llm": "a", "vision_tower": "b", "high_res_tower": "c", "prompt_template": "vicuna", "config": {}}
    (tmp_path / "out" / "start").mkdir(parents=True)
    if noted is not None:
        text = json.dumps({**parts, "dtype": "bfloat16"}) if noted == "other" else noted
        (tmp_path / "out" / "start" / "parts.json").write_text(text)
    with pytest.raises(TrainingError, match=r"`model\.parts`: .*start was built from other or unknown parts"):
        run(cpu_recipe, *SHORT, "model.name=null", f"model.parts={json.dumps(parts)}")


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
    (output / "_saving.incomplete" / "old_code.py").touch()  # of another release
    run(cpu_recipe, *SHORT, resume=True)
    assert (output / "model.safetensors").is_file()
    assert not list(output.glob("_*")) and not (output / "old_code.py").exists()


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


# All settings of transformers that may differ, by docs/training.md: "logging, saving, evaluation, workers".
MAY_DIFFER = """
    disable_tqdm include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_dir
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy project report_to run_name
    skip_memory_metrics trackio_bucket_id trackio_space_id trackio_static_space_id

    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token output_dir push_to_hub
    save_on_each_node save_only_model save_steps save_strategy save_total_limit

    eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object per_device_eval_batch_size

    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_timeout

    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps
"""


def refused_on_resuming(before, now, output, samples=("a", "a")):
    """Return the names of the keys in which a training may not differ from the one that is resumed."""
    output.mkdir(exist_ok=True)
    write_start(before, samples[0], output, None, [])
    try:
        check_same_training(now, samples[1], output, "checkpoint-2")
    except TrainingError as error:
        found = str(error).partition("another recipe: ")[2].partition(". Resume with")[0]
        return {difference.partition(":")[0].removeprefix("training.") for difference in found.split("; ")}
    return set()


def test_resuming_allows_exactly_what_does_not_change_what_is_learned(tmp_path):
    before = Recipe(data=DataOptions(samples="a.json"), training={"output_dir": "out"})
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    now = Recipe(
        data=DataOptions(samples="a.json", allow_other_boxes=True, processes=3),
        evaluation=DataOptions(samples="b.json", max_text_length=5),
        training=dict.fromkeys(names, "changed"),
    )
    assert refused_on_resuming(before, now, tmp_path / "out") == names - set(MAY_DIFFER.split())


def test_resuming_allows_another_length_or_batch_where_it_does_not_matter(tmp_path):
    def refused(name, values, **given):
        recipes = (
            Recipe(
                training={"output_dir": "out", "lr_scheduler_type": given.get("schedule", "constant"), name: value},
                global_batch_size=given.get("global_batch_size"),
            )
            for value in values
        )
        return refused_on_resuming(*recipes, tmp_path / "out")

    for name in ("max_steps", "num_train_epochs"):
        assert not refused(name, (2, 3)) and refused(name, (2, 3), schedule="linear") == {name}
    batch = "per_device_train_batch_size"
    assert not refused(batch, (2, 4), global_batch_size=8) and refused(batch, (2, 4)) == {batch}


def test_resuming_compares_samples_that_are_known(tmp_path):
    recipe = Recipe(training={"output_dir": "out"})
    for samples in (("a", "b"), ("a", "a"), ("a", None), (None, "b")):
        refused = refused_on_resuming(recipe, recipe, tmp_path / "out", samples)
        assert bool(refused) == (samples == ("a", "b"))
    (tmp_path / "out" / "run.json").write_text("[]")
    check_same_training(recipe, "b", tmp_path / "out", "checkpoint-2")
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(TrainingError, match=r"cannot be resumed, because its recipe cannot be read.*recipe\.yaml"):
        check_same_training(recipe, "b", tmp_path / "out", "checkpoint-2")


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
    (output / "box_detector" / "old.json").touch()
    # The result is written again, and replaces that of before.
    assert run(cpu_recipe, *SHORT, *detector, "data.detector.mode=clean", resume=True) == output
    assert not (output / "box_detector" / "old.json").exists()
    processor = AutoProcessor.from_pretrained(output)
    config = processor.box_detector_config
    assert (config["tagger"], config["mode"]) == (["square", "circle"], "clean")
    # The detector is a folder here, so it is copied.
    assert config["detector"] == "./box_detector/detector" and (output / "box_detector" / "detector").is_dir()
    assert processor.box_detector.config["mode"] == "clean"


@pytest.mark.parametrize("threshold", [0.2, 0.3])
def test_detector_from_the_hub_is_saved_by_its_id(cpu_recipe, threshold, caplog):
    changes = ["data.detector.tagger=coco80", f"data.detector.threshold={threshold}", "training.max_steps=1"]
    output = run(cpu_recipe, *SHORT, *changes, "training.save_strategy=no")
    said = f"a threshold of {threshold}, which cannot be saved with the processor"
    assert (said in caplog.text) == (threshold != 0.2) and ("cannot be saved" in caplog.text) == (threshold != 0.2)
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
    ("model.config.zzz=1", "`model.config.zzz` is not in the configuration of"),
    ("model.config.fusion_type=none", "weights are missing or unused, such as model.fusion."),
    ("model.config.fusion_type=round", "`model.config` cannot be used"),
    ("lora={target_modules: [nothing]}", "`lora` cannot be used"),
    ("training.output_dir=null", "`training.output_dir` must say where to write"),
    ("data.samples=null", "`data.samples` must name a file of samples"),
    ("data.images=[a, b]", "`data.images` must have one entry, or one for each of 1 files, got 2"),
    ("data.boxes=[a, b]", "`data.boxes` must have one entry, or one for each of 1 files, got 2"),
    ("data.videos=[a, b, c]", "`data.videos` must have one entry, or one for each of 1 files, got 3"),
    ("data.original_labels=true", "`data`: `original_labels` must be false for a model whose original learns from"),
    ("data.num_frames=4", "`data.num_frames` must not be set: this model of MG-LLaVA takes no videos"),
    ("data.prompt_template=v1", "`data.prompt_template` must be null or a template of MG-LLaVA (vicuna, "),
    ("train=[]", "`train` must name the modules"),
    ("lora.r=4", "`train` must not name language_model, lm_head if `lora` is given"),
    ("learning_rates={language_modle: 1}", "`learning_rates.language_modle` matches no parameter that is trained"),
    ("model.bits=4", "`model.bits` needs `lora`: weights in 4 bits cannot be trained"),
    ("model.family=slime", "`model.family` must be mgllava"),
    ("model.parts.llm=a", "Set either `model.name`"),
    ("model.name=null", "Set either `model.name`"),
    ("model={name: null, parts: {llm: a, vision_tower: b}}", "`model.parts.high_res_tower`, `model.parts.prompt_temp"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED)
def test_settings_that_contradict_each_other_are_refused_in_one_line(cpu_recipe, change, expected):
    changes = ("training.lr_scheduler_type=cosine", change) if "scheduler" in change else (change,)
    changes = ("train=[fusion]", change) if "target_modules" in change else changes
    result = CliRunner().invoke(app, ["train", str(cpu_recipe), *SHORT, *changes])
    assert result.exit_code == 1 and "Wrote" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "Traceback" not in result.stderr


def test_a_stream_needs_a_number_of_steps(cpu_recipe):
    with pytest.raises(TrainingError, match=r"`training\.max_steps` must be given if `data\.streaming` is true"):
        run(cpu_recipe, "data.streaming=true", "training.train_sampling_strategy=sequential")


def test_a_result_without_the_picture_of_the_loss_is_complete(cpu_recipe, monkeypatch, caplog):
    def fail(history, path):
        raise ImportError("no matplotlib")

    monkeypatch.setattr("mgllava.training.run.plot_losses", fail)
    output = run(cpu_recipe, *SHORT, "training.max_steps=1", "training.save_strategy=no")
    assert "The loss was not plotted: no matplotlib" in caplog.text
    assert json.loads((output / "run.json").read_text())["finished"] and (output / "model.safetensors").is_file()


def test_processes_other_than_the_first_write_and_print_nothing(cpu_recipe, tmp_path, monkeypatch, capsys):
    """They do not take the lock either, which the first one holds."""
    for name, value in {"should_save": False, "should_log": False, "process_index": 1}.items():
        monkeypatch.setattr(TrainingArguments, name, value)
    with FolderLock(tmp_path / "out", "training"):
        output = run(cpu_recipe, *SHORT, "training.max_steps=1", "training.save_strategy=no")
    assert output == tmp_path / "out" and not [path for path in output.rglob("*") if path.is_file()]
    assert "Trained parameters" not in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "enabled"), [("zero.json", False), ("zero.json", True), (None, False)])
def test_deepspeed_that_accelerate_ignores_is_refused(wanted, enabled):
    trainer = SimpleNamespace(args=SimpleNamespace(deepspeed=wanted), is_deepspeed_enabled=enabled)
    with pytest.raises(TrainingError, match="ignored by accelerate") if wanted and not enabled else nullcontext():
        _check_trainer(trainer, [])


def test_training_without_a_step_is_an_error(cpu_recipe):
    with pytest.raises(TrainingError, match="Nothing would be trained: 12 samples"):
        run(
            cpu_recipe,
            "training.dataloader_drop_last=true",
            "training.per_device_train_batch_size=16",
            "global_batch_size=16",
        )


def test_result_is_saved_with_the_changed_configuration(cpu_recipe, small_repository, capsys):
    """Nested values are merged with those of the starting model."""
    changes = ("model.config.projector_hidden_act=relu", "model.config.text_config.rms_norm_eps=1e-3")
    output = run(cpu_recipe, *SHORT, *changes, "training.save_strategy=no", "model.family=mgllava")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (small_repository, output))
    assert before["projector_hidden_act"] != after["projector_hidden_act"] == "relu"
    assert "Set in the model's configuration, and saved with the result: projector_hidden_act=relu, text_config=" in (
        " ".join(capsys.readouterr().err.split())
    )
    own = {"dtype": None, "rms_norm_eps": None}
    assert after["text_config"]["rms_norm_eps"] == 1e-3 != before["text_config"]["rms_norm_eps"]
    assert {**after["text_config"], **own} == {**before["text_config"], **own}


@pytest.mark.parametrize(("overlay", "dtype"), [((), torch.bfloat16), (("lora.yaml",), torch.float32)])
def test_result_has_the_dtype_of_the_recipe_and_adapters_that_of_training(cpu_recipe, overlay, dtype):
    """Trained parameters are float32 in training."""
    changes = ["model.dtype=bfloat16", "training.bf16=true", "training.save_strategy=no", "training.max_steps=1"]
    output = run(cpu_recipe, *SHORT, *overlay, *changes)
    (weights,) = output.glob("*.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {dtype}


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
