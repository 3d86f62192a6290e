"""Train a small byte-level language model with transformers' Trainer, on the source of Python's library.

    python examples/trainer.py
    torchrun --nproc-per-node 2 examples/trainer.py          # DDP; with GPUs, add --fsdp to shard

The files under --out hold the averaged weights; --resume continues from the last checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer


class Bytes(Dataset):
    """Pieces of the bytes of some files."""

    def __init__(self, paths: list[Path], length: int) -> None:
        text = b"".join(path.read_bytes() for path in paths)
        whole = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.pieces = whole[: len(whole) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[: options.files]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    args = TrainingArguments(
        options.out,
        lr_scheduler_type="constant",  # and learning_rate stays as it is: there is none to choose
        max_steps=options.steps,
        per_device_train_batch_size=16,
        weight_decay=0.1,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(options.steps // 5, 1),
        save_steps=max(options.steps // 5, 1),
        load_best_model_at_end=True,
        use_cpu=not torch.accelerator.is_available(),  # or accelerate would not join processes on a CPU
        fsdp=options.fsdp,
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if options.fsdp else None,
    )
    trainer = ProdigyPlusTrainer(
        LlamaForCausalLM(config),
        args,
        train_dataset=Bytes(paths[1:], length=128),
        eval_dataset=Bytes(paths[:1], length=128),
        optimizer_options={"step_size": "balance"},
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
