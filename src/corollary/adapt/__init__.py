"""Changing a pretrained model cheaply: adapters, merging, steering, continual learning and unlearning."""
