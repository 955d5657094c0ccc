from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from prefixd_server.http.spool import Spool


def fill_and_die(parent: Path) -> None:
    (Spool(parent).path / "upload").write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_has_a_folder_of_its_own_and_removes_it(tmp_path: Path) -> None:
    first, second = Spool(tmp_path), Spool(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])
    (first.path / "upload").mkdir()
    first.close()
    first.close()
    assert list(tmp_path.iterdir()) == [second.path]
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_swept_by_the_next(tmp_path: Path) -> None:
    living = Spool(tmp_path)
    (living.path / "upload").write_bytes(b"half of it")
    killed = multiprocessing.get_context("fork").Process(target=fill_and_die, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2

    new = Spool(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living.path, new.path])
    assert [path.name for path in living.path.iterdir()] == ["upload"]
    living.close()
    new.close()


def test_what_is_not_a_spool_stays(tmp_path: Path) -> None:
    other, link = tmp_path / "somebody-elses", tmp_path / "prefixd-spool-link"
    other.mkdir()
    (other / "file").touch()
    link.symlink_to(other)
    Spool(tmp_path).close()
    assert (other / "file").exists()
    assert sorted(tmp_path.iterdir()) == sorted([other, link])
