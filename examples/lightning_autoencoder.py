"""A Lightning module trained without a learning rate or a schedule: an autoencoder of made-up pictures.

pip install ".[lightning]"
python examples/lightning_autoencoder.py
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from prodigyplus_dist.integrations.lightning import ScheduleFreeCallback


def pictures(count: int, seed: int) -> TensorDataset:
    """Bright spots on 8 × 8 pixels, of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    x, y, width = torch.rand(3, count, 1, 1, generator=generator)
    row, column = torch.arange(8.0)[:, None] / 7, torch.arange(8.0) / 7
    spots = torch.exp(-((row - y).square() + (column - x).square()) / (0.02 + 0.1 * width)).flatten(1)
    return TensorDataset((spots - spots.mean()) / spots.std())


class Autoencoder(pl.LightningModule):
    """Compresses 64 pixels to 6 numbers."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 6))
        self.decoder = nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 64))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decoder(self.encoder(pixels))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self(batch[0]) - batch[0]).square().mean()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)  # at the average x, thanks to the callback

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # No learning rate, no scheduler. It is the same on one process, under DDP and under FSDP2.
        return ShardedProdigyPlusScheduleFree(self.parameters(), step_size="balance")


def main() -> float:
    """Train, and return the mean square error of the best checkpoint on pictures that it has not seen."""
    pl.seed_everything(1)
    train = DataLoader(pictures(2048, seed=1), batch_size=32, shuffle=True)
    validation, test = (DataLoader(pictures(512, seed), batch_size=512) for seed in (2, 3))
    best = ModelCheckpoint(monitor="val_loss", save_last=True)
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[ScheduleFreeCallback(), best],
        enable_progress_bar=False,
        default_root_dir="runs/lightning",  # metrics.csv has prodigyplus/d beside the loss
    )
    trainer.fit(Autoencoder(), train, validation)
    trained = Autoencoder.load_from_checkpoint(best.best_model_path)  # x, ready to be used
    return trainer.test(trained, test)[0]["val_loss"]


if __name__ == "__main__":
    error = main()
