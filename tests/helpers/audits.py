"""Small models to compare."""

import torch
from torch import nn

from vitfast import testing


class Block(nn.Module):
    """Norm, product, an activation that is no module, product."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))

    def activation(self, x):
        return nn.functional.gelu(x)


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Dropout(0.5), nn.Linear(16, 10))
    return model.to(testing.device(), dtype).eval()


def only(report):
    (output,) = report.outputs
    return output


def constant(value):
    return lambda x: value
