import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

import sparsezoo_jax
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.train import train
from sparsezoo_jax.training.lease import LEASE, Lease, Owner, RunInUseError


def write(directory, owner):
    (directory / LEASE).write_text(json.dumps(asdict(owner)))


def test_one_holder_at_a_time(tmp_path):
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "run")
    first.acquire()
    message = rf"--workdir={tmp_path}/run: process {os.getpid()} on .* trains there; wait for it or stop it"
    with pytest.raises(RunInUseError, match=message) as caught:
        second.acquire()
    assert caught.value.exit_status == 1
    with pytest.raises(RunInUseError, match=message):
        second.refuse_taken()
    first.check()
    first.release()
    second.refuse_taken()
    second.acquire()
    second.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lease_of_a_process_that_is_gone_is_taken_over(tmp_path):
    code = f"""
import os, pathlib, signal
from sparsezoo_jax.training.lease import Lease
Lease(pathlib.Path({str(tmp_path)!r})).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = Owner(**json.loads((tmp_path / LEASE).read_text()))
    lease = Lease(tmp_path)
    lease.acquire()
    lease.release()
    # The same number belongs to another process by now.
    write(tmp_path, replace(left, pid=os.getpid()))
    lease = Lease(tmp_path)
    lease.acquire()
    lease.check()
    lease.release()


def test_a_lease_cut_short_by_a_crash_of_the_machine_is_none(tmp_path):
    (tmp_path / LEASE).write_text("")
    lease = Lease(tmp_path)
    lease.acquire()
    lease.check()


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_elsewhere_is_watched(tmp_path, lives, capsys):
    write(tmp_path, replace(Owner.here(), host="elsewhere", pid=17))
    ended = threading.Event()

    def touch():
        while lives and not ended.wait(0.02):
            os.utime(tmp_path / LEASE)

    thread = threading.Thread(target=touch)
    thread.start()
    lease = Lease(tmp_path, stale_seconds=0.4)
    try:
        if lives:
            with pytest.raises(RunInUseError, match="process 17 on elsewhere trains there"):
                lease.acquire()
        else:
            lease.acquire()
            lease.check()
    finally:
        ended.set()
        thread.join()
    assert "watching 0 s whether process 17 on elsewhere still runs" in capsys.readouterr().err


def test_a_holder_shows_that_it_lives_and_notices_what_it_lost(tmp_path):
    lease = Lease(tmp_path, touch_seconds=0.02)
    lease.acquire()
    os.utime(tmp_path / LEASE, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / LEASE).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LEASE).stat().st_mtime > 0
    write(tmp_path, replace(Owner.here(), host="elsewhere"))
    with pytest.raises(RunInUseError, match=r"lost the directory to process .* on elsewhere"):
        lease.check()
    lease.release()
    assert (tmp_path / LEASE).exists(), "the new owner's lease is not removed"


def test_of_many_starters_one_gets_a_stale_lease(tmp_path):
    write(tmp_path, replace(Owner.here(), started="0"))
    leases, refused = [Lease(tmp_path) for _ in range(8)], []

    def take(lease):
        try:
            lease.acquire()
        except RunInUseError:
            refused.append(lease)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    (holder,) = set(leases) - set(refused)
    holder.check()
    holder.release()


def test_a_second_starter_is_told_before_it_reads_anything(tmp_path):
    """Neither the corpus nor the checkpoints, which the first one changes."""
    first = Lease(tmp_path)
    first.acquire()
    config = sparsezoo_jax.preset("dense", "tiny", {"data.dataset": str(tmp_path / "no corpus")})
    with pytest.raises(RunInUseError, match="trains there"):
        train(config, tmp_path)
    first.release()
    with pytest.raises(UserError, match="no corpus"):
        train(config, tmp_path)
