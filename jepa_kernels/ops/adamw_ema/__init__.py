"""adamw_ema: an AdamW step and the teacher's moving average in one pass over a list of
parameters."""

from .api import adamw_ema_
from .teacher import TeacherLists

__all__ = ["TeacherLists", "adamw_ema_"]
