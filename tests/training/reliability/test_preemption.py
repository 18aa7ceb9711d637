"""Preemption of a single process: it stops between two units of work, and only while a run is active."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2_jax.errors import Preempted
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training import loop
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.loop import train
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.telemetry.metric_log import read_step_lines, read_train_metrics
from tests.runs import small_run


def test_a_notice_raises_at_the_next_check_and_the_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as notice:
        notice.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            notice.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_a_notice_if_requested() -> None:
    before = signal.getsignal(signal.SIGINT)
    with PreemptionNotice(interrupts=True) as notice:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Preempted, match=r"^SIGINT: exiting"):
            notice.check()
        with pytest.raises(Preempted, match=r"^SIGINT: nothing to save$"):
            notice.allow_exit("nothing to save")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), PreemptionNotice():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("signals", "exit_allowed", "status", "message"),
    [
        ([signal.SIGTERM], True, 75, "SIGTERM: nothing to save\n"),
        ([signal.SIGINT], True, 75, "SIGINT: nothing to save\n"),
        ([signal.SIGINT, signal.SIGINT], False, 130, "second SIGINT: exiting at once; earlier checkpoints are"),
    ],
)
def test_a_process_that_compiles_exits_at_once(
    signals: list[signal.Signals], exit_allowed: bool, status: int, message: str, tmp_path: Path
) -> None:
    """The process is inside a library call that does not return to Python, as in XLA's compiler."""
    script = (
        "import hashlib\nfrom pathlib import Path\n"
        "from mplug2_jax.training.reliability.preemption import PreemptionNotice\n"
        "with PreemptionNotice(interrupts=True) as notice:\n"
        f"    notice.allow_exit({'nothing to save' if exit_allowed else None!r})\n"
        f"    notice.on_exit = Path({str(tmp_path / 'exited')!r}).touch\n"
        "    print('ready', flush=True)\n    hashlib.pbkdf2_hmac('sha512', b'', b'', 2**31 - 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signals[0])
    for number in signals[1:]:
        assert "Ctrl-C again to exit at once" in process.stderr.readline()  # two signals at once would be merged
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert message in err
    assert (tmp_path / "exited").exists()


def test_no_thread_polls_the_other_processes_after_a_run() -> None:
    """A thread inside JAX's client when Python ended aborted the process: status 134 after a good run."""
    script = (
        "import threading, jax\nfrom mplug2_jax.launch.local import find_free_port\n"
        "from mplug2_jax.training.reliability.preemption import PreemptionNotice\n"
        "jax.distributed.initialize(f'127.0.0.1:{find_free_port()}', 1, 0)\n"
        "with PreemptionNotice(interrupts=True) as notice:\n"
        "    for message in ('exiting', None, 'exiting'):\n        notice.allow_exit(message)\n"
        "    print(*(thread.name for thread in threading.enumerate()))\n"
        "print(*(thread.name for thread in threading.enumerate()))\n"
    )
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, env=cpu)
    assert done.returncode == 0, done.stderr
    during, after = done.stdout.splitlines()
    assert "notices" in during
    assert "notices" not in after


@pytest.mark.slow
def test_a_preempted_run_saves_its_step_and_resumes_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = small_run(
        streams={"text": small_run().streams["text"]}, evaluations={}, mesh=MeshConfig(fsdp=8), log_example_ids=True,
        checkpoint=CheckpointConfig(every_steps=100),
    )  # fmt: skip
    load_batches = loop.device_batches

    def preempt_while_loading_step_three(*args, **kwargs):
        for i, item in enumerate(load_batches(*args, **kwargs)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patched:
        patched.setattr(loop, "device_batches", preempt_while_loading_step_three)
        with pytest.raises(Preempted, match=r"^SIGTERM: saved step [123] of 4, exiting"):
            train(run, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", run.checkpoint, read_only=True)
    (saved,) = checkpoints.steps()
    checkpoints.close()
    written = [line["step"] for line in read_train_metrics(tmp_path / "metrics.jsonl")]
    assert written == list(range(1, saved + 1))

    caplog.set_level(logging.INFO, logger="absl")
    train(run, tmp_path)
    assert f"resuming from step {saved}" in caplog.messages
    assert [line["step"] for line in read_train_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_step_lines(tmp_path / "examples.jsonl")] == [1, 2, 3, 4]
    assert all(len(line["text"]) == 8 for line in read_step_lines(tmp_path / "examples.jsonl"))
