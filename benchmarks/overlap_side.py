"""Each side of ``benchmarks.overlap`` alone: the teacher's prefills with no student, then steps with no teacher.

python -m benchmarks.overlap_side CONFIG OUT [key=value ...]: writes the seconds of each to OUT as JSON.
"""

import json
import sys
import time
from pathlib import Path

import jax

import kdjax

READY, WARM = 6, 3  # batches that both sides go through again and again; their first that are not counted


def main(path: str, out: str, *overrides: str) -> None:
    config = kdjax.load_config(path, overrides)
    with kdjax.stream(config) as batches:
        model = kdjax.make_student(config, batches.mesh)
        algorithm = kdjax.make_algorithm(config, model, batches.teachers)
        step = kdjax.make_step(model, algorithm, kdjax.make_optimizer(config.train, config.train.steps))
        batches.wait_ready()
        hosts = [next(batches.data) for _ in range(READY)]
        teacher = []
        for number in range(config.train.steps):
            (lease,), seconds = batches.engine.consult(hosts[number % READY])
            lease.release()
            teacher.append(seconds)
        ready = batches.evaluation(hosts)  # copies of the teacher's rows, which no step gives back
        student, pending, since = [], step(ready[0]), time.perf_counter()
        for number in range(config.train.steps):
            following = step(ready[(number + 1) % READY])  # dispatched ahead, as the loop does
            jax.device_get(pending)
            pending, now = following, time.perf_counter()
            student.append(now - since)
            since = now
        jax.block_until_ready(pending)
    Path(out).write_text(json.dumps({"teacher": teacher[WARM:], "student": student[WARM:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
