"""transformers' Trainer, with what MG-LLaVA's training has beyond others."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import clear_incomplete, last_complete_checkpoint, mark_complete
from .errors import TrainingError
from .sampler import ModalityLengthSampler

logger = logging.getLogger(__name__)

# Of the collator; the model does not take them.
_NOT_INPUTS = ("sample_ids", "skipped_samples")


class MGLlavaTrainer(Trainer):
    """Trains MG-LLaVA.

    Beyond [`Trainer`]:

    - `train_sampling_strategy="group_by_length"` groups by modality and length, see [`ModalityLengthSampler`]; the
      dataset needs `lengths`.
    - A checkpoint that was not saved to its end is never resumed from, and older ones are only deleted after that.
    - A loss that is NaN or infinite stops the training, with the ids of the samples.
    - Tokens and images per second and the greatest memory of a GPU are logged beside the loss.

    Args:
        *args: See the base class; `data_collator` is an [`MGLlavaDataCollator`] with `return_sample_ids=True`.
        **kwargs: See the base class.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sample_ids: list[str] = []
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._device_tokens: torch.Tensor | None = None
        self._counting_since = time.perf_counter()
        self.skipped_samples = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(lengths, batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # In order: where there is nothing to learn, there is nothing to group for.
        return SequentialSampler(eval_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._sample_ids = inputs.get("sample_ids", [])
        self._counts[2] += inputs.get("skipped_samples", 0)
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        # Keys and values of all layers, which nobody reads.
        return {**prepared, "use_cache": False}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a batch forward and backward.

        Args:
            model (`torch.nn.Module`): The model.
            inputs (`dict`): The batch.
            *args: See the base class.
            **kwargs: See the base class.

        Returns:
            `torch.Tensor`: The loss.

        Raises:
            TrainingError: If the loss is NaN or infinite. The weights are those of the step before.
        """
        # Summed on the device, so that nothing waits for it before the next log.
        tokens = inputs["attention_mask"].sum()
        self._device_tokens = tokens if self._device_tokens is None else self._device_tokens + tokens
        self._counts[1] += len(inputs.get("num_boxes", ()))
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            names = ", ".join(self._sample_ids) or "unknown (the collator needs return_sample_ids=True)"
            raise TrainingError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, with the samples {names}. Look at "
                "these; if they are in order, lower `learning_rate` or use bf16 in place of fp16. Resume from the "
                "last checkpoint."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write to the log, with the speed since the last time.

        Args:
            logs (`dict`): What to write.
            start_time (`float`, *optional*): See the base class.
        """
        if "loss" in logs and self._device_tokens is not None:
            self._counts[0] = self._device_tokens.double().cpu()
            total = self.accelerator.reduce(self._counts.to(self.args.device, torch.float32), "sum")
            tokens, images, skipped = total.tolist()
            seconds = max(time.perf_counter() - self._counting_since, 1e-9)
            logs |= {"tokens_per_second": round(tokens / seconds, 1), "images_per_second": round(images / seconds, 2)}
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            self.skipped_samples += int(skipped)
            if self.skipped_samples:
                logs["skipped_samples"] = self.skipped_samples
            self._counts.zero_()
            self._device_tokens = None
            self._counting_since = time.perf_counter()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, see [`Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint, or `True` for the last one that is
                whole.
            *args: See the base class.
            **kwargs: See the base class.

        Returns:
            `TrainOutput`: See the base class.

        Raises:
            TrainingError: If there is no checkpoint that is whole.
        """
        if resume_from_checkpoint is True:
            checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise TrainingError(f"No checkpoint in {self.args.output_dir} is whole: there is nothing to resume.")
            resume_from_checkpoint = str(checkpoint)
        self._counting_since = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        checkpoint = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clear_incomplete(checkpoint)
        self.accelerator.wait_for_everyone()
        # The base class deletes old checkpoints before this one can be called whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


__all__ = ["MGLlavaTrainer"]
