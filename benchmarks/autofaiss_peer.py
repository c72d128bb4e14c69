"""What autofaiss makes of the same vectors. Run by benchmarks/index.py, in an environment of autofaiss's own.

    python autofaiss_peer.py FOLDER MEMORY_GB CORES

FOLDER holds vectors/*.npy, queries.npy and true.npy; peer.json is written there. Knows nothing of llmvis.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(folder: Path, memory: float, cores: int) -> None:
    import faiss
    import numpy as np
    from autofaiss import build_index

    faiss.omp_set_num_threads(cores)
    begun, used = time.perf_counter(), cpu()
    index, infos = build_index(
        str(folder / "vectors"), index_path=str(folder / "peer.index"), index_infos_path=str(folder / "infos.json"),
        max_index_memory_usage=f"{memory:g}G", current_memory_available=f"{2 * memory + 4:g}G", metric_type="ip",
        nb_cores=cores,
    )  # fmt: skip
    used, wall = cpu() - used, time.perf_counter() - begun
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    index.search(queries[:8], 10)
    begun = time.perf_counter()
    found = index.search(queries, 10)[1]
    took = time.perf_counter() - begun
    figures = {
        "build_cpu_s": round(used, 1),
        "build_wall_s": round(wall, 1),
        "recall_at_10": round(float((found[:, :, None] == true[:, None, :]).any(2).mean()), 4),
        "queries_a_second": round(len(queries) / took, 1),
        "bytes": (folder / "peer.index").stat().st_size,
        "index": infos.get("index_key"),
        "setting": infos.get("index_param"),
        "faiss": faiss.__version__,
    }
    (folder / "peer.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
