"""Fixtures for the service's tests: one shared real service, and fresh ones where a test breaks things."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = []
if sys.version_info < (3, 11):
    collect_ignore_glob = ["test_*.py"]  # the service's packages need Python 3.11
else:
    import service as services
    from service import Service

ARTEFACTS = Path(os.environ.get("STATECODEC_ARTEFACTS", "build/artefacts"))


@pytest.fixture(scope="session", autouse=True)
def compile_kernels_once(kernels):
    """All services share compiled kernels."""
    services.KERNELS = kernels


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    """A running service with one worker and the fast double of the library."""
    with Service(tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A running service with the library itself."""
    with Service(tmp_path_factory.mktemp("real") / "data", backend="statecodec") as running:
        yield running


@pytest.fixture(scope="session")
def second_token(service):
    """Another tenant of the shared service."""
    return service.add_token("second")


@pytest.fixture
def client(service):
    """A client of the shared service."""
    with service.client() as found:
        yield found


@pytest.fixture
def fresh(tmp_path):
    """Starts services of a test's own; all are stopped at its end."""
    started = []

    def start(ready=True, **settings):
        one = Service(tmp_path / f"data{len(started)}", **settings)
        started.append(one)
        return one.start(ready=ready)

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def artefacts():
    """A folder for what CI keeps."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    return ARTEFACTS
