"""TRL's side of ``benchmarks.trl_gkd``: runs in an environment of its own and imports nothing of this project.

python trl_side.py FOLDER: reads job.json and documents.json there, writes result.json.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def collate(documents: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(d["ids"]) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        count, loss = len(document["ids"]), torch.tensor(document["loss"], dtype=torch.bool)
        ids[row, :count] = torch.tensor(document["ids"])
        mask[row, :count] = 1
        labels[row, :count][loss] = ids[row, :count][loss]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class InOrder(GKDTrainer):
    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32) for name in ("student", "teacher")
    )
    documents = json.loads((folder / "documents.json").read_text())
    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job["batch"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    clock = Clock()
    trainer = InOrder(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(documents),
        processing_class=AutoTokenizer.from_pretrained(job["teacher"]),
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    import trl

    result = {"losses": losses, "times": clock.times, "trl": trl.__version__, "torch": torch.__version__}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
