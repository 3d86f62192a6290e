"""What the defaults of transformers' Trainer cost against ``ProdigyPlusTrainer``: a table for the guide.

python benchmarks/trainer_defaults.py

A small Llama learns rows of words, each of which follows from the one before it, except for one in five. The
loss is that of the last saved file, on rows that it has not seen.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import Dataset

from prodigyplus_dist import ShardedProdigyPlusScheduleFree

WORDS, LENGTH, NOISE = 64, 16, 0.2
ROWS: dict[str, dict[str, Any]] = {
    "`ProdigyPlusTrainer`": {},
    "plain `Trainer`, constant rate, learning_rate=1": {"plain": True, "learning_rate": 1.0},
    "plain `Trainer`, linear schedule, learning_rate=1": {
        "plain": True,
        "learning_rate": 1.0,
        "lr_scheduler_type": "linear",
    },
    "plain `Trainer`, its defaults: linear schedule, learning_rate=5e-5": {
        "plain": True,
        "lr_scheduler_type": "linear",
    },
}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of words, most of which follow from the one before."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(WORDS, (rows, LENGTH), generator=generator)
        kept = torch.rand(rows, LENGTH, generator=generator) > NOISE
        for column in range(1, LENGTH):
            following = (self.words[:, column - 1] * 5 + 1) % WORDS
            self.words[:, column] = torch.where(kept[:, column], following, self.words[:, column])

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index]}


def saved_loss(
    options: dict[str, Any], seed: int, steps: int, *, plain: bool = False, **changed: Any
) -> float:
    """Train a model, and evaluate the file that was saved."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            **{"lr_scheduler_type": "constant", **changed},
            max_steps=steps,
            per_device_train_batch_size=16,
            weight_decay=0.1,
            save_strategy="no",
            logging_strategy="no",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        data = Rows(16 * steps, seed=100 + seed)
        if plain:
            # lr as the Trainer passes it to its own optimisers.
            given = ShardedProdigyPlusScheduleFree, {"lr": args.learning_rate, **options}
            trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=given)
        else:
            trainer = ProdigyPlusTrainer(model, args, train_dataset=data, optimizer_options=options)
        trainer.train()
        trainer.save_model(str(Path(folder) / "saved"))
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "saved").eval()
    rows = Rows(1024, seed=1).words
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--step-size", default="balance")
    options = parser.parse_args()
    torch.set_num_threads(1)
    floor = NOISE * math.log(WORDS) - (1 - NOISE) * math.log(1 - NOISE) - NOISE * math.log(NOISE)
    print(
        f"{options.step_size}, {options.steps} steps, {options.seeds} seed(s); nothing can be much below "
        f"{floor:.2f}.\n"
    )
    print("| | loss |\n|---|--:|")
    for name, how in ROWS.items():
        given = {"step_size": options.step_size}
        loss = fmean(saved_loss(given, seed, options.steps, **how) for seed in range(options.seeds))
        print(f"| {name} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
