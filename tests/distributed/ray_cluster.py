"""A Ray cluster of two emulated nodes: a worker of one is killed, then the other node. Run by test_on_ray.py.

python ray_cluster.py SRC DST SHARES
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from statecodec.distributed.on_ray import compress_on_ray
from statecodec.errors import PolicyError


def at_work(node: Any) -> list[psutil.Process]:
    """The processes of a node that make a share."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [p for p in raylet.children() if p.cmdline()[:1] == ["ray::_share"]]


def main(src: str, dst: str, shares: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:
        compress_on_ray(src, dst, shares=2, rules=["weight=uniform(step=0.1)"], strict=True)
        error = "nothing"
    except PolicyError as found:
        error = str(found)
    folder, killed = Path(dst).parent, list[str]()

    def kill() -> None:
        while not (list(folder.glob("*.share-*")) and (workers := at_work(nodes[0]))):
            time.sleep(0.01)
        workers[0].kill()
        killed.append("worker")
        cluster.remove_node(nodes[1], allow_graceful=False)
        killed.append("node")

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seen: list[tuple[int, int]] = []
    report = compress_on_ray(
        src, dst, shares=shares, retries=10, progress=lambda done, total, _: seen.append((done, total))
    )
    result = {"path": report.path, "killed": killed, "progress": len(seen), "error": error}
    (folder.parent / "result.json").write_text(json.dumps(result))  # ray's own processes write to standard output
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
