"""Run with Ray's Python: a cluster of two nodes on this machine that serves a config file, until standard input ends.

python ray_cluster.py CONFIG
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 3, "object_store_memory": 100 << 20, "include_dashboard": False}  # one replica fits on each

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(num_cpus=NODE["num_cpus"], object_store_memory=NODE["object_store_memory"])
    command = [Path(sys.executable).parent / "serve", "run", "--address", cluster.address, sys.argv[1]]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) as serving:
        print("started", flush=True)
        sys.stdin.read()
        serving.terminate()
        serving.wait(60)
    cluster.shutdown()
