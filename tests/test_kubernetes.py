"""launch/kubernetes' example: it is YAML, and its command line is one that is understood.

There is no cluster here to try it on, and the files say so.
"""

from pathlib import Path

import pytest
import yaml

from tests.command_lines import accepted, words_of

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "launch" / "kubernetes"


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all((FOLDER / "job.yaml").read_text()))


def test_the_launcher_and_the_engine_understand_the_command(documents, tmp_path):
    _, job = documents
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    options, settings = accepted(words_of(tmp_path, command, JOB_COMPLETION_INDEX="1"))
    assert options["node_rank"] == 1
    assert options["nnodes"] == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert options["nproc_per_node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (settings.resume, settings.progress, settings.checkpoint.every) == (True, "plain", 5)


def test_the_first_pod_is_found_by_the_service(documents, tmp_path):
    service, job = documents
    (container,) = job["spec"]["template"]["spec"]["containers"]
    name, domain = job["metadata"]["name"], job["spec"]["template"]["spec"]["subdomain"]
    assert f"--master-addr={name}-0.{domain}" in container["args"]
    assert service["metadata"]["name"] == domain
    assert service["spec"]["selector"] == {"job-name": name}


def test_exit_codes_decide_whether_to_try_again(documents):
    rules = documents[1]["spec"]["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule
    }
    assert codes == {"Ignore": [75], "FailJob": [2]}


def test_it_says_that_it_is_untested():
    assert "UNTESTED" in (FOLDER / "job.yaml").read_text().splitlines()[0]
    assert "untested" in (FOLDER / "README.md").read_text().splitlines()[0]
