"""Compiling steps for devices that are not there, and reading what the compiler says about them."""
