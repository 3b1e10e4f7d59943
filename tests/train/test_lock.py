"""Two processes never write one folder, and no training goes on when its parent was killed."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

import killed
from adarankgrad.train import TrainConfig, UserError, train
from adarankgrad.train.child import ChildPool, Job
from adarankgrad.train.lock import LOCK_NAME, locked


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hold(folder):
    with locked(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_living_one_is_not(tmp_path):
    folder = tmp_path / "run"
    owner = killed.start(hold, folder)
    wait_for((folder / "held").exists)
    in_use = pytest.raises(UserError, match=rf"in use by another process \({owner.pid}\)")
    with in_use, locked(folder):
        pass
    owner.kill()
    owner.join()
    assert (folder / LOCK_NAME).exists()
    with locked(folder):
        assert (folder / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert [path.name for path in folder.iterdir()] == ["held"]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_in_use_is_refused_and_stays_as_it_is(how, settings):
    config = TrainConfig.from_settings(settings())
    with locked(Path(config.output)):
        with pytest.raises(UserError, match="is in use by another process"):
            train(config, **how)
        assert [path.name for path in Path(config.output).iterdir()] == [LOCK_NAME]


def test_a_request_that_is_refused_leaves_no_folder(settings, tmp_path):
    for output in ("run", "new/parents/run"):
        with pytest.raises(UserError, match="none.txt"):
            train(TrainConfig.from_settings(settings(output, data="none.txt")))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    from adarankgrad.train import lock

    first, real = [], lock._lock

    def remove_once(handle, path):
        real(handle, path)
        if not first:
            first.append(path.unlink())

    monkeypatch.setattr(lock, "_lock", remove_once)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).exists()
        with pytest.raises(UserError), locked(tmp_path / "run"):
            pass


LIVES_ON = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(200)"


def run_child(pid_file):
    ChildPool().run([Job([sys.executable, "-Sc", LIVES_ON, str(pid_file)])], lambda *_: None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's end")
def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    parent = killed.start(run_child, pid_file)
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    os.kill(pid, 0)
    parent.kill()
    parent.join()
    wait_for(lambda: not is_running(pid))


def is_running(pid):
    """Whether a process is there and no zombie, which nobody may be there to collect."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
