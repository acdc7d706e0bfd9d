"""Settings that must hold before jax is imported, and the corpus that several test modules share."""

import gc
import os
import random
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that run within a test process must not have it keep all memory that it frees: see `keep_freed_memory`.
os.environ.setdefault("MALLOC_ARENA_MAX", "16")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # for several test processes that compile for TPUs
# Nearly all of the suite's time is XLA compiling small programs that then run for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Of what is left, a module a processor and MLIR's code for fusions take most. A flag that XLA doesn't know ends the
# process, and newer ones have no other code for fusions.
_flags = ["--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
# Several tests, test processes and commands compile the same large ones: they share a cache, which is gone after the
# run. To write small ones takes longer than to compile the few again that are wanted again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
_xla_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _xla_cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsezoo-xla-")

# The collector of reference cycles looks through all that jax has cached in earlier tests: a tenth of the suite's time.
gc.set_threshold(20_000, 20, 20)

WORDS = ["the", "state", "of", "union", "is", "strong", "and", "peace", "will", "follow", "where", "law", "congress"]


def pytest_unconfigure():
    """Remove what only this process, not one of its workers, made."""
    if _xla_cache:
        shutil.rmtree(_xla_cache, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first, so that no long one is left to a single process at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module")
def optimised():
    """For tests of what a compiler makes of a program: all its optimisations, in commands too, and no persistent cache.

    A compiler for a device that is not there can write to that cache, but not read from it.
    """
    import jax

    plainly, cached = jax.config.read("jax_disable_most_optimizations"), jax.config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_enable_compilation_cache", False)
        yield
        jax.config.update("jax_disable_most_optimizations", plainly)
        jax.config.update("jax_enable_compilation_cache", cached)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One cache of prepared corpora for the session; nothing goes to the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="session")
def _use_shared_cache(shared_cache):
    before = os.environ.get("SPARSEZOO_CACHE")
    os.environ["SPARSEZOO_CACHE"] = str(shared_cache)
    yield
    if before is None:
        del os.environ["SPARSEZOO_CACHE"]
    else:
        os.environ["SPARSEZOO_CACHE"] = before


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Sixty short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(60):
        sentences = (" ".join(draw.choices(WORDS, k=9)).capitalize() for _ in range(12))
        (folder / f"{i:02}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory, small_corpus):
    """A run of a small dense decoder that was never trained, with a tokenizer of 300 tokens."""
    from flax import nnx

    import sparsezoo_jax
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.models import Decoder
    from sparsezoo_jax.training.parameters import save_params
    from sparsezoo_jax.training.state import ModelTemplate, flatten

    changes = {
        "model.vocab_size": 300,
        "model.d_model": 32,
        "model.layers": 1,
        "model.layer_pattern": ["global"],
        "model.max_seq_len": 64,
        "model.attention.heads": 2,
        "model.attention.kv_heads": 1,
        "model.attention.head_dim": 16,
        "model.ffn.d_ff": 64,
        "data.bpe_vocab_size": 300,
        "data.seq_len": 32,
        "data.dataset": str(small_corpus),
    }
    config = sparsezoo_jax.preset("dense", "tiny", changes)
    directory = tmp_path_factory.mktemp("text") / "run"
    template = ModelTemplate(lambda rngs: Decoder(config.model, rngs=rngs))
    params, state = template.split(Decoder(config.model, rngs=nnx.Rngs(0)))
    # Larger than they start, so that what is likeliest depends on the text.
    save_params(directory / "checkpoints", {path: 4 * x for path, x in flatten(params).items()}, flatten(state))
    data.open_tokenizer(config.data).save(directory)
    run_dir.write_config(directory, config)
    return directory
