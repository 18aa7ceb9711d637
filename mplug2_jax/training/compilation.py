"""Compiled programs that outlive their process."""

from pathlib import Path

import jax

AUTOMATIC = Path("~/.cache/mplug2_jax/xla")


def keep_compiled(where: str) -> Path | None:
    """Keeps compiled programs in a folder, so that a restart does not compile again.

    Args:
        where: the config's ``compilation_cache``: a folder, "off", or "auto". On CPUs "auto" keeps nothing: a home that
            several machines share would hand one the machine code of another.

    Returns:
        The folder, if programs are kept.
    """
    if where == "off" or (where == "auto" and jax.default_backend() == "cpu"):
        return None
    chosen = jax.config.values["jax_compilation_cache_dir"]  # by the environment
    if where == "auto" and chosen:
        return Path(chosen)
    folder = (AUTOMATIC if where == "auto" else Path(where)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
