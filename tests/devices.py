"""Devices of processes that tests start."""

import os


def with_devices(count: int) -> str:
    """XLA's flags for this many devices on one host, and for the tests."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
