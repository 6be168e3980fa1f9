import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from training import compilation_cache

ROOT = Path(__file__).parents[2]
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n"


@pytest.fixture
def restored():
    """JAX without a cache folder; gives it its options back."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    names += ("jax_persistent_cache_min_compile_time_secs",)
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_it_is_in_a_cache_folder_of_the_user(restored, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.enable("gpu")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "agd-jax")
    compilation_cache.enable("tpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    compilation_cache.enable("gpu")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "agd-jax")


def test_who_wants_none_has_none(restored):
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.enable("gpu")
    assert jax.config.jax_compilation_cache_dir is None


def test_each_kind_of_cpu_has_its_own_and_some_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    name = lambda text: compilation_cache.reusing_cpu(_file(tmp_path, text))
    amd = name(AMD)
    assert amd == name(AMD)
    assert amd.startswith("cpu-")
    assert name(AMD.replace("avx2", "avx512f")) != amd
    assert name("processor : 0\nFeatures : fp asimd\n").startswith("cpu-")
    assert name(AMD.replace("AuthenticAMD", "GenuineIntel")) is None
    assert compilation_cache.reusing_cpu(tmp_path / "nothing") is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert name(AMD) is None


def _file(folder, text):
    (folder / "cpuinfo").write_text(text)
    return folder / "cpuinfo"


@pytest.mark.slow
@pytest.mark.skipif(compilation_cache.reusing_cpu() is None, reason="XLA reuses none on this CPU")
def test_a_second_run_compiles_nothing(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_LOG_COMPILES": "1"}
    del env["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, ROOT / "train.py", "--platform", "cpu", "--epochs", "1"]
    hits, metrics = [], []
    for name in ("cold", "warm"):
        workdir = tmp_path / name
        run = subprocess.run(
            [*command, "--workdir", workdir], env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        hits.append(run.stderr.count("Persistent compilation cache hit for 'jit_steps'"))
        metrics.append((workdir / "metrics.jsonl").read_text().split('"seconds"')[0])
    assert hits == [0, 1]
    assert metrics[0] == metrics[1]
