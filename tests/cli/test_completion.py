"""The script that ``mplug2 completion`` prints completes what people type, in a real shell."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Outcome

TYPED = {
    ("tr",): {"train"},
    ("convert", "i"): {"import", "inspect"},
    ("train", "--wo"): {"--workdir"},
    ("completion", ""): {"bash", "zsh", "tcsh"},
    ("train", "--config", "pre"): {"pretrain"},
    ("train", "--config", "min"): {"mine.py"},
    ("eval", "--task", "msrvtt_q"): {"msrvtt_qa"},
    ("data", "show", "dem"): {"demo"},
    ("train", "--workdir", "r"): {"runs"},
    ("report", "r"): {"runs"},
    ("convert", "verify", "m"): {"mine.py"},
    ("data", "sample", "--out", ""): {"runs"},
}
COMPLETE = """
source "$1"
complete -p mplug2 >/dev/null || exit 1
while read -ra COMP_WORDS; do
  [ "${COMP_WORDS[-1]}" = '""' ] && COMP_WORDS[-1]=""
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  "$(complete -p mplug2 | sed 's/.*-F \\([^ ]*\\).*/\\1/')" mplug2
  echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_recipes_and_paths(mplug2: Callable[..., Outcome], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(mplug2("completion", "bash").out)
    subprocess.run(["bash", "-n", script], check=True)
    here = tmp_path / "here"
    (here / "runs").mkdir(parents=True)
    (here / "mine.py").touch()
    lines = "".join(f"mplug2 {' '.join(word or chr(34) * 2 for word in words)}\n" for words in TYPED)
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", script], cwd=here, input=lines, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(zip(TYPED, (set(line.split()) for line in done.stdout.splitlines()), strict=True))
    assert found == TYPED


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_with_every_command(shell: str, mplug2: Callable[..., Outcome]) -> None:
    done = mplug2("completion", shell)
    assert (done.status, done.err) == (0, "")
    assert all(word in done.out for word in ("train", "workdir", "tokenizer"))
