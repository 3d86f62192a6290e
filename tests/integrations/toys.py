"""Small models and data to train with the frameworks; nothing is downloaded."""

import torch
from torch.utils.data import Dataset

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = 32


def language_model(dropout=0.2):
    """A Llama with dropout in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS,
        max_position_embeddings=16,
        attention_dropout=dropout,
        num_key_value_heads=2,
        **SIZES,
    )
    return LlamaForCausalLM(config)


class Rows(Dataset):
    """Rows of words; most words follow from the one before, the others are random."""

    def __init__(self, rows, seed=0, noise=0.2, length=12):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(WORDS, (rows, length), generator=generator)
        kept = torch.rand(rows, length, generator=generator) > noise
        for column in range(1, length):
            words[:, column] = (
                torch.where(kept[:, column], words[:, column - 1] * 5 % WORDS + 1, words[:, column]) % WORDS
            )
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
    """Let accelerate shard on CPUs: it does so only for GPUs, so it is told that there are several.

    ``fully_shard`` and gloo are the real ones; only what a GPU would do is not tested.
    """
    import os

    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def tokenizer():
    """A tokenizer with a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<eos>", *(f"w{number}" for number in range(WORDS - 3))]
    whole = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def text_dataset(rows=16):
    """Texts of these words, in the form that TRL takes."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"text": " ".join(f"w{word % (WORDS - 3)}" for word in row.tolist())} for row in Rows(rows).words]
    )


def batches(steps=8, rows=4):
    """The arguments for a language model, step by step."""
    words = Rows(steps * rows).words.view(steps, rows, -1)
    return [{"input_ids": batch, "labels": batch} for batch in words]


def diffusion():
    """A network that removes noise from small images, and one that encodes their description."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return unet, CLIPTextModel(config)


def images(steps=8, rows=4):
    """Small images, and words that say where they are bright."""
    torch.manual_seed(2)
    words = torch.randint(2, 8, (steps, rows, 4))
    bright = torch.zeros(steps, rows, 1, 8, 8)
    for step in range(steps):
        for row in range(rows):
            bright[step, row, 0, words[step, row, 0]] = 1.0
    return list(zip(bright, words, strict=True))


def diffusion_loss(unet, text_encoder, batch):
    """The loss of predicting the noise that was added to images."""
    from diffusers import DDPMScheduler

    pictures, words = batch
    noise, times = torch.randn_like(pictures), torch.randint(1000, (len(pictures),))
    noisy = DDPMScheduler().add_noise(pictures, noise, times)
    guess = unet(noisy, times, encoder_hidden_states=text_encoder(words)[0]).sample
    return torch.nn.functional.mse_loss(guess, noise)
