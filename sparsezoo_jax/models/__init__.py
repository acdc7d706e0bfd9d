"""One decoder, composed of attention kinds, FFN kinds and residual kinds."""
