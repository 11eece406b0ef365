"""The files that run the service elsewhere, held against the project: nothing here can start a container."""

import configparser
import json
import re
import tomllib
from typing import Any

from kernels.engine import Engine
from stream.config.schema import Config, ServerConfig
from stream.deliver.log import EventLog
from stream.operate.health import STUCK_S
from stream.operate.metrics import render
from stream.service.service import Service
from tests.serve import ROOT

OPERATE = ROOT / "stream" / "operate"
OF_PYTHON = {"python3-dev", "python3-venv"}
"""The image brings its own."""


def test_the_container_has_what_the_readme_installs() -> None:
    text = (OPERATE / "Containerfile").read_text()
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (wanted,) = re.findall(r"apt-get install (python3-dev.*)", readme)
    packages = set()
    for word in wanted.split():
        begin, _, rest = word.partition("{")
        packages |= {begin + end for end in rest.rstrip("}").split(",")}
    installed = set(re.findall(r"^        ([a-z0-9.+-]+) \\$", text, re.M))
    assert packages - OF_PYTHON <= installed, packages - installed
    assert len(installed) > 10


def test_the_container_opens_the_ports_of_the_config() -> None:
    text = (OPERATE / "Containerfile").read_text()
    server = ServerConfig()
    (ports,) = re.findall(r"^EXPOSE (.*)$", text, re.M)
    assert {int(port) for port in ports.split()} == {server.ws_port, server.page_port, server.zmq_port}
    assert f"127.0.0.1:{server.page_port}/healthz" in text
    assert re.findall(r"^USER (.*)$", text, re.M) == ["livemoments"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}:
        assert f"COPY {package} {package}\n" in text
    for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split())
    (version,) = set(re.findall(r"^FROM python:([\d.]+)-", text, re.M))
    assert project["project"]["requires-python"] == f">={version}"


def test_the_files_travel_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {path.name for path in OPERATE.iterdir() if path.suffix != ".py" and path.is_file()} == set(
        project["package-data"]["stream.operate"]
    )
    assert "stream.operate" in project["packages"]


def test_systemd_is_told_what_the_service_does() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(OPERATE / "livemoments.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) <= STUCK_S
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["Restart"] == "on-failure" and service["RestartPreventExitStatus"] == "2"
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
    assert service["StateDirectory"] == service["User"] == "livemoments"


def test_the_dashboard_shows_what_there_is() -> None:
    """All of it: every metric is on it, and it names no other."""
    log = EventLog(None)
    config = Config(server=ServerConfig(ws_port=0, zmq_port=None, page_port=0))
    with Service(Engine(zero_shot=True), config, log) as service:
        text = render(service)[0].decode()
    log.close()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    ends = {"summary": ("_sum", "_count"), "histogram": ("_sum", "_count", "_bucket")}
    there = {name + end for name, kind in kinds.items() for end in ends.get(kind, ("",))}
    # Without clips there is none of that.
    there.add("livemoments_clips_disk_bytes")
    dashboard: dict[str, Any] = json.loads((OPERATE / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    named = set(re.findall(r"(?:livemoments|process)_[a-z_]+", " ".join(asked)))
    assert named <= there, named - there
    assert {name for name in there if name.startswith("livemoments_")} <= named
