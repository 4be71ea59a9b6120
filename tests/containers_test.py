"""Containers and clusters, read and not run: what JobSet, SkyPilot and Docker would be told is consistent."""

import math
import re
import subprocess

import pytest
from conftest import ROOT

from smdlm.command import load_config
from smdlm.config import read

yaml = pytest.importorskip("yaml")
LAUNCH = ROOT / "launch"
JOBSETS = {"jobset_tpu.yaml": "google.com/tpu", "jobset_gpu.yaml": "nvidia.com/gpu"}


def loaded(name):
    (document,) = yaml.safe_load_all((LAUNCH / name).read_text("utf-8"))
    return document


def check_command(flags):
    """The flags are of `smdlm.main`, and its config takes them."""
    pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    config = load_config(ROOT / pairs.pop("config"))
    assert pairs.pop("workdir").startswith("gs://")
    for name, value in pairs.items():
        _, section, field = name.split(".")
        config[section][field] = value
    return read(config)


@pytest.fixture(params=JOBSETS)
def jobset(request):
    """(document, its only job, its pod, its container, the name of its chips)."""
    document = loaded(request.param)
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return document, job, pod, container, JOBSETS[request.param]


def test_a_jobset_is_one(jobset):
    document, job, pod, container, chips = jobset
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(document["spec"]) == {"failurePolicy", "replicatedJobs"}
    assert document["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert job["parallelism"] == job["completions"] > 1 and job["completionMode"] == "Indexed"
    assert isinstance(container["resources"]["limits"][chips], int)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    for variable in container["env"]:  # Kubernetes takes strings alone
        assert isinstance(variable.get("value", ""), str) and ("value" in variable) != ("valueFrom" in variable)


def test_a_jobset_runs_a_command_that_is_taken(jobset):
    *_, container, _ = jobset
    (entry,) = container["command"]
    assert (ROOT / entry).stat().st_mode & 0o111
    config = check_command(container["args"])
    assert config.data.source.folder.startswith("gs://")
    environment = {variable["name"]: variable.get("value", "0") for variable in container["env"]}
    dry = subprocess.run(
        [ROOT / entry, "--dry-run", *container["args"]],
        env={"PATH": "/usr/bin:/bin", "HOME": "/", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert dry.returncode == 0 and "smdlm.main" in dry.stderr and "--distributed" in dry.stderr


def test_what_restarts_and_what_does_not(jobset):
    """A mistake (2, as job.sh says) ends the set; anything else fails the job, and the set starts all of it again."""
    document, job, pod, container, _ = jobset
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 10 and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_the_tpu_slice_has_as_many_hosts_as_its_topology():
    job = loaded("jobset_tpu.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * chips
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == pod["tolerations"][0]["value"] == "true"


def test_gpu_hosts_find_the_first():
    document = loaded("jobset_gpu.yaml")
    replicated = document["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    environment = {variable["name"]: variable for variable in container["env"]}
    host, port = environment["COORDINATOR"]["value"].split(":")
    name = document["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"  # as JobSet names pods and their service
    assert int(port) == container["ports"][0]["containerPort"]
    assert environment["NUM_PROCESSES"]["value"] == str(job["completions"])
    assert "job-completion-index" in environment["PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_sky_recovers_spot_machines_and_runs_a_command_that_is_taken(tmp_path, nodes):
    task = loaded("sky.yaml")
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    resources = task["resources"]
    assert resources["use_spot"] is True and resources["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
    assert re.fullmatch(r"\w+:\d+", resources["accelerators"])
    sky = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-euc", task["run"]],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "DRY_RUN": "1", **task["envs"], **sky},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    words = done.stderr.split("smdlm.main ")[1].split()
    wanted = ["--distributed", "--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert words[3:] == (wanted if nodes == 2 else [])
    check_command(words[:3])


def extras(text):
    return set(re.search(r"\.\[([\w,$]+)\]", text).group(1).split(","))


def test_the_image_is_built_from_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    verbs = [line.split()[0] for line in lines]
    assert verbs[0] == "ARG" and verbs[1] == "FROM" and verbs[-1] == "ENTRYPOINT" and set(verbs) <= {
        "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"
    }  # fmt: skip
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    (entry,) = re.search(r'ENTRYPOINT \["(.*)"\]', text).groups()
    assert (ROOT / entry).stat().st_mode & 0o111
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text("utf-8"), re.M))
    for platform in ("cpu", "cuda", "tpu"):
        script = next(line for line in lines if line.startswith("RUN"))[4:].replace("pip", "echo pip")
        done = subprocess.run(["sh", "-c", script], env={"PLATFORM": platform}, capture_output=True, text=True)
        assert done.returncode == 0 and extras(done.stdout) <= known
        assert (platform in extras(done.stdout)) == (platform != "cpu")
    done = subprocess.run(["sh", "-c", script], env={"PLATFORM": "rocm"}, capture_output=True, text=True)
    assert done.returncode == 2 and "got rocm, wanted cpu, cuda or tpu" in done.stderr
    assert extras(loaded("sky.yaml")["setup"]) <= known
