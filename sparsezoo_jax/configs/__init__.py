"""Presets: one module per architecture, one literal per preset."""
