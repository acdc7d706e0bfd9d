"""One of two processes that train the toy: `python -m training.lost_process ID PORT WORKDIR VICTIM SIGNAL [LOCAL]`.

The victim sends itself the signal before its fifth step. Checkpoints are saved every two steps, below LOCAL if given.
"""

import os
import sys
from pathlib import Path

import jax

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.training.loop import fit
from sparsezoo_jax.training.peers import Peers, join
from sparsezoo_jax.training.phases import Phases, Watchdog, end_process

from .toy import BATCH, LENGTH, ToyData, ToyModel, config

TIMEOUT = 8.0


def main(number, port, workdir, victim, signal, local=None):
    saving = {"local_checkpoints": local, "local_checkpoint_every": 2, "checkpoint_every": 0}
    join(f"127.0.0.1:{port}", 2, number, 300.0)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(axes, shape):
        spec = [axis if (axis := {"batch": "data"}.get(name)) else None for name in axes]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    class Dying(ToyData):
        def __next__(self):
            if number == victim and self.n == 4:
                os.kill(os.getpid(), signal)
            return super().__next__()

    phases = Phases()
    peers = Peers(phases, TIMEOUT)
    try:
        with Watchdog(phases, TIMEOUT, peers.explain), peers:
            result = fit(
                config(steps=40, **(saving if local else {"checkpoint_every": 2})),
                build=ToyModel,
                data=Dying(batch=BATCH // 2),
                batch_shape=(BATCH, LENGTH),
                workdir=workdir,
                place=place,
                phases=phases,
            )
    except UserError as error:
        end_process(str(error))
    print(f"ended after step {result.step}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
