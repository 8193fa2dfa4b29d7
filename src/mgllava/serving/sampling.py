"""Token selection with penalties and biases as in OpenAI's API, and with a random generator for each request.

transformers samples with the generator of the process, which all requests would share: an answer would then depend on
other requests. Here a logits processor draws the token (Gumbel-max trick: the argmax of log-probabilities plus Gumbel
noise is a sample from them), and transformers, which decodes greedily, takes the highest score.
"""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .errors import RequestError
from .options import Options


def logits_processors(options: Options, prompt_length: int, seed: int) -> LogitsProcessorList:
    """Return logits processors with which greedy generation takes the tokens that the options ask for."""
    processors = LogitsProcessorList()
    if options.frequency_penalty or options.presence_penalty:
        processors.append(_Penalties(options.frequency_penalty, options.presence_penalty, prompt_length))
    if options.logit_bias:
        processors.append(_Bias(options.logit_bias))
    processors.append(_Check())
    if options.temperature > 0:
        processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p < 1:
            processors.append(TopPLogitsWarper(float(options.top_p)))
        if options.min_p:
            processors.append(MinPLogitsWarper(float(options.min_p)))
        if options.typical_p is not None and options.typical_p < 1:
            processors.append(TypicalLogitsWarper(float(options.typical_p)))
        processors.append(_Draw(seed))
    return processors


class _Penalties(LogitsProcessor):
    """Lowers the logits of tokens that the answer already has; as in OpenAI's API, the prompt does not count."""

    def __init__(self, frequency: float, presence: float, prompt_length: int):
        self._frequency, self._presence, self._prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_length :].to(scores.device)
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _Bias(LogitsProcessor):
    """Adds biases to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]):
        self._ids, self._values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Kept, so that only the first step moves them to the accelerator.
        self._ids, self._values = self._ids.to(scores.device), self._values.to(scores)
        return scores.index_add(1, self._ids, self._values.expand(len(scores), -1))


class _Check(LogitsProcessor):
    """Raises an error if no token can be chosen."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.max().item()
        if best == -float("inf"):
            raise RequestError(
                "The options must leave a token to choose, but they exclude all tokens.", "generation_config"
            )
        if not best < float("inf"):
            raise RuntimeError(f"The model computed {best} as a logit. Another dtype may help, for example float32.")
        return scores


class _Draw(LogitsProcessor):
    """Draws a token by giving it the highest score."""

    def __init__(self, seed: int):
        # On the CPU, so that a seed gives the same numbers on every device.
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator)
        noise.clamp_(min=torch.finfo(torch.float32).tiny)
        return scores.log_softmax(-1) - noise.log_().to(scores.device)


__all__ = ["logits_processors"]
