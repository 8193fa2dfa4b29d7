"""A stand-in for vLLM 0.32: what the plugin uses of it, with vLLM's names, arguments and order of calls.

It has what decides which method of the plugin is called with which values: reading messages, tokenizing prompts, the
cache of processed images, replacing placeholders, and running a model once. `make vllm-check` runs vLLM itself.
"""

import asyncio
import base64
import hashlib
import io
import pickle
import sys
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import PIL.Image
import torch
from transformers import AutoModel


class VLLMValidationError(Exception):
    def __init__(self, message, *, parameter=None, value=None):
        super().__init__(message)
        self.parameter, self.value = parameter, value


@dataclass
class MediaWithBytes:
    """An image that vLLM has opened; transparent ones are composed with white."""

    media: Any
    original_bytes: bytes

    def __getattr__(self, name):
        return getattr(self.media, name)


@dataclass
class ChatParams:
    chat_template: str | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    media_io_kwargs: dict | None = None
    mm_processor_kwargs: dict | None = None

    def get_apply_chat_template_kwargs(self):
        return {**self.chat_template_kwargs, "chat_template": self.chat_template, "return_dict": False}


def make_async(func, executor=None):
    def run(*args, **kwargs):
        return asyncio.get_event_loop().run_in_executor(executor, partial(func, *args, **kwargs))

    return run


def parse_chat_messages(messages, model_config, content_format, media_io_kwargs=None, mm_processor_kwargs=None):
    assert content_format == "openai"
    conversation, images, names = [], [], []
    for message in messages:
        content = message.get("content") or []
        blocks = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text":
                blocks.append(dict(part))
                continue
            if not {"image_url", "image_pil"} & set(part):
                raise VLLMValidationError("Unsupported chat content part type", parameter="type")
            image = part.get("image_pil") or _opened(part.get("image_url"))
            images.append(image)
            names.append(part.get("uuid"))
            kept = {key: value for key, value in part.items() if key not in ("type", "image_url", "image_pil", "uuid")}
            blocks.append({"type": "image", **kept})
        if message["role"] == "tool":
            blocks = "\n".join(block["text"] for block in blocks)
        calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
        conversation.append({"role": message["role"], "content": blocks, **calls})
    return conversation, {"image": images} if images else None, {"image": names} if images else None


async def parse_chat_messages_async(*args, **kwargs):
    return parse_chat_messages(*args, **kwargs)


def _opened(url):
    if url is None:
        return None
    data = base64.b64decode(url["url"].partition(",")[2])
    return MediaWithBytes(PIL.Image.open(io.BytesIO(data)).convert("RGB"), data)


class ProcessorBatchItems:
    def __init__(self, data, modality):
        self.data, self.modality = data, modality

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def get_item_for_hash(self, index):
        return self.data[index]

    def get_processor_data(self):
        return {f"{self.modality}s": list(self.data)}


class MultiModalDataParser:
    def _parse_image_data(self, data):
        raise NotImplementedError

    def parse_mm_data(self, mm_data):
        parsed = {"image": self._parse_image_data(mm_data["image"])} if "image" in mm_data else {}
        return UserDict({name: items for name, items in parsed.items() if items is not None})


@dataclass
class MultiModalFieldConfig:
    modality: str

    @classmethod
    def batched(cls, modality):
        return cls(modality)


@dataclass
class PromptReplacement:
    modality: str
    target: list
    replacement: Any

    def resolve(self, item_idx):
        return SimpleNamespace(target=self.target, content=SimpleNamespace(full=self.replacement(item_idx)))


@dataclass
class ProcessorInputs:
    prompt: list
    mm_data_items: Any
    mm_uuid_items: dict | None = None
    hf_processor_mm_kwargs: dict = field(default_factory=dict)

    def get_mm_hashes(self, model_id):
        hashes, options = {}, self.hf_processor_mm_kwargs
        for modality, items in self.mm_data_items.items():
            names = (self.mm_uuid_items or {}).get(modality) or [None] * len(items)
            hashes[modality] = [
                name if name is not None and not options else _hash(model_id, name or item, options)
                for name, item in zip(names, map(items.get_item_for_hash, range(len(items))), strict=True)
            ]
        return hashes


def _hash(*values):
    """Hash images by their files or pixels, as vLLM does."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, MediaWithBytes):
            return value.original_bytes
        return (value.mode, value.size, value.tobytes()) if isinstance(value, PIL.Image.Image) else value

    return hashlib.sha256(pickle.dumps([plain(value) for value in values])).hexdigest()


class BaseProcessingInfo:
    def __init__(self, ctx):
        self.ctx = ctx
        self.data_parser = self.get_data_parser()

    def get_hf_processor(self):
        return self.ctx.model_config.stand_in_processor

    def get_supported_mm_limits(self):
        raise NotImplementedError

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        return None

    def get_data_parser(self):
        return MultiModalDataParser()


class BaseDummyInputsBuilder:
    def __init__(self, info):
        self.info = info

    def get_dummy_text(self, mm_counts):
        raise NotImplementedError

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        raise NotImplementedError


class BaseMultiModalProcessor:
    """Processes the images that its cache does not have, and replaces placeholders by runs."""

    def __init__(self, info, dummy_inputs):
        self.info, self.dummy_inputs, self.cache = info, dummy_inputs, {}

    def _get_mm_hashes(self, inputs):
        return inputs.get_mm_hashes(self.info.ctx.model_config.model)

    def _call_hf_processor(self, hf_data, hf_kwargs):
        raise NotImplementedError

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        raise NotImplementedError

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        raise NotImplementedError

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        updates = iter(mm_prompt_updates.get("image", []))
        ids, ranges = [], []
        for token in token_ids:
            update = next(updates, None) if [token] == mm_prompt_updates["image"][0][0].target else None
            if update is None:
                ids.append(token)
                continue
            ranges.append((len(ids), len(update[0].content.full)))
            ids += update[0].content.full
        return ids, {"image": ranges}

    def apply(self, inputs):
        items, options = inputs.mm_data_items, inputs.hf_processor_mm_kwargs
        hashes = self._get_mm_hashes(inputs)
        missing = [index for index, name in enumerate(hashes["image"]) if name not in self.cache]
        if missing:
            if any(items["image"][index] is None for index in missing):
                raise ValueError("Cache miss for image")
            new = self.info.data_parser.parse_mm_data({"image": [items["image"][index] for index in missing]})
            outputs = self._call_hf_processor(new["image"].get_processor_data(), options)
            fields = self._get_mm_fields_config(outputs, options)
            rows = [
                {name: SimpleNamespace(data=outputs[name][index]) for name, config in fields.items()}
                for index in range(len(missing))
            ]
            assert {config.modality for config in fields.values()} == {"image"}
            updates = self._get_prompt_updates(new, options, {"image": rows})
            for index, row in enumerate(rows):
                self.cache[hashes["image"][missing[index]]] = (
                    row,
                    [update.resolve(index) for update in updates if update.modality == "image"],
                )
        found = [self.cache[name] for name in hashes["image"]]
        ids, ranges = self._apply_prompt_updates(inputs.prompt, {"image": [updates for _, updates in found]})
        if len(ranges["image"]) != len(found):
            raise RuntimeError("Expected one placeholder per image")
        return {
            "prompt_token_ids": ids,
            "mm_kwargs": {"image": [row for row, _ in found]},
            "mm_hashes": hashes,
            "mm_placeholders": ranges,
        }

    def get_dummy_mm_inputs(self, mm_counts):
        builder, seq_len = self.dummy_inputs, self.info.ctx.model_config.max_model_len
        text = builder.get_dummy_text(mm_counts)
        data = builder.get_dummy_mm_data(seq_len, mm_counts, {})
        prompt = self.info.get_hf_processor().tokenizer.encode(text)
        return self.apply(ProcessorInputs(prompt, self.info.data_parser.parse_mm_data(data)))


class HfRenderer:
    def __init__(self, config, tokenizer):
        self.config, self.model_config, self.tokenizer = config, config.model_config, tokenizer
        self._executor = ThreadPoolExecutor(1)
        self.mm_processor = MULTIMODAL_REGISTRY.create_processor(self.model_config)

    def get_mm_processor(self):
        return self.mm_processor

    def render_messages(self, messages, params):
        raise NotImplementedError

    async def render_messages_async(self, messages, params):
        raise NotImplementedError

    def _tokenize_prompt(self, prompt, params):
        raise NotImplementedError

    def tokenize_prompts(self, prompts, params):
        return [
            prompt if "prompt_token_ids" in prompt else self._tokenize_prompt(prompt, params) for prompt in prompts
        ]

    async def tokenize_prompts_async(self, prompts, params):
        return HfRenderer.tokenize_prompts(self, prompts, params)

    def _process_multimodal(self, prompt, mm_data, mm_uuids, mm_processor_kwargs, media_io_kwargs=None):
        items = self.mm_processor.info.data_parser.parse_mm_data(mm_data)
        names = {name: [value] if isinstance(value, str) else value for name, value in (mm_uuids or {}).items()}
        return self.mm_processor.apply(ProcessorInputs(prompt, items, names, mm_processor_kwargs or {}))

    def _process(self, prompt, extras):
        prompt = {**prompt, **extras}
        if prompt.get("multi_modal_data"):
            return self._process_multimodal(
                prompt["prompt_token_ids"],
                prompt["multi_modal_data"],
                mm_processor_kwargs=prompt.get("mm_processor_kwargs"),
                mm_uuids=prompt.get("multi_modal_uuids"),
            )
        return {"prompt_token_ids": prompt["prompt_token_ids"], "mm_kwargs": {"image": []}}

    def render_cmpl(self, prompts, params=SimpleNamespace(add_special_tokens=True)):  # noqa: B008
        """What `LLM.generate` calls."""
        return [self._process(prompt, {}) for prompt in self.tokenize_prompts([dict(p) for p in prompts], params)]

    def render_chat(self, conversations, params):
        """What `LLM.chat` calls."""
        prompts = [self.render_messages(messages, params)[1] for messages in conversations]
        prompts = self.tokenize_prompts(prompts, SimpleNamespace(add_special_tokens=False))
        extras = {"mm_processor_kwargs": params.mm_processor_kwargs} if params.mm_processor_kwargs else {}
        return [self._process(prompt, extras) for prompt in prompts]

    async def render_chat_async(self, conversations, params):
        """What the server calls for a request."""
        prompts = [(await self.render_messages_async(messages, params))[1] for messages in conversations]
        prompts = await self.tokenize_prompts_async(prompts, SimpleNamespace(add_special_tokens=False))
        extras = {"mm_processor_kwargs": params.mm_processor_kwargs} if params.mm_processor_kwargs else {}
        return [self._process(prompt, extras) for prompt in prompts]


class TransformersMultiModalForCausalLM:
    """Runs the body of a model of transformers; the head and the images are put in here."""

    def __init__(self, model_config, weights=None):
        self.model_config, self.config = model_config, model_config.hf_config
        if weights is not None:
            self.model = AutoModel.from_config(**self._from_config_kwargs).eval()
            self.model.load_state_dict(weights.model.state_dict())
            self.lm_head = weights.lm_head

    @property
    def _from_config_kwargs(self):
        return {"config": self.config, "dtype": self.model_config.dtype}

    def embed_multimodal(self, **kwargs):
        raise NotImplementedError

    @classmethod
    def get_placeholder_str(cls, modality, i):
        return "<##PLACEHOLDER##>"

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)

    @torch.no_grad()
    def run(self, inputs):
        """Return the logits of the token after a prompt."""
        rows = inputs["mm_kwargs"]["image"]
        names = rows[0] if rows else ()
        images = self.embed_multimodal(**{name: _batch([row[name].data for row in rows]) for name in names})
        ids = torch.tensor([inputs["prompt_token_ids"]])
        embeds = self.model.get_input_embeddings()(ids)
        for tokens, (start, length) in zip(images, inputs.get("mm_placeholders", {}).get("image", ()), strict=True):
            assert tokens.shape[0] == length
            embeds[0, start : start + length] = tokens
        hidden = self.model(input_ids=None, inputs_embeds=embeds, use_cache=False, return_dict=False)[0]
        return self.compute_logits(hidden[0, -1:])


def _batch(values):
    """Stack values of one shape; others stay a list."""
    return torch.stack(values) if len({value.shape for value in values}) == 1 else values


class _MultiModalRegistry:
    def register_processor(self, processor, *, info, dummy_inputs):
        def register(model_cls):
            model_cls._processor_factory = processor, info, dummy_inputs
            return model_cls

        return register

    def create_processor(self, model_config):
        architecture = ModelRegistry.models[model_config.hf_config.architectures[0]]
        module, _, name = architecture.partition(":")
        processor, info_class, dummy_inputs = getattr(_module(module), name)._processor_factory
        info = info_class(SimpleNamespace(model_config=model_config))
        return processor(info, dummy_inputs(info))


class _ModelRegistry:
    def __init__(self):
        self.models = {}

    def register_model(self, architecture, model_class):
        self.models[architecture] = model_class


class _Modes(dict):
    """Renderers and tokenizers by their mode."""

    @property
    def renderers(self):
        return self

    tokenizers = renderers

    def register(self, mode, module, name):
        assert mode not in self, "vLLM warns"
        self[mode] = module, name

    def load_renderer(self, mode, config, tokenizer):
        module, name = self[mode]
        return getattr(_module(module), name)(config, tokenizer)


class VerifyAndUpdateConfig:
    @staticmethod
    def verify_and_update_config(vllm_config):
        return

    @staticmethod
    def verify_and_update_model_config(model_config):
        return


def _module(name):
    return __import__(name, fromlist=["_"])


ModelRegistry, MULTIMODAL_REGISTRY = _ModelRegistry(), _MultiModalRegistry()
RENDERER_REGISTRY, TokenizerRegistry, MODELS_CONFIG_MAP = _Modes(), _Modes(), {}
PLUGIN = "mgllava.integrations.vllm"
NAMES = {
    "vllm.exceptions": (VLLMValidationError,),
    "vllm.model_executor.models.config": (VerifyAndUpdateConfig,),
    "vllm.model_executor.models.transformers": (TransformersMultiModalForCausalLM,),
    "vllm.multimodal.inputs": (MultiModalFieldConfig,),
    "vllm.multimodal.media": (MediaWithBytes,),
    "vllm.multimodal.parse": (MultiModalDataParser, ProcessorBatchItems),
    "vllm.multimodal.processing": (
        BaseDummyInputsBuilder,
        BaseMultiModalProcessor,
        BaseProcessingInfo,
        PromptReplacement,
    ),
    "vllm.renderers.chat_utils": (parse_chat_messages, parse_chat_messages_async),
    "vllm.renderers.hf": (HfRenderer,),
    "vllm.utils.async_utils": (make_async,),
}
VALUES = {
    "vllm": {"__version__": "0.32.0"},
    "vllm.inputs": {"TokensPrompt": dict},
    "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": MODELS_CONFIG_MAP},
    "vllm.model_executor.models.registry": {"ModelRegistry": ModelRegistry},
    "vllm.multimodal": {"MULTIMODAL_REGISTRY": MULTIMODAL_REGISTRY},
    "vllm.multimodal.image": {"open_image": PIL.Image.open},
    "vllm.renderers.registry": {"RENDERER_REGISTRY": RENDERER_REGISTRY},
    "vllm.tokenizers.registry": {"TokenizerRegistry": TokenizerRegistry},
    "vllm.transformers_utils.processor": {
        "cached_processor_from_config": lambda model_config: model_config.stand_in_processor
    },
}
PARTS = ("hooks", "processing", "model", "renderer", "registration")


def install(monkeypatch):
    """Make the stand-in importable as `vllm`, and the parts of the plugin that import it too."""
    for name in {*NAMES, *VALUES, "vllm.model_executor", "vllm.model_executor.models", "vllm.renderers"}:
        module = ModuleType(name)
        module.__path__ = []
        for value in NAMES.get(name, ()):
            setattr(module, value.__name__, value)
        vars(module).update(VALUES.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    for registry in (ModelRegistry.models, RENDERER_REGISTRY, TokenizerRegistry, MODELS_CONFIG_MAP):
        registry.clear()
    for part in PARTS:  # imported again, and forgotten afterwards
        monkeypatch.setitem(sys.modules, f"{PLUGIN}.{part}", None)
        del sys.modules[f"{PLUGIN}.{part}"]


def configured(folder, config, processor, additional_config=None, **options):
    """Return vLLM's configuration of a model, after the checks that the plugin registered."""
    model_config = SimpleNamespace(
        model=str(folder),
        revision=None,
        hf_config=config,
        dtype=torch.float32,
        max_model_len=1200,
        tokenizer_mode="auto",
        multimodal_config=SimpleNamespace(enable_mm_embeds=False),
        stand_in_processor=processor,
    )
    vars(model_config).update(options)
    check = MODELS_CONFIG_MAP[config.architectures[0]]
    check.verify_and_update_model_config(model_config)
    found = SimpleNamespace(model_config=model_config, additional_config=additional_config or {})
    check.verify_and_update_config(found)
    return found


def renderer_of(config):
    """Load the renderer that the checks chose."""
    model_config = config.model_config
    return RENDERER_REGISTRY.load_renderer(
        model_config.tokenizer_mode, config, model_config.stand_in_processor.tokenizer
    )


def model_of(config, weights):
    """Load the model with the weights of one of transformers."""
    module, _, name = ModelRegistry.models[config.model_config.hf_config.architectures[0]].partition(":")
    return getattr(_module(module), name)(config.model_config, weights)


__all__ = ["ChatParams", "configured", "install", "model_of", "renderer_of"]
