"""Distillation: a student learns from what a teacher says, beside the labels.

Reading order: `logits` (losses on the outputs).
"""

from jopt.distillation.logits import soft_target_loss as soft_target_loss
