"""Models on several devices, in every dtype, and split across processes."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import infer_auto_device_map
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel

import mgllava
from mgllava import MGLlavaForConditionalGeneration, MGLlavaModel
from tests.modeling.conftest import FAMILIES, comparable_positions
from tests.tiny import VARIANTS, tiny_inputs, tiny_model

MIXED = [[3], [], [1, 5]]
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def saved(family, any_model, tmp_path_factory):
    """A model of each family, with its folder."""
    folder = tmp_path_factory.mktemp("model")
    any_model.save_pretrained(folder)
    return any_model, folder


@pytest.fixture(scope="module")
def saved_mgllava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(folder)
    return model, folder


def assert_same_answers(model, expected):
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    inputs = FAMILIES[model.config.model_type].inputs(MIXED)
    answers, expected_answers = (each.generate(**inputs, **options) for each in (model, expected))
    assert torch.equal(torch.stack(answers.logits), torch.stack(expected_answers.logits))
    assert answers.sequences.tolist() == expected_answers.sequences.tolist()


def device_maps(model):
    """List every device map in which accelerate splits the model between memory and disk."""
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in model.modules()]
    maps = []
    for limit in range(0, max(sizes), 1000):
        device_map = infer_auto_device_map(
            model, {"cpu": limit, "disk": 2 * max(sizes)}, no_split_module_classes=sorted(model._no_split_modules)
        )
        if device_map not in maps:
            maps.append(device_map)
    return maps


def smallest_pieces(model):
    """List the names of the modules that a device map cannot split further."""
    names = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{piece}.") for piece in names):
            continue
        is_whole = type(module).__name__ in model._no_split_modules or not list(module.children())
        if is_whole and list(module.parameters()):
            names.append(name)
    return names


@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_pieces_alternate_between_memory_and_disk(saved, tmp_path, first):
    """Each piece is on the disk in one of two maps, between neighbors in memory."""
    model, folder = saved
    devices = ("cpu", "disk") if first == "cpu" else ("disk", "cpu")
    device_map = {name: devices[index % 2] for index, name in enumerate(smallest_pieces(model))}
    split = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert_same_answers(split, model)


@pytest.mark.slow
def test_every_split_between_memory_and_disk_gives_the_same_answers(saved, tmp_path):
    model, folder = saved
    maps = device_maps(model)
    assert len(maps) > {"mgllava": 10, "slime": 8}[model.config.model_type]
    pieces = {name for device_map in maps for name in device_map}
    adapters = {
        "mgllava": {"model.fusion", "model.box_projector", "model.high_res_vision_tower.stages.2"},
        "slime": {"model.multi_modal_projector", "model.local_compressor"},
    }
    assert adapters[model.config.model_type] <= pieces
    for device_map in maps:
        split = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
        assert_same_answers(split, model)


@pytest.mark.parametrize("variant", [*VARIANTS, "tied_head"])
def test_no_operation_mixes_tensors_of_two_gpus(monkeypatch, variant):
    """Neighboring pieces are on different GPUs. Fake tensors have devices, but no values."""
    tied = {"text_config": {"tie_word_embeddings": True}}
    model = tiny_model(**VARIANTS.get(variant, tied)).requires_grad_(False)
    inputs = tiny_inputs([[3], [3]])
    device_map = {name: f"cuda:{index % 7}" for index, name in enumerate(smallest_pieces(model))}
    if variant == "tied_head":
        device_map["lm_head"] = device_map["model.language_model.embed_tokens"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {}
        for name, module in model.named_modules():
            piece = next((piece for piece in device_map if f"{name}.".startswith(f"{piece}.")), None)
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        device = device_map.get(piece, "cuda:0")
                        fake = fakes.setdefault(id(tensor), mode.from_tensor(tensor.data).to(device))
                        is_parameter = tensors is module._parameters
                        tensors[key] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        # The weights are on their devices already: accelerate only has to move inputs and outputs of modules.
        monkeypatch.setattr(MGLlavaModel, "_check_no_placeholders", lambda *args: None)  # fake tensors have no values
        monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", lambda *args, **kwargs: None)
        model = dispatch_model(model, device_map, main_device="cuda:0", skip_keys="past_key_values", force_hooks=True)
        inputs = {name: torch.empty_like(tensor, device="cuda:0") for name, tensor in inputs.items()}

        images = [inputs[name] for name in ("pixel_values", "boxes", "num_boxes")]
        fused_tokens, box_tokens = model.model.encode_images(*images)[:2]
        assert fused_tokens.shape[:2] == (2, 9)
        assert (box_tokens is None) == (model.config.num_tokens_per_box == 0)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        logits = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
        assert logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"": "cpu"}])
def test_named_device_maps(saved, tmp_path, device_map):
    model, folder = saved
    split = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert_same_answers(split, model)


def test_max_memory_sends_the_rest_to_disk(saved, tmp_path):
    model, folder = saved
    split = AutoModel.from_pretrained(folder, device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path)
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    assert split.lm_head.weight.device.type == "meta"
    assert_same_answers(split, model)


def test_explicit_device_map_and_saving_from_disk(saved, tmp_path):
    """The vision modules are on disk, the language model in memory; weights on disk are saved like the others."""
    model, folder = saved
    names = [f"model.{name}" for name, child in model.model.named_children() if list(child.parameters())]
    device_map = dict.fromkeys([*names, "lm_head"], "disk") | {"model.language_model": "cpu"}
    split = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert_same_answers(split, model)
    split.save_pretrained(tmp_path / "again")
    assert_same_answers(AutoModel.from_pretrained(tmp_path / "again"), model)


@torch.no_grad()
def test_model_on_the_meta_device_computes_shapes(saved_mgllava):
    model, _ = saved_mgllava
    with torch.device("meta"):
        empty = MGLlavaForConditionalGeneration(copy.deepcopy(model.config))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    inputs = {name: tensor.to("meta") for name, tensor in tiny_inputs([[3], [2]]).items()}
    images = [inputs[name] for name in ("pixel_values", "boxes", "num_boxes")]
    fused_tokens, box_tokens = empty.model.encode_images(*images)[:2]
    assert (fused_tokens.shape, box_tokens.shape) == ((2, 9, 32), (2, 3, 32))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0), ("bfloat16", 0.15), ("float16", 0.02)])
def test_dtype_auto_and_full_precision_pixels(saved, tmp_path, dtype, limit):
    model, folder = saved
    AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    inputs = FAMILIES[model.config.model_type].inputs(MIXED)
    mask = comparable_positions(model, inputs)
    images = {name: inputs[name] for name in model.image_arguments}
    with torch.no_grad():
        outputs = [
            (torch.cat(each.get_image_features(**images).pooler_output), each(**inputs).logits[mask])
            for each in (loaded, model)
        ]
    assert inputs["pixel_values"].dtype == torch.float32
    (features, logits), (expected_features, expected_logits) = outputs
    assert features.dtype == logits.dtype == getattr(torch, dtype)
    assert (features.float() - expected_features).norm() <= limit / 4 * expected_features.norm()
    assert (logits.float() - expected_logits).norm() <= limit * expected_logits.norm()
    assert loaded.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 2


def test_no_code_moves_tensors_to_cuda():
    for path in Path(mgllava.__file__).parent.rglob("*.py"):
        assert ".cuda(" not in path.read_text(), path


@pytest.mark.parametrize("llm", ["llama", "phi3", "qwen2", "qwen3", "mistral"])
def test_tensor_parallel_plan_names_the_layers_of_the_language_model(llm):
    model = tiny_model(llm)
    names = [name for name, _ in model.named_modules()]
    assert {"lm_head", "model.language_model.layers.*.self_attn.o_proj"} <= set(model.tp_plan)
    for pattern in model.tp_plan:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), name) for name in names), pattern


@pytest.mark.slow
def test_two_processes_share_the_language_model(saved_mgllava):
    """`tp_plan="auto"` with the gloo backend: each process holds half of each layer; the logits are equal."""
    script = Path(__file__).parent / "tensor_parallel.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
            saved_mgllava[1],
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("equal") == 2
