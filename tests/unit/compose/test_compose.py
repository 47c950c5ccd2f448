"""What the compose files promise: who may do what, who waits for whom, and what is published."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from compose import fetch_model
from runtime.config import ENV_PREFIX
from runtime.errors import StartupError
from runtime.settings import GatewaySettings, ProcessSettings, WorkerSettings

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "compose"
OURS = {
    "model": ProcessSettings,
    "gateway": GatewaySettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}
SHARED_SECRETS = "/var/lib/tandem/secrets"
WATCHERS = {"collector", "tempo", "prometheus", "grafana"}
WORKERS = ("prefill", "decode")


def load(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def base():
    return load(COMPOSE / "compose.yaml")


@pytest.fixture(scope="module")
def services(base):
    return base["services"]


@pytest.fixture(scope="module")
def gpu():
    return load(COMPOSE / "gpu.yaml")["services"]


def test_the_root_file_adds_one_overlay_to_the_common_file():
    (include,) = load(ROOT / "compose.yaml")["include"]
    assert include["path"] == ["compose/compose.yaml", "compose/${COMPUTE:-cpu}.yaml"]
    assert include["project_directory"] == "."


def test_every_service_is_named_here(services, gpu):
    assert set(services) == OURS.keys() | WATCHERS
    for overlay in (load(COMPOSE / "cpu.yaml")["services"], gpu):
        assert set(overlay) == set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_our_containers_may_do_nothing_that_they_need_not(name, services):
    service = services[name]
    assert service["read_only"] is True
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert "privileged" not in service
    assert "cap_add" not in service


def test_two_ports_are_published_and_a_third_with_the_dashboards(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert [port.rpartition(":")[2] for port in published.pop("gateway")] == ["8000", "50051"]
    assert [port.rpartition(":")[2] for port in published.pop("grafana")] == ["3000"]
    assert published == {}
    for name in ("gateway", "grafana"):
        assert all(port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:") for port in services[name]["ports"])


def test_workers_are_on_the_internal_network_only(base, services):
    assert base["networks"]["internal"] == {"internal": True}
    for name in WORKERS:
        assert services[name]["networks"] == ["internal"]
    assert services["gateway"]["networks"] == ["public", "internal"]
    assert services["model"]["networks"] == ["public"]


def test_start_is_gated_by_health_and_the_gateway_stops_first(services):
    health = {name: services[name]["healthcheck"]["test"] for name in (*WORKERS, "gateway")}
    assert {test[1] for test in health.values()} == {"tandem"}
    assert {test[2] for test in health.values()} == {"health"}
    for name in WORKERS:
        port = services[name]["environment"]["TANDEM_PORT"]
        assert health[name][3:] == ["--grpc", f"127.0.0.1:{port}"]
        assert services[name]["depends_on"] == {"model": {"condition": "service_completed_successfully"}}
    assert services["gateway"]["depends_on"] == {
        "model": {"condition": "service_completed_successfully"},
        "prefill": {"condition": "service_healthy"},
        "decode": {"condition": "service_healthy"},
    }


def test_what_stops_has_time_to_drain_and_what_dies_comes_back(services):
    from runtime.limits import DRAIN_TIMEOUT_S

    for name in (*WORKERS, "gateway"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) >= DRAIN_TIMEOUT_S + 10
        assert services[name]["restart"] == "unless-stopped"
        limits = services[name]["deploy"]["resources"]["limits"]
        assert limits.keys() == {"memory", "pids"}  # no CPU limit: it would have to fit every machine
    assert services["model"]["restart"] == "no"


def test_workers_alone_may_run_what_they_write(services):
    for name in OURS:
        (mount,) = services[name]["tmpfs"]
        assert ("exec" in mount) == (name in WORKERS)


@pytest.mark.parametrize("name", OURS)
def test_variables_are_settings_of_the_process(name, services, gpu):
    """A setting's default is its class's alone: a variable without a value is passed on where it is set."""
    environment = {**services[name]["environment"], **gpu[name].get("environment", {})}
    for variable in environment:
        if variable.startswith(ENV_PREFIX):
            field = variable.removeprefix(ENV_PREFIX).removesuffix("_FILE").lower()
            assert field in OURS[name].model_fields, variable


def test_a_worker_finds_the_gateway_by_name_and_is_found_by_its_address(services):
    internal = services["gateway"]["environment"]["TANDEM_INTERNAL_PORT"]
    for name in WORKERS:
        environment = services[name]["environment"]
        assert environment["TANDEM_GATEWAY"] == f'["gateway:{internal}"]'
        assert environment["TANDEM_ADVERTISE_HOST"] == "auto"
        assert environment["TANDEM_HOST"] == "0.0.0.0"
        assert "TANDEM_WORKER_ID" not in environment  # replicas share their environment
        assert "container_name" not in services[name]


def test_secrets_are_files_and_stand_in_no_environment(base, services):
    for name, secret in base["secrets"].items():
        assert secret == {"file": f"${{{name.upper()}_FILE:-/dev/null}}"}
    for service in services.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("(KEY|TOKEN|PASSWORD|SECRET)(_|$)", variable):
                place, _, file = str(value).rpartition("/")
                if place == SHARED_SECRETS:
                    assert f"secrets:{SHARED_SECRETS}:ro" in service["volumes"]
                    assert file in fetch_model.SECRETS
                else:
                    assert (place, file in service["secrets"]) == ("/run/secrets", True), variable


def test_one_container_alone_writes_the_shared_secrets(services):
    writers = [
        name for name, each in services.items() if f"secrets:{SHARED_SECRETS}" in each.get("volumes", ())
    ]
    assert writers == ["model"]
    assert set(fetch_model.SECRETS) <= set(services["model"]["secrets"])
    assert str(fetch_model.SHARED) == SHARED_SECRETS
    for name in (*WORKERS, "gateway"):
        environment = services[name]["environment"]
        assert environment["TANDEM_INTERNAL_SECRET_FILE"] == f"{SHARED_SECRETS}/internal_secret"


def test_a_secret_is_drawn_once_and_a_given_one_wins(tmp_path):
    given, shared = tmp_path / "given", tmp_path / "shared"
    given.write_text("")
    for place in (given, tmp_path / "nothing"):
        fetch_model.share_secret(place, shared)
    drawn = shared.read_text()
    assert len(drawn) > 40
    assert shared.stat().st_mode & 0o777 == 0o444
    fetch_model.share_secret(given, shared)
    assert shared.read_text() == drawn
    given.write_text("mine\n")
    fetch_model.share_secret(given, shared)
    assert shared.read_text() == "mine\n"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []
    with pytest.raises(StartupError, match="secret shared"):
        fetch_model.share_secret(given, tmp_path / "no" / "shared")


def test_only_the_watchers_have_a_profile(services):
    for name, service in services.items():
        assert service.get("profiles") == (["observability"] if name in WATCHERS else None)


def test_images_of_others_are_pinned(services):
    for name in WATCHERS:
        assert re.fullmatch(r"[\w/.-]+:\$\{[A-Z]+_TAG:-v?\d+\.\d+\.\d+\}", services[name]["image"])


def test_what_is_mounted_from_here_exists(services):
    for service in services.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


@pytest.mark.parametrize("name", WORKERS)
def test_every_gpu_worker_sees_all_gpus_and_claims_one(name, gpu):
    """NVLink and shared memory need the peer's device in sight and one IPC namespace."""
    service = gpu[name]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service["ipc"] == "host"
    assert service["ulimits"]["memlock"] == -1
    assert "CUDA_VISIBLE_DEVICES" not in service["environment"]
    assert service["environment"]["CLAIM_GPUS"] == f"${{{name.upper()}_GPUS:-}}"
    assert service["environment"]["NCCL_DEBUG"] == "${NCCL_DEBUG:-INFO}"
    assert service["entrypoint"][-2:] == ["/opt/tandem/compose/claim_gpu.py", "tandem"]
    assert service["volumes"] == ["gpus:/var/lib/tandem/gpus"]


def test_prometheus_asks_each_process_where_it_answers(services):
    config = load(COMPOSE / "prometheus" / "prometheus.yaml")
    places = {
        (name, job["port"])
        for scrape in config["scrape_configs"]
        for job in scrape["dns_sd_configs"]
        for name in job["names"]
    }
    gateway = int(services["gateway"]["environment"]["TANDEM_HTTP_PORT"])
    metrics = {int(services[name]["environment"]["TANDEM_METRICS_PORT"]) for name in WORKERS}
    assert metrics == {8001}
    assert places == {("gateway", gateway), ("prefill", 8001), ("decode", 8001), ("collector", 8889)}


def test_prometheus_shows_the_admin_key_to_our_processes(services):
    config = load(COMPOSE / "prometheus" / "prometheus.yaml")
    for job in config["scrape_configs"]:
        credentials = job.get("authorization", {}).get("credentials_file")
        ours = job["job_name"] in OURS
        assert credentials == (f"{SHARED_SECRETS}/admin_key" if ours else None)
    assert f"secrets:{SHARED_SECRETS}:ro" in services["prometheus"]["volumes"]


def test_traces_reach_tempo(services):
    collector = load(COMPOSE / "collector.yaml")
    endpoint = services["gateway"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert endpoint.endswith("${COMPOSE_PROFILES:+http://collector:4318}}")
    assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"] == "0.0.0.0:4318"
    assert collector["exporters"]["prometheus"]["endpoint"] == "0.0.0.0:8889"
    tempo = load(COMPOSE / "tempo.yaml")
    received = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert collector["exporters"]["otlp/tempo"]["endpoint"] == received.replace("0.0.0.0", "tempo")
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= collector[part].keys()


def test_the_example_names_variables_that_are_read(base):
    files = [ROOT / "compose.yaml", *COMPOSE.glob("*.yaml")]
    text = "\n".join(path.read_text() for path in files)
    for line in (ROOT / ".env.example").read_text().splitlines():
        if match := re.fullmatch(r"#?([A-Z_]+)=.*", line):
            assert re.search(rf"\b{match[1]}\b", text), match[1]


def test_the_example_shows_the_defaults():
    for line in (ROOT / ".env.example").read_text().splitlines():
        if match := re.fullmatch(r"#?TANDEM_([A-Z_]+)=(.+)", line):
            name = match[1].lower()
            cls = GatewaySettings if name in GatewaySettings.model_fields else WorkerSettings
            assert getattr(cls(**{name: match[2]}), name) == cls.model_fields[name].default, line


def test_the_image_is_made_in_the_order_that_caches_best():
    text = (COMPOSE / "Dockerfile").read_text()
    assert "syntax=" not in text
    assert "ARG BASE=python:3.11-slim\n" in text
    assert "@sha256" not in text
    assert text.index("pip install -c constraints.txt") < text.index("COPY . .")
    assert text.index("USER 10001:10001") < text.index("ENTRYPOINT")


def test_nothing_but_sources_enters_the_build():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    assert lines[1] == "*"
    from tests.unit.test_architecture import PACKAGES

    assert {f"!{package}" for package in PACKAGES} <= set(lines)
    assert not {"!tests", "!.git", "!.env"} & set(lines)


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="docker compose is not installed",
)
@pytest.mark.parametrize("words", [(), ("--profile", "observability")], ids=["plain", "observability"])
@pytest.mark.parametrize("compute", ["cpu", "gpu"])
def test_compose_accepts_the_files(compute, words):
    done = subprocess.run(
        ["docker", "compose", *words, "config", "-q"],
        cwd=ROOT,
        env=os.environ | {"COMPUTE": compute},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
