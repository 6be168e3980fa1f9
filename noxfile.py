"""The tests on every Python and JAX that is supported.

``nox`` runs all of it, ``nox -s oldest -- tests/agd_jax`` one part of one. Flags after ``--`` go to
pytest. The interpreters have to be installed.
"""

import nox

nox.options.default_venv_backend = "venv"


def run_tests(session: nox.Session, *constraints: str) -> None:
    """Installs the project under the constraints, and runs the tests."""
    session.install(*constraints, "--editable", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def locked(session: nox.Session) -> None:
    """With what was tested before: JAX 0.10 on Python 3.11, and 0.12 on those after it."""
    run_tests(session, "--constraint", "requirements.lock")


@nox.session
def newest(session: nox.Session) -> None:
    """With the newest of everything."""
    run_tests(session)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """With the oldest of everything that pyproject.toml admits."""
    session.install("uv")
    lock = f"{session.create_tmp()}/oldest.lock"
    compile_ = ("uv", "pip", "compile", "pyproject.toml", "--quiet", "--output-file", lock)
    session.run(*compile_, "--extra", "dev", "--resolution", "lowest-direct")
    run_tests(session, "--constraint", lock)
