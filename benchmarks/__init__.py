"""Measurements that the README and docs quote; each is `python -m benchmarks.NAME`."""
