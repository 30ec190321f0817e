"""Schemathesis against /openapi.json of a running service: what fits it and what does not, every check there is.

The same cases at each run. ``make test-all`` makes many more of them.
"""

import re
import subprocess
import sys

import pytest

# Of what fits the schema some is refused for what no schema can say: bytes that are no picture, a word for a label
# set that is not there, a sum of tokens, two fields that exclude each other.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "413", "415", "422"]
"""


@pytest.fixture
def client(settings, serve, bundle_maker, tmp_path):
    """A service over the bundle that the specification's examples name."""
    bundle_maker(tmp_path / "named", "mini-int8")
    with serve(settings(bundles_dir=tmp_path / "named")) as client:
        yield client


@pytest.mark.parametrize(
    ("each", "least"), [(3, 1000), pytest.param(300, 5000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_service_does_what_it_says(client, tmp_path, each, least):
    """``each``: cases an operation and phase makes at most; ``least``: cases in all."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    specification = f"{client.base_url}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", specification]
    how = f"--mode all --checks all --max-examples {each} --seed 1 --generation-deterministic --continue-on-failure"
    quiet = "--suppress-health-check all --warnings off --no-color"
    command += [*how.split(), *quiet.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) generated, \1 passed", done.stdout)[1]) >= least
    answer = client.get("/metrics").text
    assert 'outcome="ok"' in answer
    assert 'outcome="error"' not in answer
