"""The corpus `pysource`: the Python source of installed PyPI packages."""
