"""The Hub: checkpoints that load with and without diffx, and schedulers from repositories of their own."""

from .auto import AutoScheduler
from .degrade import from_pretrained, push_to_hub, save_pretrained, upgrade

__all__ = ["AutoScheduler", "from_pretrained", "push_to_hub", "save_pretrained", "upgrade"]
