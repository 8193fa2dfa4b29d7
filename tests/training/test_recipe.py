import dataclasses
import inspect
from typing import Any

import pytest
from transformers.trainer_utils import SaveStrategy

from mgllava.box_files import detect_images, open_detector
from mgllava.families import FAMILIES
from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
    Recipe,
    TrainingError,
    load_recipe,
    recipe_names,
    train,
)
from mgllava.training.recipe import DataOptions, DetectorOptions, checked_recipe
from mgllava.training.values import WrongValueError, read_value

OVERLAYS = {"fsdp2.yaml", "lora.yaml", "qlora.yaml", "zero2.yaml", "zero3.yaml"}
SLIME_STAGES = ("1a", "1b", "2", "3")
SLIME_MODELS = ("vicuna_7b", "vicuna_13b", "llama3_8b", "llama3_70b")
MODELS = ("phi3_mini", "vicuna_7b", "vicuna_13b", "llama3_8b", "yi_34b")
NEW_PARTS = ["fusion", "multi_modal_projector", "box_projector", "object_attention"]


def test_the_package_has_both_stages_for_every_language_model():
    stages = {f"stage_{stage}_{model}.yaml" for stage in (1, 2) for model in MODELS}
    slime = {
        f"slime_stage_{stage}{model}.yaml"
        for stage in SLIME_STAGES
        for model in ("", *(f"_{model}" for model in SLIME_MODELS))
    }
    others = {"stage_1.yaml", "stage_2.yaml", "finetune.yaml", "slime_lora.yaml"}
    others |= {"video_stage_1.yaml", "video_stage_2.yaml"}
    assert set(recipe_names()) == stages | OVERLAYS | slime | others


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [1, 2])
def test_settings_are_the_papers(stage, model):
    """The paper gives learning rates, schedules and batches for 8 or 32 devices."""
    recipe = load_recipe(f"stage_{stage}_{model}.yaml")
    training = recipe.training
    learning_rate = {1: 2e-3 if model == "yi_34b" else 1e-3, 2: 2e-5}[stage]
    devices = 32 if model == "yi_34b" else 8
    assert recipe.train == (NEW_PARTS if stage == 1 else [*NEW_PARTS, "language_model", "lm_head"])
    assert recipe.global_batch_size == {1: 256, 2: 128}[stage] == devices * training["per_device_train_batch_size"]
    assert training["learning_rate"] == learning_rate
    assert training.get("train_sampling_strategy") == {1: None, 2: "group_by_length"}[stage]
    assert recipe.data.max_text_length == 2048 - 576
    common = {"weight_decay": 0, "max_grad_norm": 1, "warmup_steps": 0.03, "lr_scheduler_type": "cosine"}
    assert {name: training[name] for name in common} == common
    assert training["num_train_epochs"] == 1 and training["bf16"] is True
    assert ("deepspeed" in training) == (model == "yi_34b")
    if stage == 1:
        parts = recipe.model.parts
        assert parts["llm"] and parts["prompt_template"] in ("vicuna", "llama3", "phi3", "yi")
        following = load_recipe(f"stage_2_{model}.yaml")
        assert following.model.name == training["output_dir"]


# What a stage of SliME trains, and the configuration that it trains with.
SLIME = {
    "1a": (["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"], ("global", 0, 1.0)),
    "1b": (["multi_modal_projector.query_adapter"], ("global", 1, 1.0)),
    "2": (["local_compressor"], ("local", None, 1.0)),
    "3": (["multi_modal_projector", "local_compressor", "language_model", "lm_head"], ("both", None, 0.95)),
}


@pytest.mark.parametrize("model", SLIME_MODELS)
@pytest.mark.parametrize("stage", SLIME)
def test_settings_of_slime_are_the_papers(stage, model):
    recipe = load_recipe(f"slime_stage_{stage}_{model}.yaml")
    training, (trained, config) = recipe.training, SLIME[stage]
    has_adapters = (stage, model) == ("3", "llama3_70b")
    assert recipe.train == (trained[:2] if has_adapters else trained)
    # Every stage says all that any stage sets, since a result is saved with it.
    names = ("branch", "forced_expert", "router_top_p")
    assert recipe.model.config == {**dict(zip(names, config, strict=True)), "router_sees_answers": True}
    assert recipe.data.prompt_template == (None if stage == "3" else "plain")
    assert recipe.data.max_text_length == 2048
    is_llama3 = model.startswith("llama3")
    if has_adapters:
        assert training["learning_rate"] == 1e-4
        assert recipe.learning_rates == {"multi_modal_projector": 2e-5, "local_compressor": 2e-5}
        assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.lora["lora_dropout"]) == (128, 256, 0.05)
    else:
        learning_rate = {True: 1e-5, False: 2e-5}[is_llama3] if stage == "3" else {True: 5e-4, False: 1e-3}[is_llama3]
        assert training["learning_rate"] == learning_rate
        assert recipe.learning_rates is recipe.lora is None
    assert recipe.global_batch_size == (128 if stage == "3" else 256)
    assert recipe.global_batch_size % (8 * training["per_device_train_batch_size"]) == 0
    common = {"weight_decay": 0, "max_grad_norm": 1, "warmup_steps": 0.03, "lr_scheduler_type": "cosine"}
    assert {name: training[name] for name in common} == common
    assert training["num_train_epochs"] == 1 and training["bf16"] is True
    assert ("deepspeed" in training) == (model == "llama3_70b")
    if stage == "1a":
        assert recipe.model.parts["prompt_template"] == ("llama3" if is_llama3 else "v1")
    else:
        before = {"1b": "1a", "2": "1b", "3": "2"}[stage]
        assert recipe.model.name == load_recipe(f"slime_stage_{before}_{model}.yaml").training["output_dir"]


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_recipes_are_laid_over_each_other(overlay):
    plain, changed = load_recipe("stage_2_vicuna_7b.yaml"), load_recipe("stage_2_vicuna_7b.yaml", overlay)
    assert changed != plain
    assert changed.model.name == plain.model.name
    assert (changed.lora is not None) == ("language_model" not in changed.train)


def test_fine_tuning_is_for_any_model_and_box_file():
    """docs/finetune.md names model, samples and boxes; the detector of the published models is not asked for."""
    changes = ["model.name=mine", "training.output_dir=out", "data.samples=a.json", "data.boxes=b.json"]
    recipe = load_recipe("finetune.yaml", "model.bits=4", *changes)
    assert recipe.data.detector is None
    assert recipe.lora["r"] == 32 and "language_model" not in recipe.train


def test_changes_reach_every_depth_and_later_ones_win(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: stage_2_vicuna_7b.yaml\ndata: {samples: a.json}\n")
    recipe = load_recipe(
        tmp_path / "mine.yaml",
        "training.learning_rate=1e-6",
        "data.detector.tagger=x",
        "data.samples=[b.json, c.json]",
    )
    assert recipe.training["learning_rate"] == 1e-6
    assert recipe.data.samples == ["b.json", "c.json"]
    assert recipe.data.detector.tagger == "x"
    assert recipe.data.detector.detector == "google/owlv2-large-patch14-ensemble"
    assert load_recipe(tmp_path / "mine.yaml", "training.save_strategy=no").training["save_strategy"] == "no"


def test_names_are_looked_up_next_to_the_file_then_here_then_in_the_package(tmp_path, monkeypatch):
    here, near = tmp_path / "here", tmp_path / "near"
    for folder in (here, near):
        folder.mkdir()
        (folder / "base.yaml").write_text(f"data: {{samples: {folder.name}}}\n")
    monkeypatch.chdir(here)
    (near / "mine.yml").write_text("extends: [stage_1.yaml, base.yaml]\ntraining: {seed: 3}\n")
    recipe = load_recipe(near / "mine.yml", "global_batch_size=7")
    assert recipe.data.samples == "near" and recipe.training["seed"] == 3 and recipe.train == NEW_PARTS
    (near / "base.yaml").unlink()
    assert load_recipe(near / "mine.yml").data.samples == "here"
    (here / "stage_1.yaml").write_text("train: [fusion]\n")
    assert load_recipe("stage_1.yaml").train == load_recipe(near / "mine.yml").train == ["fusion"]
    (here / "empty.yaml").write_text("")
    assert load_recipe("empty.yaml") == Recipe() == load_recipe()
    for name, other in (("a", "b"), ("b", "a")):
        (here / f"{name}.yaml").write_text(f"extends: {other}.yaml\n")
    with pytest.raises(TrainingError, match=r"extend each other: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe("a.yaml")
    with pytest.raises(TrainingError, match=r"no recipe .*stage_1\.yaml"):
        load_recipe(tmp_path / "stage_1.yaml")
    with pytest.raises(
        TrainingError, match=r"The package has finetune\.yaml, fsdp2\.yaml, .*, zero3\.yaml; a change is"
    ):
        load_recipe("0")


def test_numbers_and_booleans_are_those_of_yaml_1_2(tmp_path):
    """PyYAML reads YAML 1.1, where 1e-3 is text."""
    text = "{a: 1e-3, b: .5, c: 1., d: -1E+2, e: +2.5e1, f: 1e, g: True, h: FALSE, i: n, j: 7, k: -1.5, l: 1.2.3}"
    expected = {"a": 1e-3, "b": 0.5, "c": 1.0, "d": -100.0, "e": 25.0, "f": "1e", "g": True, "h": False, "i": "n"}
    assert load_recipe(f"model.config={text}").model.config == {**expected, "j": 7, "k": -1.5, "l": "1.2.3"}


def test_a_recipe_says_itself_in_yaml(tmp_path):
    recipe = load_recipe("stage_1_yi_34b.yaml", "evaluation.samples=x.json")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    text = dataclasses.replace(recipe, training={"run_name": "größer"}).to_yaml()
    assert text.startswith("model:\n") and "run_name: größer" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("trainnig.seed=1", "training"),
        ("training.learning_rat=1", "training.learning_rate"),
        ("model.parts.lllm=x", "model.parts.llm"),
        ("data.box=x", "data.boxes"),
        ("data.detector.treshold=1", "data.detector.threshold"),
        ("lora.alpha=1", "lora.lora_alpha"),
        ("trainn=[a]", "train"),
        ("evaluation.detector.labelz=[a]", "evaluation.detector.labels"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(change, expected):
    with pytest.raises(TrainingError) as caught:
        load_recipe("stage_2_vicuna_7b.yaml", change)
    assert f"Did you mean `{expected}`?" in str(caught.value)


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    for name, problem in (("list", "keys and values"), ("circle", "extend each other"), ("broken", "not YAML")):
        with pytest.raises(TrainingError, match=problem):
            load_recipe(tmp_path / f"{name}.yaml")
    with pytest.raises(TrainingError, match=r"stage_1_vicuna_7b\.yaml"):
        load_recipe("stage1_vicuna_7b.yaml")
    with pytest.raises(TrainingError, match="`training` must contain keys"):
        load_recipe("stage_1.yaml", "training=3")


@pytest.mark.parametrize("name", ["stage_2", "absent.yaml", "absent.yaml=1"])
def test_what_is_no_change_must_be_a_recipe(name):
    with pytest.raises(TrainingError, match=rf"There is no recipe {name}\..* a change is written key=value"):
        load_recipe(name)


REFUSED = [
    ("data.allow_other_boxes=maybe", "must be true or false, got 'maybe'"),
    ("global_batch_size=-4", "must be 1 or greater, got -4"),
    ("model.bits=3", "must be 4 or 8, got 3"),
    ("model.dtype=bf16", "must be float32, bfloat16 or float16, got 'bf16'. Did you mean bfloat16?"),
    ("data.samples=3", "must be text or a list of texts or null, got 3. Write it in quotes if it is meant as text"),
    ("data.detector.threshold=2", "must be from 0 to 1, got 2"),
    ("data.detector.detector=3", "must be text or null, got 3"),
    ("model.family=ram_plus", "or null, got 'ram_plus'"),
    ("model.parts.prompt_template=alpaca", "must be vicuna, llama3, phi3 or yi or null, got 'alpaca'"),
    ("model.parts.config=none", "must be keys and values, got 'none'"),
    ("evaluation.on_bad_sample=x", "must be error or skip, got 'x'"),
    ("train=fusion", "must be a list of texts, got 'fusion'"),
    ("data=null", "must contain keys and values"),
    ("training.num_train_epochs=-3", "must be greater than 0, got -3"),
    ("training.num_train_epochs=abc", "must be a number, got 'abc'"),
    ("training.max_steps=0", "must be 1 or greater (-1: no limit), got 0"),
    ("training.max_steps=2.5", "must be a whole number, got 2.5"),
    ("training.learning_rate=nan", "must be a finite number, got nan"),
    ("training.learning_rate=-inf", "must be a finite number, got -inf"),
    ("training.learning_rate=0", "must be greater than 0, got 0"),
    ("training.learning_rate=true", "must be a number, got true"),
    ("training.bf16=2", "must be true or false, got 2"),
    ("training.seed=null", "must be a whole number, got null"),
    ("training.zzz=1", "Known keys: "),
    ("training._n_gpu=1", "is not a recipe key"),
    ("model=null", "must contain keys and values, got None"),
    ("model.parts=[a]", "must contain keys and values, got ['a']"),
    ("training.bf16=nan", "must be true or false"),
    ("training.max_steps=abc", "must be a whole number, got 'abc'"),
    ("training.seed=", "has no value"),
    (f"training.seed={'a' * 90}", "must be a whole number, got '" + "a" * 76 + "..."),
    ("training.run_name=None", "got the word None. Write null"),
    ("training.save_strategy=nope", "must be no, steps, epoch or best, got 'nope'"),
    ("training.lr_scheduler_type=cosin", "Did you mean cosine?"),
    ("training.logging_steps=2.5", "must be a whole number of steps, or a share"),
    (
        "training.gradient_checkpointing_kwargs={use_reentrant: no}",
        "has use_reentrant=no, which is read as text here",
    ),
    ("lora.r=0", "must be 1 or greater, got 0"),
    ("lora.lora_dropout=1", "must be at least 0 and below 1, got 1"),
    ("lora.bias=lora_onl", "Did you mean lora_only?"),
    ("lora.runtime_config=3", "must be keys and values, got 3"),
    *(
        (f"model.config={{deep: {{er: {word}}}}}", f"has er={word}, which is read as text here")
        for word in ("Off", "on", "yes", "NO")
    ),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=[change for change, _ in REFUSED])
def test_values_of_another_type_or_range_are_refused_by_name(change, expected):
    with pytest.raises(TrainingError) as caught:
        load_recipe("stage_2_vicuna_7b.yaml", change)
    message = str(caught.value)
    assert f"`{change.partition('=')[0]}" in message and expected in message and "\n" not in message


# Per key the values that are just within its limits, and those just beyond.
COUNT, POSITIVE, NOT_NEGATIVE = ([1], [0]), ([1e-9], [0]), ([0], [-1e-9])
SHARE, INTERVAL, SEED = ([0, 0.999], [-0.001, 1]), ([0.001, 0.999, 1, 2], [0, 1.5]), ([0, 2**32 - 1], [-1, 2**32])
LIMITS = {
    "global_batch_size": COUNT,
    "learning_rates": (["{fusion: 1e-9, lm_head: 1}"], ["{fusion: 0, lm_head: 1}"]),
    "model.bits": ([4, 8], [5]),
    "data.max_text_length": COUNT,
    "data.num_frames": COUNT,
    "data.processes": COUNT,
    "data.detector.threshold": ([0, 1], [-0.001, 1.001]),
    "evaluation.max_text_length": COUNT,
    "evaluation.detector.threshold": ([0, 1], [-0.001, 1.001]),
    "training.per_device_train_batch_size": COUNT,
    "training.per_device_eval_batch_size": COUNT,
    "training.gradient_accumulation_steps": COUNT,
    "training.eval_accumulation_steps": COUNT,
    "training.num_train_epochs": POSITIVE,
    "training.max_steps": ([-1, 1], [-2, 0]),
    "training.learning_rate": POSITIVE,
    "training.warmup_steps": NOT_NEGATIVE,
    "training.weight_decay": NOT_NEGATIVE,
    "training.adam_beta1": SHARE,
    "training.adam_beta2": SHARE,
    "training.adam_epsilon": NOT_NEGATIVE,
    "training.max_grad_norm": NOT_NEGATIVE,
    "training.label_smoothing_factor": SHARE,
    "training.neftune_noise_alpha": POSITIVE,
    "training.torch_empty_cache_steps": COUNT,
    "training.logging_steps": INTERVAL,
    "training.eval_steps": INTERVAL,
    "training.save_steps": INTERVAL,
    "training.eval_delay": NOT_NEGATIVE,
    "training.save_total_limit": COUNT,
    "training.seed": SEED,
    "training.data_seed": SEED,
    "training.dataloader_num_workers": ([0], [-1]),
    "training.dataloader_prefetch_factor": COUNT,
    "training.ddp_timeout": COUNT,
    "training.ddp_bucket_cap_mb": COUNT,
    "lora.r": COUNT,
    "lora.lora_alpha": COUNT,
    "lora.lora_dropout": SHARE,
    "model.dtype": (["float32", "bfloat16", "float16"], ["int8"]),
    "data.missing_boxes": (["error", "empty"], ["skip"]),
    "data.on_bad_sample": (["error", "skip"], ["empty"]),
    "evaluation.missing_boxes": (["error", "empty"], ["skip"]),
    "data.detector.mode": (["faithful", "clean"], ["x"]),
    "training.train_sampling_strategy": (["random", "sequential", "group_by_length"], ["x"]),
}


@pytest.mark.parametrize("number", range(4))
def test_values_are_accepted_up_to_their_limits(number):
    load_recipe(*(f"{key}={within[min(number, len(within) - 1)]}" for key, (within, _) in LIMITS.items()))


@pytest.mark.parametrize("number", range(2))
def test_values_beyond_their_limits_are_refused(number):
    changes = [f"{key}={beyond[min(number, len(beyond) - 1)]}" for key, (_, beyond) in LIMITS.items()]
    with pytest.raises(TrainingError) as caught:
        load_recipe(*changes)
    named = [line.partition("` must be ")[0] for line in str(caught.value).splitlines()]
    assert sorted(named) == sorted(f"`{key}" for key in LIMITS)


@pytest.mark.parametrize("change", ["training.bf16=2", "training.run_name=[a]"])
def test_quotes_are_advised_for_numbers_that_may_be_text_only(change):
    with pytest.raises(TrainingError) as caught:
        load_recipe("stage_2_vicuna_7b.yaml", change)
    assert "quotes" not in str(caught.value)


READ = [
    ("data.allow_other_boxes=no", False),
    ("data.allow_other_boxes=Yes", True),
    ("data.streaming=on", True),
    ("training.bf16=off", False),
    ("training.tf32=1", True),
    ("training.learning_rate='1e-5'", 1e-5),
    ("training.max_steps=1e3", 1000),
    ("training.logging_steps=0.1", 0.1),
    ("training.save_strategy=no", "no"),
    ("training.include_num_input_tokens_seen=true", True),
    ("training.report_to=[wandb, tensorboard]", ["wandb", "tensorboard"]),
    ("training.fsdp=true", True),
    ("training.fsdp=full_shard", "full_shard"),
    ("training.fsdp=[full_shard, auto_wrap]", ["full_shard", "auto_wrap"]),
    ("training.deepspeed=zero.json", "zero.json"),
    ("training.deepspeed={zero: true}", {"zero": True}),
    ("training.report_to=wandb", "wandb"),
    ("training.debug=[underflow_overflow]", ["underflow_overflow"]),
    ("training.debug=underflow_overflow", "underflow_overflow"),
    ("training.accelerator_config={even_batches: true}", {"even_batches": True}),
    ("training.accelerator_config=accelerate.json", "accelerate.json"),
    ("training.liger_kernel_config={rope: true}", {"rope": True}),
    ("training.liger_kernel_config=null", None),
    ("training.save_total_limit=null", None),
    ("lora.init_lora_weights=pissa_niter_4", "pissa_niter_4"),
    ("lora.init_lora_weights=false", False),
    ("training.lr_scheduler_type=Cosine", "cosine"),
    ("lora.bias=ALL", "all"),
    ("lora.runtime_config={ephemeral_gpu_offload: true}", {"ephemeral_gpu_offload": True}),
    ("lora.layer_replication=[[0, 4]]", [[0, 4]]),
    ("evaluation=null", None),
    ("evaluation.detector=null", None),
    ("model.parts=null", None),
    ("training.bf16=0", False),
    ("data.streaming='True'", True),
    ("data.streaming='false'", False),
    ("data.streaming=NO", False),
    ("training.bf16=yes", True),
    ("training.max_steps='+1_0'", 10),
    ("training.max_steps='-1'", -1),
    ("learning_rates={fusion: '1e-3'}", {"fusion": 1e-3}),
]


@pytest.mark.parametrize(("change", "expected"), READ, ids=[change for change, _ in READ])
def test_words_are_read_by_the_type_of_their_key(change, expected):
    value = load_recipe("stage_2_vicuna_7b.yaml", change)
    for key in change.partition("=")[0].split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("kind", [list, list[Any], Any])
def test_values_without_a_type_are_read_as_they_are_but_for_words(kind):
    """Releases of transformers and peft may have such fields."""
    assert read_value([{"a": 3}, "no"], kind, "training.new") == [{"a": 3}, "no"]
    with pytest.raises(WrongValueError, match="has a=no, which is read as text"):
        read_value([{"a": "no"}] if kind is not Any else {"a": "no"}, kind, "training.new")


def defaults_of(function, *names):
    return {name: inspect.signature(function).parameters[name].default for name in names}


def test_defaults_are_those_of_the_functions_that_use_them():
    data, detector = DataOptions(), DetectorOptions()
    options = ("max_text_length", "on_bad_sample", "missing_boxes", "original_labels", "processes")
    assert defaults_of(ConversationDataset, *options) == {name: getattr(data, name) for name in options}
    assert defaults_of(MGLlavaDataCollator, *options[:4]) == {name: getattr(data, name) for name in options[:4]}
    assert defaults_of(detect_images, "threshold") == {"threshold": detector.threshold}
    assert open_detector().config["mode"] == detector.mode
    assert Recipe().model.dtype == "bfloat16" and not data.allow_other_boxes and not data.streaming


def test_parts_are_those_of_the_family(monkeypatch):
    toy = dataclasses.replace(FAMILIES["mgllava"], title="Toy", parts=("llm", "vision_tower"))
    monkeypatch.setitem(FAMILIES, "toy", toy)
    given = ("model.name=null", "model.family=toy", "model.parts.llm=x")
    parts = load_recipe("stage_2.yaml", *given).model.parts
    assert parts == {"llm": "x", "vision_tower": None, "prompt_template": None, "config": {}}
    with pytest.raises(TrainingError, match=r"`model.parts.high_res_tower` is not a part of Toy, .* llm and vision"):
        load_recipe("stage_2.yaml", *given, "model.parts.high_res_tower=x")


def test_all_problems_are_said_a_line_each():
    with pytest.raises(TrainingError) as caught:
        load_recipe("stage_1.yaml", "lora.r=a", "training.seed=b", "data.streaming=c", "data.box=d")
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(" ")[0] for line in lines) == [
        "`data.box`",
        "`data.streaming`",
        "`lora.r`",
        "`training.seed`",
    ]


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("training: {seed: 1}\ntraining: {seed: 2}\n")
    with pytest.raises(TrainingError, match="training occurs twice"):
        load_recipe(tmp_path / "twice.yaml")
    with pytest.raises(TrainingError, match="b, c occurs twice"):
        load_recipe("model.config={a: {b: 1, c: 2, b: 2, d: 3, c: 4}}")


def test_a_recipe_of_python_is_checked_too(tmp_path):
    recipe = Recipe(training={"output_dir": tmp_path, "save_strategy": SaveStrategy.NO}, global_batch_size=2)
    assert checked_recipe(recipe).training == {"output_dir": str(tmp_path), "save_strategy": "no"}
    with pytest.raises(TrainingError, match="`global_batch_size` must be a whole number or null, got 'many'"):
        train(Recipe(training={"output_dir": tmp_path}, global_batch_size="many"))
