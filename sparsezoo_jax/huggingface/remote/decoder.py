"""The decoder: embedding, layers, final norm and logits, as transformers calls them."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .common import ACTIVATIONS, KINDS, Call, Norm, softcapped
from .configuration_sparsezoo import SparseZooConfig

#: What transformers calls the keys and values of earlier tokens: until 5.23 `past_key_values`, then `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Adapter(nn.Module):
    """`y + W_up act(W_down y + b_down) + b_up` after a sublayer (arXiv 1902.00751)."""

    def __init__(self, config):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.adapter["width"])
        self.up = nn.Linear(config.adapter["width"], config.hidden_size)
        self.activation = ACTIVATIONS[config.adapter["activation"]]

    def forward(self, y):
        return y + self.up(self.activation(self.down(y)))


class Layer(nn.Module):
    """Attention, then a feed-forward network, each in a residual connection."""

    def __init__(self, config, layer):
        super().__init__()
        layer_type = config.layer_pattern[layer % len(config.layer_pattern)]
        form = config.first_ffn if layer < config.first_layers else config.ffn
        residual = KINDS["residual", config.residual["kind"]]
        self.attention_residual = residual(config, "attention")
        self.attention = KINDS["attention", config.attention["kind"]](config, layer, layer_type)
        self.ffn_residual = residual(config, "ffn")
        self.ffn = KINDS["ffn", form["kind"]](config, form, layer)
        adapter, after = config.adapter["width"], config.adapter["after"]
        self.attention_adapter = Adapter(config) if adapter is not None and "attention" in after else None
        self.ffn_adapter = Adapter(config) if adapter is not None and "ffn" in after else None

    def forward(self, x, call):
        def attention(h):
            y = self.attention(h, call)
            return y if self.attention_adapter is None else self.attention_adapter(y)

        def ffn(h):
            y = self.ffn(h)
            return y if self.ffn_adapter is None else self.ffn_adapter(y)

        x, routing = self.attention_residual(x, attention, None)
        return self.ffn_residual(x, ffn, routing)[0]


class SparseZooPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config_class = SparseZooConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = [CACHE]

    def _init_weights(self, module):
        """New weights, as transformers draws them; the checkpoint's own recipe is that of its training run."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Norm):
            nn.init.constant_(module.weight, 0.0 if module.zero_centered else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if "scale" in name:
                    nn.init.ones_(parameter)
                else:
                    nn.init.normal_(parameter, std=std)
            for _, buffer in module.named_buffers(recurse=False):
                nn.init.zeros_(buffer)


class SparseZooModel(SparseZooPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, d) if config.learned_positions else None
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(d, **config.norm)
        routed = config.residual.get("masked_head", False)
        self.head = KINDS["head", config.residual["kind"]](config) if routed else None
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        past_key_values=None,
        **kwargs,
    ):
        """Final states [B, T, D].

        Args:
          input_ids: [B, T]; or `inputs_embeds` [B, T, D] before their scaling.
          attention_mask: [B, S], 0 for padding, earlier tokens in the cache included. None: there is no padding.
          position_ids: [B, T]; by default counted by `attention_mask`.
          cache, past_key_values: cache of earlier tokens, under either name.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(x.shape[0], past + x.shape[1], dtype=torch.long, device=x.device)
        if attention_mask.dim() != 2 or attention_mask.shape[1] != past + x.shape[1]:
            found, wanted = list(attention_mask.shape), [x.shape[0], past + x.shape[1]]
            raise ValueError(f"attention_mask is {found}, must be {wanted}: one number for each token, cached ones too")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        call = Call(position_ids, self._visible(attention_mask.bool(), past, x.shape[1]), cache)
        scale = config.hidden_size**0.5 if config.embedding_scale == "sqrt_d_model" else config.embedding_scale
        # The factor is rounded to the type of the activations, as it was in training.
        x = x * torch.tensor(scale, dtype=x.dtype, device=x.device)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        states = []
        for layer in self.layers:
            states.append(x)
            x = layer(x, call)
        x = self.norm(x) if self.head is None else self.head(x, self.norm)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )

    def _visible(self, real, past, length):
        """For each type of layer, booleans [B, 1, T, S]: keys before the query, no padding, within the window."""
        query = torch.arange(past, past + length, device=real.device)[:, None]
        key = torch.arange(past + length, device=real.device)
        earlier = key <= query
        found = {"global": real[:, None, None, :] & earlier}
        if "local" in self.config.layer_pattern:
            found["local"] = found["global"] & (query - key < self.config.attention["window"])
        return found


class SparseZooForCausalLM(SparseZooPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = SparseZooModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        past_key_values=None,
        **kwargs,
    ):
        """Logits [B, T, V], float32, of the token after each; with `labels` [B, T], the loss.

        Labels are the tokens themselves, -100 where there is no loss: they are shifted here. `logits_to_keep` above 0
        makes those of the last tokens only.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = out.last_hidden_state[:, keep] / self.config.logit_divisor
        logits = softcapped(self.lm_head(hidden).float(), self.config.final_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        earlier = {CACHE: out.get(CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **earlier)
