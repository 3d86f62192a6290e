"""Runs torchtitan's debug model with our optimiser, on CPUs; test_torchtitan.py reads the results.

    torchrun --standalone --nproc-per-node 4 tests/integrations/torchtitan_run.py --tp 2 --out FOLDER

Every rank writes FOLDER/rank-N.json; checkpoints are in folders next to it.
"""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan_on_cpu  # noqa: F401
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import BaseLogger
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

from prodigyplus_dist.integrations.torchtitan import Optimizers, with_prodigyplus

MIDDLE, END, LONG = 2, 4, 6
"""Steps after which runs are resumed, end, and of the one that is not interrupted."""


def make_assets(folder: Path) -> None:
    """Write a tokenizer of bytes, and a dataset of a few pages of text."""
    (folder / "data").mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with (folder / "data" / "data.json").open("w") as file:
        for page in range(64):
            words = (
                f"{(page * 7 + word * word) % 97} squared is {((page * 7 + word * word) % 97) ** 2}"
                for word in range(40)
            )
            file.write(json.dumps({"text": ". ".join(words)}) + "\n")


def base(out: Path, arguments: argparse.Namespace):
    """torchtitan's own configuration of its debug model, made small enough for one core."""
    config = llama3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.hf_assets_path = str(out / "assets")
    config.dataloader = replace(config.dataloader, dataset_path=str(out / "assets" / "data"))
    config.validator = replace(config.validator, dataloader=replace(config.dataloader), steps=2, enable=True)
    config.training = replace(
        config.training,
        seq_len=64,
        local_batch_size=2,
        steps=END,
        mixed_precision_param="float32",
        disable_cuda_graphs=True,
    )
    config.parallelism = replace(
        config.parallelism,
        tensor_parallel_degree=arguments.tp,
        # With this FSDP2 keeps what an evaluation has gathered, which training must then not use.
        fsdp_reshard_after_forward="never",
        spmd_backend="partial_dtensor",  # the default, "spmd_types", needs a torch later than 2.13
    )
    config.debug.seed = 0
    return config


class Recorder(BaseLogger):
    """Keeps what a logger would receive."""

    def __init__(self):
        self.losses, self.validation, self.numbers = {}, {}, {}

    def log(self, metrics, step):
        if "validation_metrics/loss" in metrics:
            self.validation[step] = metrics["validation_metrics/loss"]
        else:
            self.losses[step] = metrics["loss_metrics/global_avg_loss"]
            self.numbers[step] = {k: v for k, v in metrics.items() if k.startswith("prodigyplus/")}


def digest(*trees) -> str:
    """A hash of all tensors' bits on this rank, and of all other values."""
    sha = hashlib.sha256()
    for tree in trees:
        for key, value in sorted(tree.items()):
            value = value.to_local() if isinstance(value, DTensor) else value
            sha.update(key.encode())
            if isinstance(value, torch.Tensor):
                sha.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                sha.update(repr(value).encode())
    return sha.hexdigest()


def built(config):
    trainer = config.build()
    trainer.metrics_processor.logger = Recorder()
    return trainer


def whole(state):
    """A state dict with every tensor gathered."""
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in state.items()}


def weights(trainer):
    return {k: v for part in trainer.model_parts for k, v in part.state_dict().items()}


def averages(trainer):
    """The averaged weights x, by the optimiser itself."""
    with trainer.optimizers.optimizers[0].averaged_parameters():
        return whole(weights(trainer))


def trained(config):
    """Make a run; return its trainer, what was logged, and a hash of its weights and optimiser state."""
    trainer = built(config)
    trainer.train()
    record = trainer.metrics_processor.logger
    result = {
        "losses": record.losses,
        "validation": record.validation,
        "numbers": record.numbers,
        "digest": digest(weights(trainer), trainer.optimizers.state_dict()),
    }
    return trainer, result


def saved_by_dcp(path: Path, like):
    read = {k: torch.empty_like(v) for k, v in like.items()}
    dcp.load(read, checkpoint_id=path)
    return read


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def stages(out: Path):
    """Let every rank be a pipeline stage of two model parts, without torchtitan's schedules."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def parts_of(stage):
        torch.manual_seed(stage)
        return [
            nn.ModuleDict({f"layer{2 * stage + part}": nn.Linear(4 + stage, 5 + part)}) for part in range(2)
        ]

    def steps_(optimizer, stages):
        for step in range(4):
            for stage in stages:
                generator = torch.Generator().manual_seed(100 * stage + step)
                for part in parts[stage]:
                    for p in part.parameters():
                        p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()

    config = Optimizers.Config(
        options={"step_size": "balance", "d0": 1e-5, "fused": False},
        groups={"^layer0": {"weight_decay": 0.1}},
    )

    def container():
        built = config.build(model_parts=parts[rank])
        built.build_(dist.group.WORLD)
        return built

    parts = [parts_of(stage) for stage in range(ranks)]
    optimizers = container()
    steps_(optimizers, [rank])
    dcp.save({"optimizer": optimizers}, checkpoint_id=out / "stages")
    result = {
        "d": optimizers.scalars()["d/1"],
        "groups": [len(group["params"]) for group in optimizers.optimizers[0].param_groups],
        "digest": digest(optimizers.state_dict()),
    }

    # A new container that loads the state; and one that has the parameters of all stages.
    parts = [parts_of(stage) for stage in range(ranks)]
    again = container()
    dcp.load({"optimizer": again}, checkpoint_id=out / "stages")
    result["again"] = digest(again.state_dict())
    parts = [parts_of(stage) for stage in range(ranks)]
    one = config.build(model_parts=[part for stage in parts for part in stage])
    one.build_(None)
    steps_(one, range(ranks))
    result["d of one optimiser"] = one.scalars()["d/1"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    arguments = parser.parse_args()
    out = arguments.out
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        make_assets(out / "assets")
    dist.barrier()

    stock = base(out, arguments)
    ours = with_prodigyplus(stock, step_size="balance", d0=1e-5, weight_decay=0.01)
    results = {"stages": stages(out)}

    def variant(name, ours=ours, *, steps=END, validate=0, **checkpoint):
        return replace(
            ours,
            dump_folder=str(out / name),
            training=replace(ours.training, steps=steps),
            validator=replace(ours.validator, enable=bool(validate), freq=validate or 1),
            checkpoint=replace(
                ours.checkpoint,
                **{"enable": True, "interval": MIDDLE, "last_save_model_only": False, **checkpoint},
            ),
        )

    # A run that is neither interrupted nor evaluated.
    _, results["long"] = trained(variant("long", steps=LONG, enable=False))

    # A run with evaluations that stops at END; resumed from the middle, and from the end.
    _, results["stopped"] = trained(variant("stopped", validate=2))
    _, results["from the middle"] = trained(variant("stopped", validate=2, load_step=MIDDLE, load_only=True))
    _, results["from the end"] = trained(variant("stopped", steps=LONG, load_only=True))

    # Runs that save the trained model.
    middle = str(out / "stopped" / "checkpoint" / f"step-{MIDDLE}")
    start = {"initial_load_path": middle, "initial_load_model_only": False}
    trainer, results["exported"] = trained(
        variant("exported", validate=END, last_save_model_only=True, **start)
    )
    x, y = averages(trainer), whole(weights(trainer))
    saved = saved_by_dcp(out / "exported" / "checkpoint" / f"step-{END}", x)
    results["exported"].update(
        {"is x": equal(saved, x), "x is not y": all(not torch.equal(x[k], y[k]) for k in x)}
    )

    hf = {"last_save_model_only": True, "last_save_in_hf": True}
    trainer, results["hf"] = trained(variant("hf", **hf, **start))
    wanted = Llama3StateDictAdapter(trainer.model_config, None).to_hf(averages(trainer))
    dist.barrier()
    (file,) = (out / "hf" / "checkpoint" / f"step-{END}").glob("*.safetensors")
    saved = load_file(file)
    results["hf"]["is x"] = equal(saved, wanted)

    # Muon, and several groups.
    options = {"step_size": "balance", "d0": 1e-5}
    for name, ours in {
        "muon": with_prodigyplus(stock, muon=True, **options),
        "groups": with_prodigyplus(
            stock, groups={"norm": {"weight_decay": 0.0}}, weight_decay=0.1, **options
        ),
    }.items():
        trainer, results[name] = trained(variant(name, ours))
        groups = trainer.optimizers.optimizers[0].param_groups
        results[f"{name} groups"] = [len(group["params"]) for group in groups]
        results[f"{name} share a mean"] = [group["split_groups_mean"] for group in groups]
        _, results[f"{name} from the middle"] = trained(variant(name, ours, load_step=MIDDLE, load_only=True))

    # torchtitan's own validation of the saved model.
    config = replace(stock, dump_folder=str(out / "again"))
    config.checkpoint = replace(
        config.checkpoint, enable=True, initial_load_path=str(out / "exported" / "checkpoint" / f"step-{END}")
    )
    trainer = built(config)
    trainer.checkpointer.load()
    trainer.validator.validate(trainer.model_parts, END)
    results["stock validation"] = trainer.metrics_processor.logger.validation[END]

    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
