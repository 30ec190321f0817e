"""Settings: from the environment, checked, frozen."""

import pytest
from pydantic import ValidationError

from calmclip.service.settings import Settings


def test_names_are_nested_with_two_underscores(monkeypatch):
    monkeypatch.setenv("CALMCLIP_BATCH__MAX_SIZE", "16")
    monkeypatch.setenv("CALMCLIP_LOAD", "a-int8, b-float,")
    monkeypatch.setenv("CALMCLIP_SLO__LATENCY_MS", "80")
    monkeypatch.setenv("CALMCLIP_STORE", "")
    settings = Settings()
    assert settings.batch.max_size == 16
    assert settings.load == ("a-int8", "b-float")
    assert settings.slo.latency_ms == 80
    assert settings.store_url == "lancedb:data/collections"


def test_arguments_override_the_environment_and_settings_are_frozen(monkeypatch):
    monkeypatch.setenv("CALMCLIP_THREADS", "3")
    assert Settings().cores == 3
    assert Settings(threads=5).cores == 5
    with pytest.raises(ValidationError, match="deadline_ms"):  # `index` sets this setting
        Settings(deadline_ms=0)
    with pytest.raises(ValidationError):
        Settings().threads = 2
