"""The other engine of ``benchmarks.transport_engine``: SGLang alone, in the process that asks it and makes arrays.

python -m benchmarks.transport_engine_side JOB: reads ``lists [FILE]`` or ``nothing`` on each line of standard input and
answers with the seconds of the call. JOB is JSON: ``model``, ``prompts``, ``length``. With a file the rows are saved.
"""

# Before anything of SGLang, whose children import this module first: see bridge/server.py.
from bridge.sglang_platform import mend_torchvision

mend_torchvision()

import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402

from bridge.engine import EngineSpec  # noqa: E402

VOCABULARY = 512


def ids_of(prompts: int, length: int) -> list[np.ndarray]:
    """int32 [length] each, the same in every process"""
    return list(np.random.default_rng(0).integers(2, VOCABULARY, (prompts, length), np.int32))


def main(model: str, prompts: int, length: int) -> None:
    import jax
    import jax.numpy as jnp

    from bridge.sglang_engine import SGLangEngine

    options = {"enable_return_hidden_states": True}
    spec = EngineSpec(kind="sglang", model=model, dtype="float32", device="cpu", threads=1, options=options)
    engine, ids = SGLangEngine(spec), [each.tolist() for each in ids_of(prompts, length)]

    def rows(hidden: bool) -> "jax.Array | None":
        """float32 [prompts * length, width]"""
        asked = {"max_new_tokens": 1, "temperature": 0.0}  # with none it returns no hidden states
        answers = engine._engine.generate(input_ids=ids, sampling_params=asked, return_hidden_states=hidden)
        if not hidden:
            return None
        each = [np.array(answer["meta_info"]["hidden_states"][0], np.float32) for answer in answers]
        return jax.block_until_ready(jnp.asarray(np.concatenate(each)))

    for line in sys.stdin:
        what, *file = line.split()
        start = time.perf_counter()
        found = rows(hidden=what == "lists")
        seconds = time.perf_counter() - start
        if file:
            np.save(file[0], found)
        print(f"answer {seconds}", flush=True)
    engine.close()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
