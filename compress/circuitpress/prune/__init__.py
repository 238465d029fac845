"""Pruning: which neurons and key-value groups leave, what the others can make up for, and a smaller checkpoint."""

from .build import prune
from .compensate import compensate
from .drops import Drops, default_ladder, price_drops
from .select import Removal, removal_order

__all__ = ["Drops", "Removal", "compensate", "default_ladder", "price_drops", "prune", "removal_order"]
