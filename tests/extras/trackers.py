"""--log-to wandb or tensorboard: what metrics.jsonl gets goes there too, where that package is installed."""
from data import LensError


def sender(name, folder):
    """-> a function that takes one row of metrics."""
    try:
        if name == "wandb":
            import wandb
            wandb.init(dir=str(folder), name=folder.name)
            return lambda row: wandb.log(row, step=row["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LensError(f"--log-to {name}: that package is not installed (pip install {name})") from None
    writer = SummaryWriter(folder)
    return lambda row: [writer.add_scalar(key, value, row["step"]) for key, value in row.items()]
