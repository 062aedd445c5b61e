"""Small reference networks, all plain ``nn.Module``."""
