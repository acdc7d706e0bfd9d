"""What the interpretability of features is measured on, and by whom."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.storage import RUN_STORES, require_place

JudgeName = Literal["endpoint", "tokens", "ngrams", "similarity", "oracle", "constant", "coin", "noisy_oracle"]
Task = Literal["detection", "fuzzing"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InterpretEvaluation:
    """Features, their windows of text, and the judge."""

    layer: int | None = None
    """Layer whose FFN features are explained, from 1; none is the one at three quarters of the depth."""
    sae: str | None = None
    """Directory of an autoencoder (see sparsezoo_jax.sae) whose features are explained in place of a layer's FFN's."""
    judge: JudgeName = "tokens"
    """endpoint: a language model behind an OpenAI-compatible API. tokens, ngrams, similarity: surrogates without one.
    oracle, constant, coin, noisy_oracle: stubs that check the measurement itself."""
    tasks: tuple[Task, ...] = ("detection", "fuzzing")
    """detection: is the feature active in this window? fuzzing: are the marked tokens those that activate it?"""
    features: int = 50
    """Features to explain, drawn from those that are active in enough windows."""
    contexts: int = 256
    """Sequences of the split to read."""
    window: int = 32
    """Tokens in a window."""
    train_windows: int = 20
    """Activating windows from which a feature is explained."""
    test_windows: int = 100
    """Activating windows to test on, as many from each tenth of the activations, and as many that don't activate."""
    min_windows: int = 200
    """Activating windows that a feature needs."""
    shown_at_once: int = 5
    """Windows that the judge is asked about at a time."""
    seed: int = 0
    """Seed of features, windows and marks."""
    base_url: str | None = None
    """Address of the endpoint, such as http://localhost:8000/v1; none is $OPENAI_BASE_URL. Its key: $OPENAI_API_KEY."""
    model: str | None = None
    """Model that the endpoint is asked for."""

    def __post_init__(self):
        require_place("interpret.sae", self.sae, schemes=RUN_STORES)
        for name in ("features", "contexts", "window", "train_windows", "test_windows", "shown_at_once"):
            require(getattr(self, name) > 0, f"interpret.{name}", getattr(self, name), "must be above 0")
        require(self.layer is None or self.layer >= 1, "interpret.layer", self.layer, "must be at least 1")
        require(self.test_windows % 10 == 0, "interpret.test_windows", self.test_windows, "must be a multiple of 10")
        least = self.train_windows + self.test_windows
        require(
            self.min_windows >= least,
            "interpret.min_windows",
            self.min_windows,
            f"must be at least train_windows + test_windows = {least}",
        )
        require(bool(self.tasks), "interpret.tasks", "", "must name at least one task")
        asks = self.judge == "endpoint"
        require(not asks or self.model is not None, "interpret.model", self.model, "must be given for judge=endpoint")
