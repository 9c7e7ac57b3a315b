"""compose.yaml: what it names is there. `.ci/compose` performs it."""

import re
from pathlib import Path

import yaml

from statecodec_server.settings import Settings

ROOT = Path(__file__).parents[2]
FILE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = FILE["services"]


def test_every_setting_is_one_of_the_service():
    known = {f"STATECODEC_SERVER_{name.upper()}" for name in Settings.model_fields}
    given = {name for one in SERVICES.values() for name in one["environment"] if name.startswith("STATECODEC_")}
    assert given
    assert given <= known


def test_services_volumes_and_images_are_there():
    for name, one in SERVICES.items():
        assert set(one.get("depends_on", ())) <= set(SERVICES), name
        assert {volume.split(":")[0] for volume in one.get("volumes", ())} <= set(FILE["volumes"]), name
        assert "build" in one or re.fullmatch(r"[\w./-]+:[\w.-]+", one["image"]), name


def test_hosts_in_urls_are_services():
    settings = SERVICES["service"]["environment"]
    text = settings["STATECODEC_SERVER_DATABASE_URL"] + settings["STATECODEC_SERVER_STORAGE_OPTIONS"]
    hosts = re.findall(r"(?:@|http://)([\w-]+):(\d+)", text)
    assert [host for host, _ in hosts] == ["database", "storage"]
    assert set(SERVICES) >= {host for host, _ in hosts}


def test_only_the_http_port_is_published_and_only_on_this_machine():
    published = [port for one in SERVICES.values() for port in one.get("ports", ())]
    assert published == ["127.0.0.1:8321:8321"]
