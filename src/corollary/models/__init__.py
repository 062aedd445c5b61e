"""Small reference networks, all plain ``nn.Module``: the same start, shapes and names in every claim.

Each has ``features(x)`` (what the last layer sees), ``head`` (that layer), ``num_features``, and second derivatives.
"""

from corollary.models.ctr import DCN, DeepFM, FieldEmbedding
from corollary.models.gpt import GPT
from corollary.models.mlp import MLP
from corollary.models.resnet import ResNet
from corollary.models.vit import ViT

__all__ = ["MLP", "ResNet", "ViT", "GPT", "DeepFM", "DCN", "FieldEmbedding"]
