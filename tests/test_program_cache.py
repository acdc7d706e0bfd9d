"""Compiled programs between commands."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparsezoo_jax import cli, program_cache


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """jax as it is where a user has set nothing, with the cache directory in `tmp_path`."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("SPARSEZOO_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "programs" / program_cache.processor()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiles(factor):
    jax.jit(lambda x: jnp.sin(x) * factor)(1.0)


def test_a_command_keeps_its_programs(unset, monkeypatch):
    monkeypatch.setattr(program_cache, "WORTH", 0.0)
    cli.run(lambda args: compiles(0.123), [])
    kept = sorted(path.name for path in unset.glob("*-cache"))
    assert kept
    assert jax.config.jax_compilation_cache_max_size == program_cache.LIMIT
    # Nothing is looked up or written within a command that should not, and the flag is not the command's.
    cli.run(lambda args: compiles(0.456) if args == ["RUN"] else 1 / 0, ["RUN", "--no-compilation-cache"])
    assert sorted(path.name for path in unset.glob("*-cache")) == kept
    assert jax.config.jax_enable_compilation_cache


def test_what_a_user_has_set_stays(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    program_cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_several_processes_keep_none(unset):
    program_cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(unset)
    program_cache.keep_none_of_several_processes()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_can_not_be_written(unset, tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file")
    cli.run(lambda args: None, [])
    assert capsys.readouterr().err == (
        f"warning: compiled programs are not kept: {tmp_path}/cache can't be written to"
        " (--no-compilation-cache asks for that without a warning)\n"
    )
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("SPARSEZOO_CACHE", "ftp://somewhere")
    cli.run(lambda args: None, [])  # commands that use it say what is wrong
    assert jax.config.jax_compilation_cache_dir is None


def test_processors_are_told_apart(monkeypatch):
    here = program_cache.processor()
    assert here == program_cache.processor()
    monkeypatch.setattr(program_cache.platform, "machine", lambda: "another")
    assert program_cache.processor() != here
