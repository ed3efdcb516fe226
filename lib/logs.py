"""Sends the numbers of a training to TensorBoard or Weights & Biases while it goes on (`--log`)."""

from lib.common import RANK, UserError

LOGS = "tensorboard", "wandb"


def open_log(kind, folder, flags):
    """Returns report(name, step, values), which sends the numbers `values` {column: number} to the service `kind`, or
    nowhere if it is None. A run has the name of its folder, and `flags` as its configuration."""
    if kind is None or RANK:
        return lambda name, step, values: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError:
        raise UserError(f"--log {kind} needs a package: pip install {kind}") from None
    if kind == "tensorboard":
        writer = SummaryWriter(folder)

        def report(name, step, values):
            for column, value in values.items():
                writer.add_scalar(f"{name}/{column}", value, step)
            writer.flush()

    else:
        names = dict(project="world-models", name=str(folder), id=str(folder).replace("/", "-"))
        run = wandb.init(**names, dir=folder, config=flags, resume="allow", reinit="finish_previous")

        def report(name, step, values):
            run.define_metric(f"{name}/*", step_metric=f"{name}/step")  # V, M and C count steps of their own
            run.log({f"{name}/{column}": value for column, value in {**values, "step": step}.items()})

    return report
