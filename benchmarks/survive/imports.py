"""What the train command imports in its first seconds, for the process that `benchmarks.survive` forks others from.

None of these starts a thread or looks for devices, which a forked process could not use.
"""

import sparsezoo_jax.data
import sparsezoo_jax.evaluation
import sparsezoo_jax.evaluation.report
import sparsezoo_jax.run_dir
import sparsezoo_jax.train
import sparsezoo_jax.training.loop
import sparsezoo_jax.training.peers
import sparsezoo_jax.training.usual_writers  # noqa: F401
