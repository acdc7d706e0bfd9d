"""The residual connection with a norm before the sublayer, after it, or both."""

from torch import nn

from .common import Norm, kind


@kind("residual", "pre_norm")
class PreNorm(nn.Module):
    """`x + scale * post_norm(sublayer(norm(x)))`."""

    def __init__(self, config, sublayer):
        super().__init__()
        form = config.residual
        self.scale = form["scale"]
        self.norm = Norm(config.hidden_size, **config.norm) if form["input_norm"] else None
        self.post_norm = Norm(config.hidden_size, **config.norm) if form["post_norm"] else None

    def forward(self, x, sublayer, routing):
        """The stream after the sublayer; `routing` is handed on as it came."""
        y = sublayer(x if self.norm is None else self.norm(x))
        if self.post_norm is not None:
            y = self.post_norm(y)
        return x + y * self.scale, routing
