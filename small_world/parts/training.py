"""Train a part with transformers' Trainer, which evaluates it and resumes an interrupted training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

# Values that Trainer adds to the results of an evaluation.
_NOT_RESULTS = {"epoch", "runtime", "samples_per_second", "steps_per_second"}


def collate_pictures(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of `Pictures`; boxes are padded with 0, attributes with -1, captions (if any) with 0."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)

    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "boxes": padded("boxes", 0),
        "attributes": padded("attributes", -1),
    }
    if "caption_ids" in samples[0]:
        batch["caption_ids"] = padded("caption_ids", 0)
        captions = [torch.ones_like(sample["caption_ids"]) for sample in samples]
        batch["caption_mask"] = pad_sequence(captions, batch_first=True)
    return batch


def train_part(
    module: nn.Module,
    data: Any,
    test: Any,
    collator: Callable,
    checkpoints: Path,
    **arguments: Any,
) -> dict[str, float]:
    """Train a module whose forward returns `loss` and `counts`, and return loss and shares of right answers on `test`.

    `arguments` are those of `TrainingArguments`. An interrupted training is resumed from the folder `checkpoints`.
    """
    settings = {
        "output_dir": str(checkpoints),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.02,
        "max_grad_norm": 1.0,
        "per_device_eval_batch_size": 50,
        "eval_strategy": "epoch",
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 1,
        "bf16": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": "none",
        "seed": 0,
        **arguments,
    }
    trainer = Trainer(
        model=module,
        args=TrainingArguments(**settings),
        train_dataset=data,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=_shares,
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(last)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return {name: value for name, value in metrics.items() if name not in _NOT_RESULTS}


def _shares(prediction: EvalPrediction) -> dict[str, float]:
    """Turn counts of right answers into shares."""
    counts = prediction.predictions
    return {name: float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1)) for name, rows in counts.items()}


__all__ = ["collate_pictures", "train_part"]
