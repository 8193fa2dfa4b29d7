"""Gradients of the whole model against a plain computation of the same in float64.

The reference shares nothing with the package but the parameters: maps are upsampled and pooled by torchvision,
attention is written out, the loss is a sum of logarithms.
"""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import roi_align

from tests.tiny import IMAGE_TOKEN_ID, tiny_inputs, tiny_model

BOX_COUNTS = [[3], [], [1, 2]]


def layer_norm(x, p, name, eps):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(x, p, name):
    bias = p.get(f"{name}.bias")
    return x @ p[f"{name}.weight"].T + (0 if bias is None else bias)


def attend(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def clip_tower(pixels, p, config):
    name = "model.vision_tower."
    x = F.conv2d(pixels, p[name + "embeddings.patch_embedding.weight"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p[name + "embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = layer_norm(x + p[name + "embeddings.position_embedding.weight"], p, name + "pre_layrnorm", 1e-5)
    for layer in range(config.num_hidden_layers):
        at = f"{name}encoder.layers.{layer}."
        y = layer_norm(x, p, at + "layer_norm1", 1e-5)
        q, k, v = (heads(linear(y, p, f"{at}self_attn.{n}_proj"), config.num_attention_heads) for n in "qkv")
        x = x + linear(attend(q, k, v).transpose(1, 2).flatten(2), p, at + "self_attn.out_proj")
        y = linear(layer_norm(x, p, at + "layer_norm2", 1e-5), p, at + "mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), p, at + "mlp.fc2")
    return x[:, 1:]


def convnext_tower(x, p):
    name, maps = "model.high_res_vision_tower.", []

    def channels_last_norm(x, at):
        return layer_norm(x.permute(0, 2, 3, 1), p, at, 1e-6).permute(0, 3, 1, 2)

    x = F.conv2d(x, p[name + "stem.0.weight"], p[name + "stem.0.bias"], stride=4)
    x = channels_last_norm(x, name + "stem.1")
    for stage in range(4):
        at = f"{name}stages.{stage}."
        if stage:
            x = channels_last_norm(x, at + "downsample.0")
            x = F.conv2d(x, p[at + "downsample.1.weight"], p[at + "downsample.1.bias"], stride=2)
        block = at + "blocks.0."
        y = F.conv2d(x, p[block + "conv_dw.weight"], p[block + "conv_dw.bias"], padding=3, groups=x.shape[1])
        y = layer_norm(y.permute(0, 2, 3, 1), p, block + "norm", 1e-6)
        y = linear(F.gelu(linear(y, p, block + "mlp.fc1")), p, block + "mlp.fc2") * p[block + "gamma"]
        x = x + y.permute(0, 3, 1, 2)
        maps.append(x)
    return maps


def conv_gate(low, high, p):
    name = "model.fusion."

    def conv(x, at, **kwargs):
        return F.conv2d(x, p[f"{name}{at}.weight"], p[f"{name}{at}.bias"], **kwargs)

    grid = int(low.shape[1] ** 0.5)
    low_map = low.transpose(1, 2).unflatten(2, (grid, grid))
    high = conv(F.gelu(conv(high, "high_res_conv")), "high_res_proj").flatten(2).transpose(1, 2)
    depthwise = conv(low_map, "low_res_conv", padding=3, groups=low.shape[-1])
    low = low + conv(F.gelu(depthwise), "low_res_proj").flatten(2).transpose(1, 2)
    gate = linear(F.gelu(linear(torch.cat([low, high], -1).mean(1), p, name + "gate.0")), p, name + "gate.2")
    return low + torch.tanh(gate)[:, None] * high


def project(x, p, name):
    return linear(F.gelu(linear(x, p, name + ".linear_1")), p, name + ".linear_2")


def llama(x, mask, p, config):
    name = "model.language_model."
    size = config.head_dim
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 10000.0 ** (
        torch.arange(0, size, 2).to(x.dtype) / size
    )
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def norm(x, at):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * p[f"{at}.weight"]

    def rotate(x):
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    visible = (causal & mask[:, None]) | torch.eye(x.shape[1]).bool()
    for layer in range(config.num_hidden_layers):
        at = f"{name}layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q = rotate(heads(linear(y, p, at + "self_attn.q_proj"), config.num_attention_heads))
        k = rotate(heads(linear(y, p, at + "self_attn.k_proj"), config.num_key_value_heads))
        v = heads(linear(y, p, at + "self_attn.v_proj"), config.num_key_value_heads)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        x = x + linear(attend(q, k, v, visible[:, None]).transpose(1, 2).flatten(2), p, at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        y = F.silu(linear(y, p, at + "mlp.gate_proj")) * linear(y, p, at + "mlp.up_proj")
        x = x + linear(y, p, at + "mlp.down_proj")
    return norm(x, name + "norm")


def reference_loss(p, config, inputs, labels):
    pixels, side = inputs["pixel_values"], config.vision_config.image_size
    # The towers' inputs are resized in float64 here and there.
    low = clip_tower(F.interpolate(pixels, size=(side, side), mode="bilinear"), p, config.vision_config)
    maps = convnext_tower(pixels, p)
    fused = project(conv_gate(low, maps[-1], p), p, "model.multi_modal_projector")
    finest = maps[0].shape[-1]
    pyramid = torch.cat([F.interpolate(level, size=(finest, finest), mode="bilinear") for level in maps], 1)
    tokens = []
    for image, (boxes, count) in enumerate(zip(inputs["boxes"], inputs["num_boxes"].tolist(), strict=True)):
        scale = finest / config.high_res_vision_config.image_size
        regions = [boxes[:count].to(pixels.dtype)]
        pooled = roi_align(pyramid[image : image + 1], regions, (56, 56), scale, -1, False).mean((2, 3))
        tokens += [fused[image], project(pooled, p, "model.box_projector")]
    x = p["model.language_model.embed_tokens.weight"][inputs["input_ids"]].clone()
    x[inputs["input_ids"] == IMAGE_TOKEN_ID] = torch.cat(tokens)
    x = llama(x, inputs["attention_mask"].bool(), p, config.text_config)
    logits = linear(x, p, "lm_head")[..., : config.unpadded_vocab_size]
    targets, scores = labels[:, 1:], logits[:, :-1].log_softmax(-1)
    learned = targets != -100
    return -scores[learned].gather(1, targets[learned][:, None]).mean()


@pytest.fixture(scope="module")
def batch():
    inputs = tiny_inputs(BOX_COUNTS, padding_side="right")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE_TOKEN_ID, -100)
    labels[:, :2] = -100
    return inputs, labels


@pytest.fixture
def no_float32(monkeypatch):
    """transformers' language models compute norms, angles and the loss in float32, whatever the dtype is."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def test_gradients_equal_a_plain_computation(batch, no_float32):
    inputs, labels = batch
    model = tiny_model().double().train()
    loss = model(**inputs, labels=labels).loss
    loss.backward()

    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected = reference_loss(parameters, model.config, inputs, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, parameter in model.named_parameters():
        reference = parameters[name].grad
        # Those of the keys' biases are zero but for rounding.
        scale = max(reference.abs().max().item(), 1e-6)
        assert (parameter.grad - reference).abs().max().item() < 1e-6 * scale, name


@pytest.fixture
def two_processes(monkeypatch):
    """What the model sees as one of two processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)


def test_a_batch_of_text_touches_every_parameter(two_processes):
    """Otherwise a process without images waits for the others, or they for it."""
    inputs = tiny_inputs([[], []], padding_side="right")
    model = tiny_model().train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith(("model.language_model", "lm_head")):
            assert not parameter.grad.any(), name
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs, labels=labels).loss, loss)


@pytest.mark.parametrize(
    "variant", [{"object_merging": "box_to_fused"}, {"fusion_type": "none", "object_merging": "none"}]
)
def test_text_touches_every_parameter_of_variants(variant, two_processes):
    inputs = tiny_inputs([[]])
    model = tiny_model(**variant).train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_text_does_not_touch_the_image_in_inference():
    model = tiny_model()
    model.model.encode_images = None
    with torch.no_grad():
        model(**tiny_inputs([[]]))


@pytest.mark.parametrize("frozen", [False, True])
def test_text_alone_runs_no_tower_in_one_process(frozen, monkeypatch):
    model, inputs = tiny_model().train(), tiny_inputs([[], []], padding_side="right")
    model.model.encode_images = None  # calling it fails
    if frozen:  # nothing is reduced or gathered, so other processes do not wait for this one either
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
        for module in model.model.vision_modules():
            module.requires_grad_(False)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad.any()
    assert model.eval().generate(**inputs, max_new_tokens=3, use_cache=False).shape[0] == 2


def test_text_alone_can_be_learned_from_where_only_vision_parts_are_trained():
    model, inputs = tiny_model().train(), tiny_inputs([[], []], padding_side="right")
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert not any(p.grad.any() for p in model.model.multi_modal_projector.parameters() if p.grad is not None)


def test_an_infinite_weight_of_the_vision_parts_leaves_the_loss_of_text_finite(two_processes):
    model, inputs = tiny_model().train(), tiny_inputs([[], []], padding_side="right")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] = float("inf")
        expected = model.eval()(**inputs, labels=inputs["input_ids"]).loss
    assert torch.equal(model.train()(**inputs, labels=inputs["input_ids"]).loss, expected)
