import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from couturier.components.errors import CouturierError, LineageError
from couturier.serving import warden
from couturier.serving.client import Client, ServiceError, bento_folder, serve_bento


def gone(pid, patience_s=20.0):
    end = time.monotonic() + patience_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_busy_port_is_one_sentence(made, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(CouturierError, match=rf"port {port} .*--port"),
            serve_bento(
                made.package.facts["tag"], port, bentoml_home=made.workspace.bentos, feedback=None, log=tmp_path / "log"
            ),
        ):
            pass


@pytest.mark.parametrize("tag", ["couturier", "couturier:latest/../..", "../x:y", "couturier:0000", "Couturier:1"])
def test_a_bento_that_is_not_there_is_one_sentence(made, tag):
    with pytest.raises(LineageError, match="no bento tag|not in the workspace"):
        bento_folder(made.workspace.bentos, tag)


def test_no_service_is_one_sentence():
    with pytest.raises(ServiceError, match="no answer from .*Is the service running") as caught:
        Client("127.0.0.1", 9).version()
    assert caught.value.status == 0 and not Client("127.0.0.1", 9).ready()


def test_a_bento_that_cannot_load_fails_at_once_with_its_own_words(made, tmp_path):
    tag = made.package.facts["tag"]
    broken = tmp_path / "home" / "bentos" / "couturier" / "broken"
    shutil.copytree(bento_folder(made.workspace.bentos, tag), broken)
    (broken / "src" / "model" / "version.json").unlink()
    began = time.monotonic()
    with (
        pytest.raises(ServiceError, match="could not load its model.*no bundle"),
        serve_bento("couturier:broken", bentoml_home=tmp_path / "home", feedback=None, log=tmp_path / "log"),
    ):
        pass
    assert time.monotonic() - began < 120


def test_the_warden_ends_grandchildren_with_sessions_of_their_own(tmp_path):
    """As BentoML's workers: a child in a new session survives its parent's death, but not the warden's."""
    note = tmp_path / "pid"
    child = textwrap.dedent(
        f"""
        import subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        worker = subprocess.Popen(sleeper, start_new_session=True)
        open({str(note)!r}, "w").write(str(worker.pid))
        time.sleep(600)
        """
    )
    keeper = textwrap.dedent(
        f"""
        import os, subprocess, sys, time
        command = [sys.executable, "-P", {str(Path(warden.__file__))!r}, sys.executable, "-c", {child!r}]
        subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read():
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
        """
    )
    done = subprocess.run([sys.executable, "-c", keeper], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(note.read_text())), "a server outlived the process that started it"


def test_the_warden_passes_the_exit_code_on():
    command = [sys.executable, "-P", str(Path(warden.__file__)), sys.executable, "-c", "import sys; sys.exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # the pipe stays open: nobody asks it to end
        assert process.wait(timeout=60) == 7


def test_the_service_listens_on_loopback_only_and_ends_with_the_block(made, tmp_path):
    with serve_bento(
        made.package.facts["tag"], bentoml_home=made.workspace.bentos, feedback=None, log=tmp_path / "log"
    ) as served:
        family = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
        heard = {c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}
        pids = [process.pid for process in family]
        assert len(pids) >= 3
        with pytest.raises(ServiceError, match="COUTURIER_FEEDBACK") as caught:
            served.client.feedback(user_id="a", item_id="item/01", kind="like")
        assert caught.value.status == 404
    assert all(gone(pid) for pid in pids)
    assert os.path.getsize(tmp_path / "log") > 0
