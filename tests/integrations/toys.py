"""Small things to train with the frameworks; nothing is downloaded."""

import torch
from torch.utils.data import Dataset

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = 32


def language_model(dropout=0.2):
    """A Llama with dropout in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=16, attention_dropout=dropout, num_key_value_heads=2, **SIZES
    )
    return LlamaForCausalLM(config)


class Rows(Dataset):
    """Rows of words, of which each follows from the one before it, but for some."""

    def __init__(self, rows, seed=0, noise=0.2, length=12):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(WORDS, (rows, length), generator=generator)
        kept = torch.rand(rows, length, generator=generator) > noise
        for column in range(1, length):
            words[:, column] = torch.where(kept[:, column], words[:, column - 1] * 5 % WORDS + 1, words[:, column]) % WORDS
        self.words = words

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"input_ids": self.words[index], "labels": self.words[index]}


def loss_of(model, rows):
    """The loss of a model over all rows, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=rows.words, labels=rows.words).loss.item()
    model.train(was_training)
    return loss


def shard_on_cpu():
    """Let accelerate shard here: it does so for devices only, so it is told that it has got several.

    Their ``fully_shard`` and gloo are what they are; what is not tried is what a device does.
    """
    import os

    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
