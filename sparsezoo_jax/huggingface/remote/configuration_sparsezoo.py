"""Configuration of a model that sparsezoo_jax trained, as transformers reads it from `config.json`."""

from transformers import PretrainedConfig


class SparseZooConfig(PretrainedConfig):
    """A decoder composed of one attention, one feed-forward and one residual kind.

    The sizes bear transformers' usual names. What the parts are made of stands in one object each, with the fields that
    sparsezoo_jax has: `attention`, `ffn` (of all layers, or of those after `first_layers`, which have `first_ffn`),
    `residual`, `norm` and `adapter`; their "kind" names the class in `modeling_sparsezoo.py`.
    """

    model_type = "sparsezoo"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        attention=None,
        ffn=None,
        first_layers=0,
        first_ffn=None,
        residual=None,
        norm=None,
        adapter=None,
        layer_pattern=("global",),
        embedding_scale=1.0,
        learned_positions=False,
        logit_divisor=1.0,
        final_softcap=None,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.attention = attention
        self.ffn = ffn
        self.first_layers = first_layers
        self.first_ffn = first_ffn
        self.residual = residual
        self.norm = norm
        self.adapter = adapter
        # "global" layers see all tokens before them, "local" ones a window; repeated from the first layer on.
        self.layer_pattern = list(layer_pattern)
        self.embedding_scale = embedding_scale
        self.learned_positions = learned_positions
        self.logit_divisor = logit_divisor
        self.final_softcap = final_softcap
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
