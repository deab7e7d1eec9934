"""A small model to audit, and short ways to what an audit compares and says."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitfast import testing
from vitfast.diagnostics.report import Difference, Report


class Block(nn.Module):
    """Norm, product, an activation that is no module, product: [B, 16] -> [B, 16]."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))

    def activation(self, x):
        return nn.functional.gelu(x)


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks, dropout and a head, in eval mode: [B, 16] -> [B, 10], the same weights every time."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Dropout(0.5), nn.Linear(16, 10))
    return model.to(testing.device(), dtype).eval()


def only(report: Report) -> Difference:
    """The difference of the single output that a report has."""
    (output,) = report.outputs
    return output


def constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives `value` whatever goes in."""
    return lambda x: value
