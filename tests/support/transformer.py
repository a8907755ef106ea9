"""A block of a transformer."""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width=64, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, 4, c // 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(n, t, c)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def relative(a, b):
    """Relative error of a vector."""
    return float((a - b).norm() / b.norm())
