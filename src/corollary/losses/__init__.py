"""Losses as ``nn.Module`` with ``reduction``, and as functions."""
