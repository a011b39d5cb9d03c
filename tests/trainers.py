"""Trainers of a tiny student on twelve random samples."""

import torch
from torch.utils.data import DataLoader, Dataset

from tests.students import MODEL, make_batch
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.trainer import Trainer, TrainerConfig

NULL_TEXT = (torch.zeros(5, 24), torch.zeros(12))


class Encodings(Dataset):
    def __init__(self, size=12):
        self.batch = make_batch(size)

    def __len__(self):
        return len(self.batch)

    def __getitem__(self, index):
        names = ("latents", "t5_embeds", "clip_pooled")
        return {**{name: getattr(self.batch, name)[index] for name in names}, "index": index}


class Features:
    """Teachers of the same samples."""

    def __init__(self, batch):
        self.batch = batch

    def gather(self, local_indices, dataset_ids):
        assert (dataset_ids == 0).all()
        names = ("lune", "sol_stats", "sol_spatial", "lune_mask", "sol_mask")
        return {name: getattr(self.batch, name)[local_indices] for name in names}


def settings(directory, **changes):
    return TrainerConfig(
        **{
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "gradient_accumulation": 2,
            "lune_warmup_steps": 0,
            "sol_warmup_steps": 0,
            "ema_decay": 0.9,
            "checkpoint_dir": str(directory / "checkpoints"),
            "tensorboard_dir": str(directory / "logs"),
            "sample_dir": str(directory / "samples"),
            "save_every_steps": None,
            "log_every": 2,
            "dtype": torch.float32,
            **changes,
        }
    )


def make_trainer(directory, batch_size=3, **changes):
    torch.manual_seed(0)
    data = Encodings()
    trainer = Trainer(TinyFluxDeep(MODEL), settings(directory, **changes))
    loader = DataLoader(data, batch_size, shuffle=True)
    trainer.setup(loader, Features(data.batch), null_text=NULL_TEXT)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def shadow(trainer):
    return torch.cat([tensor.flatten() for tensor in trainer.ema.shadow.values()])
