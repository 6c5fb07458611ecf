"""The whole of training by hand: what ``python -m kdjax.train`` does, without its logs, checkpoints and evaluation.

python examples/hand_written_loop.py configs/quickstart.yaml train.steps=20 output=runs/by_hand
"""

import sys

import kdjax


def main(path, *overrides):
    config = kdjax.load_config(path, overrides)
    with kdjax.stream(config) as batches:
        model = kdjax.make_student(config, batches.mesh)
        algorithm = kdjax.make_algorithm(config, model, batches.teachers)
        optimizer = kdjax.make_optimizer(config.train, config.train.steps)
        step = kdjax.make_step(model, algorithm, optimizer)
        for number in range(config.train.steps):
            metrics = step(next(batches))
            print(number + 1, f"{float(metrics['loss']):.4f}")
    kdjax.export_hf(model, f"{config.output}/export", source=config.teacher.path)


if __name__ == "__main__":
    main(*sys.argv[1:])
