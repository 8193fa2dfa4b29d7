"""No command and no class uses the network if all files are local."""

import json
import os
import re

from tests import processes

# Words of libraries' messages about a failed connection.
NETWORK_WORDS = re.compile(
    r"offline|network|connection|connect to|resolve|unreachable|timed? ?out|retry|huggingface\.co|hf\.co|http",
    re.IGNORECASE,
)


def test_local_folders_need_no_network(tmp_path):
    """Convert, load, answer, save, detect, export and chat, without `HF_HUB_OFFLINE`, which all other tests set."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    environment |= {"HF_HOME": str(tmp_path / "cache")}  # without files from an old cache
    environment |= {"HF_HUB_CACHE": str(tmp_path / "cache/hub"), "HF_MODULES_CACHE": str(tmp_path / "cache/modules")}
    done = processes.capture("-m", "tests.offline_session", tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    *said, attempts = done.stdout.splitlines()
    attempts = json.loads(attempts)
    assert [attempt[:2] for attempt in attempts] == [], attempts[0][2]
    # Messages may link to documentation.
    lines = [re.sub(r"https://huggingface\.co/docs\S*", "", line) for line in said + done.stderr.splitlines()]
    assert [line for line in lines if NETWORK_WORDS.search(line)] == []
