"""Schemathesis against /openapi.json of a running service: valid and invalid requests, with all its checks.

The cases are the same in each run. ``make test-slow`` makes many more, and covers every value of every field.
"""

import re
import subprocess
import sys

import pytest

# Some requests match the schema and are still refused: a schema cannot express that bytes are a picture, that a
# classifier exists, the sum of tokens, or that two fields exclude each other. OpenAI's routes answer 400 then.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "409", "413", "415", "422"]
"""


@pytest.fixture
def client(settings, serve, bundle_maker, tmp_path):
    """A service over the bundle that the specification's examples name."""
    bundle_maker(tmp_path / "named", "mini-int8")
    with serve(settings(bundles_dir=tmp_path / "named")) as client:
        yield client


@pytest.mark.parametrize(
    ("phases", "each", "least"),
    [
        ("examples,fuzzing,stateful", 10, 300),
        pytest.param("examples,coverage,fuzzing,stateful", 300, 8000, marks=pytest.mark.slow),
    ],
    ids=["few", "many"],
)
def test_the_service_conforms_to_its_specification(client, tmp_path, phases, each, least):
    """``each``: maximum number of cases per operation and phase; ``least``: minimum number of all cases."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    specification = f"{client.base_url}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", specification]
    how = f"--mode all --checks all --phases {phases} --max-examples {each} --continue-on-failure"
    same = "--seed 1 --generation-deterministic"
    quiet = "--suppress-health-check all --warnings off --no-color"
    command += [*how.split(), *same.split(), *quiet.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) generated, \1 passed", done.stdout)[1]) >= least
    answer = client.get("/metrics").text
    assert 'outcome="ok"' in answer
    assert 'outcome="error"' not in answer
