"""PEFT's adapters on frozen and on quantised base models, and TRL's trainer."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations.processes import needs, processes
from tests.integrations.toys import Rows, batches, language_model, text_dataset, tokenizer


def adapted(base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    return get_peft_model(base, config)


def trained(model):
    from prodigyplus import ProdigyPlusScheduleFree

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ProdigyPlusScheduleFree(adapters, step_size="balance", d0=1e-2)
    optimizer.train()
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return optimizer


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=Rows(4, seed=9).words).logits


# Merging computes (W + BA)x instead of Wx + B(Ax): one more float32 rounding in each of a few layers, whose
# sums have 16 to 32 terms.
NEAR = {"rtol": 0, "atol": 1e-5}


@needs("peft")
@processes(1)
@pytest.mark.parametrize("how", ["eval", "train"])
def test_merging_takes_what_the_model_holds(how):
    model = adapted(language_model(dropout=0.0))
    optimizer = trained(model)
    y = logits(model)
    with optimizer.averaged_parameters():
        x = logits(model)
    assert (x - y).abs().max() > 100 * NEAR["atol"]
    if how == "eval":
        optimizer.eval()
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(merged, x if how == "eval" else y, **NEAR)  # in train mode y, unwarned


@needs("peft", "bitsandbytes")
@processes(1)
def test_a_base_of_four_bits(tmp_path):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    language_model(dropout=0.0).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits)
    packed = base.model.layers[0].self_attn.q_proj.weight
    assert packed.dtype == torch.uint8
    before = packed.clone()
    # In train mode, which here has no dropout either: in eval mode bitsandbytes packs the weights in another
    # way, on processors with instructions for bfloat16.
    model = adapted(base).train()

    @torch.no_grad()
    def loss(rows):
        return model(input_ids=rows.words, labels=rows.words).loss.item()

    start = loss(Rows(32))
    optimizer = trained(model)
    optimizer.eval()
    assert loss(Rows(32)) < start
    assert torch.equal(packed, before)


@needs("peft")
@processes(1)
def test_trainer_saves_adapters_and_goes_on(tmp_path):
    from safetensors.torch import load_file

    from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer
    from tests.integrations.test_huggingface import arguments, history, watch

    runs = []
    for resumed in (False, True):
        options = {"step_size": "balance", "d0": 1e-3}
        args = arguments(tmp_path / str(resumed), save_strategy="steps", save_steps=3)
        its = ProdigyPlusTrainer(
            adapted(language_model()), args, train_dataset=Rows(16), optimizer_options=options
        )
        seen = watch(its)
        its.train(resume_from_checkpoint=str(tmp_path / "False" / "checkpoint-3") if resumed else None)
        runs.append((its, seen))
    saved = load_file(tmp_path / "False" / "checkpoint-3" / "adapter_model.safetensors")
    x = {key.replace(".default", ""): value for key, value in runs[0][1].x[3].items()}
    assert saved
    assert all(torch.equal(value, x[key]) for key, value in saved.items())
    assert history(runs[1][0])[-3:] == history(runs[0][0])[-3:]
    # train() leaves x in the model, so merging is right.
    at_x = logits(runs[0][0].model)
    torch.testing.assert_close(logits(runs[0][0].model.merge_and_unload()), at_x, **NEAR)


@needs("peft", "trl")
@processes(1)
def test_sft_trainer(tmp_path):
    from peft import LoraConfig
    from safetensors.torch import load_file
    from trl import SFTConfig, SFTTrainer

    from prodigyplus_dist.integrations.huggingface import ProdigyPlusMixin
    from tests.integrations.test_huggingface import same, watch

    class Tuner(ProdigyPlusMixin, SFTTrainer): ...

    plain = {"max_steps": 4, "logging_steps": 1, "use_cpu": True, "report_to": "none", "bf16": False}
    args = SFTConfig(
        str(tmp_path),
        lr_scheduler_type="constant",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        **plain,
    )
    assert args.learning_rate not in (5e-5, 1.0)  # TRL has its own default, for which we also take lr = 1
    its = Tuner(
        language_model(),
        args,
        train_dataset=text_dataset(),
        eval_dataset=text_dataset(4),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        optimizer_options={"step_size": "balance", "d0": 1e-3},
    )
    seen = watch(its)
    its.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    x = {key.replace(".default", ""): value for key, value in seen.x[2].items()}
    assert saved
    assert all(torch.equal(value, x[key]) for key, value in saved.items())
    assert same(seen.ended, seen.x[4])
    assert same(seen.evaluated[2], seen.x[2])
    assert all("prodigyplus/d" in entry for entry in its.state.log_history if "loss" in entry)
    assert its.optimizer.optimizer.param_groups[0]["lr"] == 1.0
