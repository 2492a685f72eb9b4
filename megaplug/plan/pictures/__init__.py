"""Pictures of a plan as PNG, with their numbers as JSON beside. matplotlib is imported when one is drawn."""

from __future__ import annotations

from megaplug.plan.pictures.memory_bars import draw_memory
from megaplug.plan.pictures.predicted import Point, draw_predicted

__all__ = ["Point", "draw_memory", "draw_predicted"]
