"""Generation, one request at a time, that stops when nobody waits for it and survives a lack of memory."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)
from transformers.utils import logging

from mgllava.serving.errors import RequestError

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def with_free_memory_after_failure(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function; where memory does not suffice, free what it took.

    Args:
        function (`Callable`): What to call.
        *args: Its arguments.
        **kwargs: Its arguments.

    Returns:
        What the function returns.

    Raises:
        RequestError: With status 503, if memory did not suffice.
    """
    try:
        return function(*args, **kwargs)
    except MemoryError:
        pass
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        logger.error(f"Out of memory: {error}")
    # The traceback has gone by here, and with it what kept the tensors of its frames.
    clear_device_cache(garbage_collection=True)
    raise RequestError(
        "The server's memory does not suffice for this request now. Send a shorter one, with fewer images or boxes, "
        "or try again later.",
        code="out_of_memory",
        status=503,
    )


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)


class _DecodeStream:
    """As `tokenizers.decoders.DecodeStream`, which gives up where bytes of byte-fallback tokens form no character."""

    def __init__(self, skip_special_tokens: bool):
        self._skip_special_tokens = skip_special_tokens
        self._stream = self._new()

    def _new(self) -> Any:
        return DecodeStream([], skip_special_tokens=self._skip_special_tokens)

    def step(self, tokenizer: Any, token_id: int) -> str | None:
        try:
            return self._stream.step(tokenizer, token_id)
        except Exception:  # a bare `Exception` is what it raises
            self._stream = self._new()
            return "\N{REPLACEMENT CHARACTER}" + (self._stream.step(tokenizer, token_id) or "")


class _Streamer(DirectStreamer):
    def __init__(self, tokenizer: Any, loop: Any, queue: asyncio.Queue, response_parser: Any = None):
        super().__init__(tokenizer, loop, queue, response_parser=response_parser)
        self._decode_stream: Any = _DecodeStream(skip_special_tokens=response_parser is None)


class ServingGenerateManager(GenerateManager):
    """Generation of transformers on its one thread, with these differences.

    - Without streaming too, generation stops when the waiting task is cancelled; requests that were cancelled while
      they waited for the thread do not start.
    - Memory that did not suffice is freed, and the error says so.
    - `stop` works: transformers passes the processor where the tokenizer is needed.
    - Bytes that form no character do not end a stream.
    """

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """Start to generate.

        Args:
            model ([`MGLlavaForConditionalGeneration`]): The model.
            processor ([`MGLlavaProcessor`]): The processor.
            inputs (`BatchFeature`): One prompt.
            gen_config ([`GenerationConfig`]): The options.
            request_id (`str`): Not used.
            response_parser (*optional*): See the base class.

        Returns:
            `tuple`: The queue that gets text, an error, or `None` at the end; and the streamer, which can cancel.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        streamer = _Streamer(processor.tokenizer._tokenizer, loop, queue, response_parser=response_parser)

        def run() -> None:
            last: _StreamError | None = None
            try:
                _generate(model, processor, inputs, gen_config, streamer=streamer)
                return  # the streamer has ended the queue
            except _GenerationCancelled:
                pass
            except (RequestError, ValueError) as error:
                last = _StreamError(str(error))
            except Exception:
                logger.exception("Generation failed.")
                last = _StreamError("The server failed on this request; its log says why.")
            loop.call_soon_threadsafe(queue.put_nowait, last)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        """Generate; stop when the caller is cancelled.

        Args:
            model ([`MGLlavaForConditionalGeneration`]): The model.
            processor ([`MGLlavaProcessor`]): The processor.
            inputs (`BatchFeature`): One prompt.
            gen_config ([`GenerationConfig`]): The options.
            request_id (`str`): Not used.

        Returns:
            `tuple[str, int, torch.Tensor]`: The answer, the length of the prompt, and the ids of the answer.

        Raises:
            RequestError: If an option does not fit, or memory does not suffice.
        """
        cancelled = threading.Event()

        def run() -> torch.Tensor:
            if cancelled.is_set():
                return inputs["input_ids"]  # nobody reads it
            criteria = StoppingCriteriaList([_StopWhenSet(cancelled)])
            return _generate(model, processor, inputs, gen_config, stopping_criteria=criteria)

        future = self.async_submit(run)
        try:
            # Shielded: the thread sets the result of a future that must not be cancelled by then.
            sequences = await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled.set()
            future.add_done_callback(asyncio.Future.exception)  # or asyncio complains that nobody looked
            raise
        except ValueError as error:
            raise RequestError(str(error)) from error
        input_len = inputs["input_ids"].shape[-1]
        generated = sequences[0, input_len:]
        return processor.decode(generated, skip_special_tokens=True), input_len, generated


def _generate(model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, **kwargs: Any) -> torch.Tensor:
    # Moved here and not earlier: requests that wait should not take the accelerator's memory.
    inputs = with_free_memory_after_failure(inputs.to, model.device)
    options = {"generation_config": gen_config, "tokenizer": processor.tokenizer, **kwargs}
    return with_free_memory_after_failure(model.generate, **inputs, **options)


class ServingGenerationState(GenerationState):
    """As in transformers, with [`ServingGenerateManager`]; continuous batching is for language models alone there."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> ServingGenerateManager:
        """Get the manager of a model.

        Args:
            model_id (`str`): The model.
            use_cb (`bool`): Not used.

        Returns:
            [`ServingGenerateManager`]: Always the same one.
        """
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = ServingGenerateManager()
        return self._generate_managers[model_id]  # type: ignore[return-value]
