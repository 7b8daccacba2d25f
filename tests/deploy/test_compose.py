"""docker-compose.yml: right by the schema in every profile, and nothing in it has more than it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from outside import Environment, environment

from server.settings import ENV_PREFIX, Settings

__all__ = ["environment"]

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
TEXT = FILE.read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = {name: service for name, service in SERVICES.items() if service["image"].startswith("gpt2-server:")}
OTHERS = SERVICES.keys() - SERVERS.keys()
PROFILES = sorted({profile for service in SERVICES.values() for profile in service.get("profiles", [])})


def test_the_schema_accepts_it(environment: Environment) -> None:
    """The compose specification's own schema, of which check-jsonschema carries a copy."""
    python = environment("compose", "check-jsonschema==0.39.0")
    command = [python.parent / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("profiles", [some for n in range(len(PROFILES) + 1) for some in combinations(PROFILES, n)])
def test_compose_reads_it_with_any_profiles(profiles: tuple[str, ...]) -> None:
    flags = [f"--profile={profile}" for profile in profiles]
    result = subprocess.run(["docker-compose", *flags, "config"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_the_profiles() -> None:
    assert PROFILES == ["gpu", "observability", "scale"]
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == ["server"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"]
    assert service["mem_limit"]
    assert service.get("network_mode") is None
    if name in OTHERS:  # of ours, the image says the user
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
        assert not service["image"].endswith(":latest")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
    for volume in service.get("volumes", []):
        source, _, mode = volume.split(":") if volume.count(":") == 2 else (*volume.split(":"), "rw")
        assert mode == "ro" if source.startswith(".") else source in COMPOSE["volumes"]
        assert not source.startswith(".") or (ROOT / source).exists()


def test_no_port_is_taken_twice() -> None:
    ports = [port.rsplit(":", 1)[0] for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(set(ports)) == len(ports) == 5


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_time_to_finish(name: str) -> None:
    service = SERVERS[name]
    assert float(service["stop_grace_period"].removesuffix("s")) > float(
        service["environment"]["GPT2_SERVER_SHUTDOWN_TIMEOUT"]
    )
    assert "healthcheck" not in service  # the image's
    for variable in service["environment"]:
        assert variable.removeprefix(ENV_PREFIX).lower() in Settings.model_fields


def test_it_holds_no_secret() -> None:
    assert not re.search(r"(?i)password\s*[:=]|secret\s*[:=]", TEXT)
    assert all(service["environment"]["GPT2_SERVER_API_KEY"] is None for service in SERVERS.values())
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"  # or it would be admin, admin
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_what_is_mounted_is_where_its_reader_looks() -> None:
    provider = yaml.safe_load((ROOT / "docker/grafana/dashboards/provider.yml").read_text("utf-8"))["providers"][0]
    assert "./docker/grafana:/etc/grafana/provisioning:ro" in SERVICES["grafana"]["volumes"]
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    source = yaml.safe_load((ROOT / "docker/grafana/datasources/prometheus.yml").read_text("utf-8"))["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    prometheus = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text("utf-8"))
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= mounted
    scraped = {
        name for job in prometheus["scrape_configs"] for names in job["dns_sd_configs"] for name in names["names"]
    }
    assert scraped == {"server", "replica", "balancer"}
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
