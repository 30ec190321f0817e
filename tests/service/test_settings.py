"""Settings: from the environment, checked, frozen."""

import pytest
from pydantic import ValidationError

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.service.app import create_app
from calmclip.service.settings import Settings, from_environment
from tests.test_compose import settings_there


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


def test_instruction_sets_to_leave_out_must_exist(monkeypatch):
    monkeypatch.setenv("CALMCLIP_OPS_WITHOUT", "avx2, dotprod,")
    assert from_environment().ops_without == ("avx2", "dotprod")
    monkeypatch.setenv("CALMCLIP_OPS_WITHOUT", "avx2,sse9")
    with pytest.raises(BadRequest, match=r"CALMCLIP_OPS_WITHOUT is .*'sse9' is no instruction set"):
        from_environment()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("CALMCLIP_KEYZ", "CALMCLIP_KEYS"), ("CALMCLIP_LIMITS__TOPK", "CALMCLIP_LIMITS__TOP_K"),
        ("CALMCLIP_QUEUE_MAX_PENDING", "CALMCLIP_QUEUE__MAX_PENDING"), ("CALMCLIP_API_KEYS", "CALMCLIP_API_KEY"),
        ("calmclip_keys", "CALMCLIP_KEYS"), ("Calmclip_Keys", "CALMCLIP_KEYS"),
        ("CALMCLIP_PORT", None), ("CALMCLIP_", None), ("CALMCLIP_KEYS_SERVICE", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["", "8080"])
def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch, name, nearest, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadRequest, match=rf"there is no setting {name};") as error:
        from_environment()
    assert (f"did you mean {nearest}?" if nearest else "") in str(error.value)


def test_the_verbs_and_the_app_refuse_an_unknown_variable(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("calmclip.service.cli._listen", lambda *_: pytest.fail("it listens"))
    monkeypatch.setenv("CALMCLIP_KEYZ", "keys.json")
    index = ["index", str(tmp_path), "--collection", "c"]
    for arguments in (["serve"], index, [*index, "--url", "http://127.0.0.1:9"]):
        assert main(arguments) == 2
        assert "did you mean CALMCLIP_KEYS?" in capsys.readouterr().err
    with pytest.raises(BadRequest, match="CALMCLIP_KEYZ"):
        create_app()


def test_known_variables_are_accepted(monkeypatch):
    for name, default in settings_there().items():
        if name != "CALMCLIP_KEYS":
            monkeypatch.setenv(name, "" if default in ((), None) else str(default))
    for name in ("CALMCLIP_API_KEY", "CALMCLIP_IMAGE"):  # no settings, but ours
        monkeypatch.setenv(name, "x")
    # as Kubernetes sets them in the pods beside the Services calmclip and calmclip-postgres
    for name in ("CALMCLIP", "CALMCLIP_POSTGRES"):
        monkeypatch.setenv(f"{name}_SERVICE_HOST", "10.96.0.7")
        monkeypatch.setenv(f"{name}_SERVICE_PORT", "80")
        monkeypatch.setenv(f"{name}_SERVICE_PORT_HTTP", "80")
        monkeypatch.setenv(f"{name}_PORT", "tcp://10.96.0.7:80")
        monkeypatch.setenv(f"{name}_PORT_80_TCP", "tcp://10.96.0.7:80")
        monkeypatch.setenv(f"{name}_PORT_80_TCP_ADDR", "10.96.0.7")
    assert from_environment() == Settings()


@pytest.mark.parametrize("value", ["", " ", "/nowhere/keys.json", "/"])
def test_keys_that_are_set_never_leave_the_service_open(monkeypatch, bundles, value):
    """An empty value comes from an unset variable in a compose file, or from an empty secret."""
    monkeypatch.setenv("CALMCLIP_KEYS", value)
    monkeypatch.setenv("CALMCLIP_BUNDLES_DIR", str(bundles))
    with pytest.raises(BadRequest, match="CALMCLIP_KEYS is empty" if value == "" else "cannot be read"):
        create_app()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("DEADLINE_MS", "GRACE_S", "IDLE_UNLOAD_S", "RELOAD_S", "BATCH__MAX_WAIT_MS",
                                     "SLO__LATENCY_MS", "SLO__TARGET") for value in ("inf", "nan", "-1")),
        ("DEADLINE_MS", "1e300"), ("THREADS", "-5"), ("THREADS", "100000"), ("URL_HOSTS", "*"), ("METRICS_PORT", "0"),
        ("LIMITS", '{"top_k": null}'), ("LIMITS", '{"topk": 3}'),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(monkeypatch, name, value):
    monkeypatch.setenv(f"CALMCLIP_{name}", value)
    with pytest.raises(BadRequest, match=rf"^CALMCLIP_{name}.* is "):
        from_environment()
