"""The devices and processes of a run."""

import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import is_tensorboard_available


def make_accelerator(
    *, mixed_precision: str = "no", cpu: bool = False, tensorboard: str | os.PathLike | None = None
) -> Accelerator:
    """An Accelerator that shuffles by seed and epoch only, so that a continued run sees the same batches.

    Processes started by torchrun or another launcher form a group, also on CPUs.

    Args:
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: use the CPU even if there is a GPU.
        tensorboard: folder for TensorBoard logs of every epoch; ``None`` writes none.

    Raises:
        ImportError: ``tensorboard`` is given, but not installed.
        ValueError: the launcher started processes that cannot form a group on this device.
    """
    if tensorboard is not None and not is_tensorboard_available():
        raise ImportError("logs for TensorBoard need the package tensorboard: pip install tensorboard")
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu or not torch.accelerator.is_available(),  # accelerate groups CPU processes only if asked to
        log_with=None if tensorboard is None else "tensorboard",
        project_dir=tensorboard,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    if accelerator.num_processes < launched_processes():
        raise ValueError(
            f"{launched_processes()} processes were launched, but form no group on {accelerator.device.type}; run one, "
            "or give --device cpu (cpu=True)"
        )
    return accelerator


def launched_processes() -> int:
    """The number of processes that torchrun or another launcher started, including this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
