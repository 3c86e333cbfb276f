"""What others get: checkpoints that load with and without diffx, their cards, and how they are uploaded."""

from .auto import AutoScheduler
from .degrade import from_pretrained, save_pretrained, upgrade
from .publish import Published, push_to_hub, write_repository

__all__ = ["AutoScheduler", "Published", "from_pretrained", "push_to_hub", "save_pretrained", "upgrade", "write_repository"]
