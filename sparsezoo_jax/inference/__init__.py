"""Decoding: the key/value cache, sampling and the token loop."""
