"""Optimizers and schedules with the interface of ``torch.optim``."""
