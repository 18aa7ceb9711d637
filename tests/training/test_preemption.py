"""A notice to a process on its own: heeded between two pieces of work, and only while a run goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2_jax.errors import Preempted
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training import loop
from mplug2_jax.training.checkpoints import Checkpoints
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.loop import train
from mplug2_jax.training.preemption import PreemptionNotice
from mplug2_jax.training.telemetry import read_metrics, read_steps
from tests.runs import small_run


def test_a_notice_is_heeded_at_the_next_check_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as notice:
        notice.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            notice.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_is_a_notice_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with PreemptionNotice(interrupts=True) as notice:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Preempted):
            notice.check()
        with pytest.raises(Preempted, match="nothing"):
            notice.may_leave("nothing is lost")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), PreemptionNotice():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("signals", "free", "status", "said"),
    [
        ([signal.SIGTERM], True, 75, "mplug2: nothing is lost\n"),
        ([signal.SIGINT], True, 75, "mplug2: nothing is lost\n"),
        ([signal.SIGINT, signal.SIGINT], False, 130, "mplug2: interrupted twice: ended at once"),
    ],
)
def test_a_process_that_compiles_ends_at_once(
    signals: list[signal.Signals], free: bool, status: int, said: str, tmp_path: Path
) -> None:
    """Held up in a library that does not come back to Python, as XLA's compiler does."""
    script = (
        "import hashlib\nfrom pathlib import Path\nfrom mplug2_jax.training.preemption import PreemptionNotice\n"
        "with PreemptionNotice(interrupts=True) as notice:\n"
        f"    notice.may_leave({'nothing is lost' if free else None!r})\n"
        f"    notice.release = Path({str(tmp_path / 'released')!r}).touch\n"
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
        assert "Ctrl-C again ends at once" in process.stderr.readline()  # two at a time would be one
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert said in err
    assert (tmp_path / "released").exists()


def test_no_thread_waits_for_the_other_processes_when_a_run_has_ended() -> None:
    """One that was inside JAX's client when Python ended aborted the process: status 134 after a good run."""
    script = (
        "import threading, jax\nfrom mplug2_jax.launch.local import free_port\n"
        "from mplug2_jax.training.preemption import PreemptionNotice\n"
        "jax.distributed.initialize(f'127.0.0.1:{free_port()}', 1, 0)\n"
        "with PreemptionNotice(interrupts=True) as notice:\n"
        "    for said in ('nothing is lost', None, 'nothing is lost'):\n        notice.may_leave(said)\n"
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
def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(
        streams={"text": small_run().streams["text"]}, evaluations={}, mesh=MeshConfig(fsdp=8), log_examples=True,
        checkpoint=CheckpointConfig(every_steps=100),
    )  # fmt: skip
    made = loop.device_batches

    def told_while_step_three_is_made(*args, **kwargs):
        for i, item in enumerate(made(*args, **kwargs)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patched:
        patched.setattr(loop, "device_batches", told_while_step_three_is_made)
        with pytest.raises(Preempted, match=r"told to end, with step [123] of 4 saved"):
            train(run, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", run.checkpoint, writes=False)
    (saved,) = checkpoints.steps()
    checkpoints.close()
    written = [line["step"] for line in read_steps(tmp_path / "metrics.jsonl")]
    assert written == list(range(1, saved + 1))

    capsys.readouterr()
    train(run, tmp_path)
    assert f"resuming from step {saved}\n" in capsys.readouterr().out
    assert [line["step"] for line in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(tmp_path / "examples.jsonl")] == [1, 2, 3, 4]
    assert all(len(line["text"]) == 8 for line in read_metrics(tmp_path / "examples.jsonl"))
