"""The files of ``cluster/`` against the schemas of the programs that read them."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ("local", "aws", "gcp")
MANIFESTS = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}
SCHEMAS = ROOT.parent / "shared" / "kuberay"


def read(name):
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def check_launched(config):
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(config)
    util.validate_config(config)
    return config


def errors_of(manifest):
    validators = pytest.importorskip("jsonschema").validators
    schema = SCHEMAS / f"{manifest['kind'].lower()}s.schema.json"
    if not schema.exists():
        pytest.skip(f"KubeRay's schema is not at {schema}")
    validator = validators.Draft7Validator(json.loads(schema.read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def cluster_spec(manifest):
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_cluster_file(name):
    check_launched(read(name))


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("place", ["top", "auth", "group"])
def test_a_misspelt_key_of_a_cluster_file_is_refused(name, place):
    config = read(name)
    groups = config.get("available_node_types", {"": config})  # machines that one has: no groups
    {"top": config, "auth": config["auth"], "group": list(groups.values())[-1]}[place][
        "max_worker"
    ] = 3
    with pytest.raises(Exception, match="max_worker"):
        check_launched(config)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_cloud_has_a_cpu_head_and_groups_that_grow_from_nothing(name):
    config = check_launched(read(name))
    groups = config["available_node_types"]
    assert groups["head"]["resources"] == {"CPU": 0}
    for group in ("cache", "train", "serve"):
        assert groups[group]["min_workers"] == 0 < groups[group]["max_workers"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_start_of_ray_asks_for_the_token_and_no_dashboard_leaves_loopback(name):
    config = read(name)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in (CLUSTER / f"{name}.yaml").read_text()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_files_that_nodes_are_given_exist(name):
    for path in read(name)["file_mounts"].values():
        assert path.startswith("~/.ray/") or (ROOT / path).exists()


@pytest.mark.parametrize("name", [*LAUNCHED, *MANIFESTS, "kubernetes"])
def test_a_file_begins_with_what_to_change(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    header = text[: re.search("^[^#]", text, re.MULTILINE).start()]
    assert "CHANGE" in header


@pytest.mark.parametrize(("name", "kind"), MANIFESTS.items())
def test_kuberay_takes_the_manifest(name, kind):
    manifest = read(name)
    assert manifest["kind"] == kind
    assert errors_of(manifest) == []


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("place", ["cluster", "head", "container", "group"])
def test_a_misspelt_key_of_a_manifest_is_refused(name, place):
    manifest = read(name)
    spec = cluster_spec(manifest)
    head = spec["headGroupSpec"]
    section = {
        "cluster": spec,
        "head": head,
        "container": head["template"]["spec"]["containers"][0],
        "group": spec["workerGroupSpecs"][0],
    }[place]
    section["maxReplica"] = 3
    assert ["maxReplica" in error for error in errors_of(manifest)] == [True]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_a_token_a_cpu_head_shared_storage_and_bounded_groups(name):
    manifest = read(name)
    spec = cluster_spec(manifest)
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert (head["serviceType"], head["rayStartParams"]["num-cpus"]) == ("ClusterIP", "0")
    storage = next(
        item for item in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
        if item["kind"] == "PersistentVolumeClaim"
    )  # fmt: skip
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (head, *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {
            "claimName": storage["metadata"]["name"]
        }
        mounts = pod["containers"][0]["volumeMounts"]
        assert {"name": pod["volumes"][0]["name"], "mountPath": "/mnt/tinyflux"} in mounts
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert manifest["metadata"]["namespace"] == storage["metadata"]["namespace"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_runs_the_ray_that_the_image_has(name):
    assert f"ray=={cluster_spec(read(name))['rayVersion']}" in requirements()


def test_the_served_application_is_one_that_ray_serve_takes():
    schema = pytest.importorskip("ray.serve.schema")
    config = yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"])
    assert schema.ServeDeploySchema.model_validate(config).applications[0].name == "tinyflux"


def requirements():
    lines = (CLUSTER / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_nodes_get_exactly_the_tested_versions():
    # A marker can be narrower in the longer list, where more packages ask for a package.
    tested = {line.split(" ;")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert sorted({line.split(" ;")[0] for line in requirements()} - tested) == []


def test_nodes_get_everything_that_jobs_need():
    lines = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{name} = (\[.*?\])$", lines, re.MULTILINE | re.DOTALL)
             for name in ("dependencies", "cluster", "report")]  # fmt: skip
    asked = {Requirement(text).name for found in lists for text in ast.literal_eval(found[1])}
    assert sorted(asked - {Requirement(line).name for line in requirements()}) == []


def test_the_image_copies_what_exists_and_leaves_secrets_and_runs_out():
    text = (CLUSTER / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    assert "TOKEN" not in text


def test_the_runtime_environment_is_one_that_ray_takes(monkeypatch):
    runtime_env = pytest.importorskip("ray.runtime_env")
    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    made = runtime_env.RuntimeEnv(**raw)
    assert sorted(set(raw) - runtime_env.RuntimeEnv.known_fields) == []  # Ray only warns of these
    assert set(requirements()) <= set(made["pip"]["packages"])
    assert not re.search("token|secret|password", json.dumps(made["env_vars"]), re.IGNORECASE)


def test_prometheus_finds_nodes_where_ray_lists_them():
    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


def test_the_dashboard_asks_for_tinyflux_metrics_and_no_panels_overlap():
    board = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"])
                 for y in range(grid["y"], grid["y"] + grid["h"])}  # fmt: skip
        assert not cells & places, panel["title"]
        places |= cells
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    for part in ("train_loss", "train_samples_per_s", "train_data_wait", "train_val_velocity",
                 "cache_rows", "serve_requests"):  # fmt: skip
        assert any(f"ray_tinyflux_{part}" in query for query in queries), part
    for query in queries:
        assert re.search(r"ray_(tinyflux_(train|cache|serve)|node)_\w", query)
