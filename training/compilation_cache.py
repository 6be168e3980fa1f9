"""Enables JAX's persistent compilation cache."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import jax

# Programs that compile in less time are not worth a file.
MIN_SECONDS = 0.1


def enable(platform: str) -> None:
    """Enables the cache, in ``$XDG_CACHE_HOME/agd-jax`` or ``~/.cache/agd-jax``.

    Does nothing if JAX has a cache folder already (``$JAX_COMPILATION_CACHE_DIR``), if the cache is
    disabled (``$JAX_ENABLE_COMPILATION_CACHE``), if the folder cannot be written, or on CPUs that
    cannot use cached programs.

    Args:
      platform: the kind of the devices: "cpu", "gpu" or "tpu".
    """
    config: Any = jax.config  # Its flags are declared at run time.
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "agd-jax"
    if platform == "cpu":
        machine = reusing_cpu()
        if machine is None:
            return
        folder /= machine
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def reusing_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Returns a name shared by CPUs with the same instructions; None if programs cannot be reused.

    XLA rejects cached programs for Intel CPUs, with many lines of output (jax-ml/jax#38445), and
    can crash on those for Apple CPUs.
    """
    if sys.platform != "linux" or not cpuinfo.exists():
        return None
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = facts.get("flags") or facts.get("Features")  # on x86 and on ARM
    if flags is None or facts.get("vendor_id") == "GenuineIntel":
        return None
    return f"cpu-{hashlib.sha256(flags.encode()).hexdigest()[:16]}"
