"""The container files name what is there, and do what docs/containers.md says."""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tacod.config import load_config
from tacod_client.cli.parser import parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
PAGE = (ROOT / "docs" / "containers.md").read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMPOSE = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


class Instruction(NamedTuple):
    """A line of a Containerfile, put together from its continuations."""

    word: str
    rest: str


def instructions() -> dict[str, list[Instruction]]:
    """Those of each stage, by the stage's name; what stands before the first stage is under an empty name."""
    text = re.sub(r"^\s*#.*\n", "", (CONTAINERS / "Containerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, list[Instruction]] = {"": []}
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                stages[rest.split()[-1]] = []
            list(stages.values())[-1].append(Instruction(word, rest.strip()))
    return stages


STAGES = instructions()
IMAGES = ["tacod", "comfyui"]
MONITORING = ["prometheus", "grafana"]
"""Services of the profile, by images of others."""


def all_of(stage: str, word: str) -> list[str]:
    return [each.rest for each in STAGES[stage] if each.word == word]


def one(stage: str, word: str) -> str:
    (found,) = all_of(stage, word)
    return found


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path into the build."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    verdict = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        if fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
            verdict = rule.startswith("!")
    return verdict


# --- the Containerfile ------------------------------------------------------------------------------------------------


def test_the_default_image_is_tacod() -> None:
    assert list(STAGES)[-1] == "tacod"
    assert {each.rest.split()[0] for stage in IMAGES for each in STAGES[stage][:1]} == {"base"}


def test_the_base_is_cudas_and_named_by_a_tag() -> None:
    assert re.fullmatch(r"BASE=docker\.io/nvidia/cuda:\d+\.\d+\.\d+-(base|runtime)-ubuntu\d\d\.04", one("", "ARG"))


def test_what_is_copied_is_in_the_repository_and_in_the_build() -> None:
    copied = [source for stage in STAGES for rest in all_of(stage, "COPY") for source in rest.split()[:-1]]
    own = [source for source in copied if not source.startswith(("--", "/wheels"))]
    assert {"pyproject.toml", "tacod", "client", "comfy_nodes", "systemd"} < set(own)
    for source in own:
        assert (ROOT / source).exists(), source
        assert sent(source), f".dockerignore keeps {source} out"
    assert not sent("tests/data")
    assert not sent(".git/config")


def test_the_wheel_is_built_from_all_that_it_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {*build["packages"], *build["force-include"], project["project"]["readme"]}
    wanted |= set(project["project"]["license-files"])
    copied = {source for rest in all_of("wheel", "COPY") for source in rest.split()[:-1]}
    assert all(any(path == source or path.startswith(f"{source}/") for source in copied) for path in wanted)


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_no_root_by_a_number_that_the_base_has(image: str) -> None:
    user, _, group = all_of(image, "USER")[-1].partition(":")
    (setup,) = all_of("base", "RUN")
    assert int(user) > 0
    assert f"--gid {group} tacod" in setup, "both are in the group that may use the socket"
    assert re.search(rf"useradd --uid {user} --gid tacod", setup)


@pytest.mark.parametrize("image", IMAGES)
def test_folders_of_volumes_are_there_with_an_owner(image: str) -> None:
    """A new volume gets owner and mode of the folder in the image."""
    made = " ".join(all_of("base", "RUN") + all_of(image, "RUN"))
    for folder in json.loads(one(image, "VOLUME")):
        assert folder in made or folder.startswith("/opt/ComfyUI/"), folder


def test_commands_are_those_of_the_package() -> None:
    command = json.loads(one("tacod", "ENTRYPOINT"))
    assert command[0] in SCRIPTS
    assert command[1:] == ["--config", "/etc/tacod/config.toml"]
    health = json.loads(one("tacod", "HEALTHCHECK").partition(" CMD ")[2])
    assert health[0] in SCRIPTS
    assert parser().parse_args(health[1:]).verb == "status"
    install = re.search(r"bin/tacoctl (install-nodes \S+)", " ".join(all_of("comfyui", "RUN")))
    assert install is not None
    assert parser().parse_args(install[1].split()).path == "/opt/ComfyUI"


# --- its configuration ------------------------------------------------------------------------------------------------


def test_the_configuration_can_be_used_and_agrees_with_the_files() -> None:
    config = load_config(CONTAINERS / "config.toml")
    assert f"TACOD_ENDPOINT={config.endpoint}" in one("base", "ENV").split()
    mounts = targets("tacod")
    assert str(config.socket_path.parent) in mounts
    assert config.models.uploads is not None
    assert any(Path(config.models.uploads).is_relative_to(target) for target in mounts)
    assert set(config.models.roots) <= mounts
    assert set(config.models.roots) <= targets("comfyui"), "the same path in both, so that models go by path"
    assert config.metrics.listen is not None
    port = config.metrics.listen.rpartition(":")[2]
    assert one("tacod", "EXPOSE") == port
    assert SERVICES["tacod"]["ports"] == [f"127.0.0.1:${{METRICS_PORT:-{port}}}:{port}"]
    assert int(SERVICES["tacod"]["stop_grace_period"].removesuffix("s")) > config.drain_timeout_s


# --- compose ----------------------------------------------------------------------------------------------------------


def targets(service: str) -> set[str]:
    """The folders of a container that are mounted."""
    return {re.sub(r":ro$", "", volume).rpartition(":")[2] for volume in SERVICES[service]["volumes"]}


def variables(text: str) -> set[str]:
    return set(re.findall(r"\$\{(\w+)", text))


def test_services_are_built_from_the_stages() -> None:
    assert set(SERVICES) == {*IMAGES, *MONITORING}
    for name in IMAGES:
        service = SERVICES[name]
        build = service["build"]
        assert (CONTAINERS / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert build["target"] == name
        assert service["command"].startswith("--listen") if name == "comfyui" else "command" not in service


def test_gpus_are_split_by_uuid() -> None:
    own = {name: variables(SERVICES[name]["environment"]["NVIDIA_VISIBLE_DEVICES"]) for name in IMAGES}
    assert own == {"tacod": {"TACOD_GPUS"}, "comfyui": {"COMFYUI_GPUS"}}
    for service in (SERVICES[name] for name in IMAGES):
        assert service["runtime"] == "nvidia"
        assert ":?" in service["environment"]["NVIDIA_VISIBLE_DEVICES"], "compose says what is missing"


def test_both_share_the_socket_and_nothing_else_but_models() -> None:
    assert targets("tacod") & targets("comfyui") == {"/run/tacod", "/opt/ComfyUI/models"}
    assert "${MODELS:?the folder with the models}:/opt/ComfyUI/models:ro" in SERVICES["tacod"]["volumes"]
    named = {volume.partition(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert {name for name in named if name.isalpha()} == set(COMPOSE["volumes"])
    assert SERVICES["comfyui"]["depends_on"] == {"tacod": {"condition": "service_healthy"}}
    for name in named:
        if name.startswith("."):
            assert (CONTAINERS / name).exists()


def test_monitoring_is_asked_for_and_names_what_there_is() -> None:
    config = load_config(CONTAINERS / "config.toml")
    scraped = yaml.safe_load((CONTAINERS / "prometheus.yml").read_text())
    ((target,),) = [each["targets"] for job in scraped["scrape_configs"] for each in job["static_configs"]]
    assert config.metrics.listen is not None
    assert target == f"tacod:{config.metrics.listen.rpartition(':')[2]}"
    for name in MONITORING:
        assert SERVICES[name]["profiles"] == ["monitoring"]
        assert re.fullmatch(r"docker\.io/\w+/\w+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])
        # Compose looks at these for everyone, whoever asks for the profile.
        assert ":?" not in json.dumps(SERVICES[name])
    assert "profiles" not in SERVICES["tacod"]
    grafana = SERVICES["grafana"]
    (source,) = yaml.safe_load((CONTAINERS / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rpartition(':')[2]}"
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((CONTAINERS / "grafana/provisioning/dashboards/tacod.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert folder in targets("grafana")
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    (mounted,) = (each.split(":")[0] for each in grafana["volumes"] if each.split(":")[1] == folder)
    assert (CONTAINERS / mounted / Path(home).relative_to(folder)).is_file()
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_nothing_listens_to_other_machines_and_nobody_becomes_root() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


def test_the_page_says_what_the_files_have() -> None:
    text = (CONTAINERS / "compose.yaml").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert set(rows) == variables(text)
    for name, default in rows.items():
        (given,) = set(re.findall(rf"\$\{{{name}(?::[-?]([^}}]*))\}}", text))
        wanted = "must be set" if f"${{{name}:?" in text else given or "none"
        assert default == wanted, name
    for name in re.findall(r"`(containers/[\w./]+)`", PAGE):
        assert (ROOT / name).exists() or name == "containers/.env"
    assert f"`shm_size` is {SERVICES['tacod']['shm_size'].removesuffix('gb')} GB" in PAGE
    assert f"`stop_grace_period` is {SERVICES['tacod']['stop_grace_period'].removesuffix('s')} s" in PAGE
    assert set(re.findall(r"--build-arg (\w+)=", PAGE)) <= {
        rest.partition("=")[0] for stage in STAGES for rest in all_of(stage, "ARG")
    }
