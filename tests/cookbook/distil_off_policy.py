"""`distil_off_policy.py MODEL TEACHER CONVERSATIONS`: the cookbook's off-policy distillation.

Prints KL(teacher || student) before and after it, over the teacher's twenty most likely tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys

import tinker
from tinker_cookbook import checkpoint_utils
from tinker_cookbook.distillation import train_off_policy as distillation
from tinker_cookbook.distillation.datasets import TeacherConfig
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

TARGETS = 20


async def main(model: str, teacher: str, conversations: str) -> None:
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name="qwen3_instruct", max_length=512, batch_size=16
    )
    data = FromConversationFileBuilder(common_config=common, file_path=conversations)
    config = distillation.Config(
        learning_rate=3e-3,
        dataset_configs=[
            distillation.DatasetWithTeacher(
                dataset_builder=data,
                teacher_config=TeacherConfig(base_model=model, load_checkpoint_path=teacher),
            )
        ],
        model_name=model,
        recipe_name="off_policy",
        renderer_name="qwen3_instruct",
        lora_rank=8,
        n_teacher_targets=TARGETS,
        batch_size=16,
        max_steps=10,
        log_path="runs/off_policy",
    )
    service = tinker.ServiceClient()
    taught = await service.create_sampling_client_async(base_model=model, model_path=teacher)
    unseen = data()[0].get_batch(12)
    wanted = await distillation._collect_topk_batch([taught] * len(unseen), unseen, TARGETS)
    before = await service.create_lora_training_client_async(model, rank=8)
    kl = {"before": await divergence(before, wanted)}
    await distillation.main(config)
    state = checkpoint_utils.get_last_checkpoint("runs/off_policy").state_path
    after = await service.create_training_client_from_state_async(state)
    kl["after"] = await divergence(after, wanted)
    print(json.dumps(kl))


async def divergence(student: tinker.TrainingClient, wanted: list[tinker.Datum]) -> float:
    """Return the divergence in nats per token."""
    outputs = (await (await student.forward_async(wanted, "cross_entropy")).result_async()).loss_fn_outputs
    nats = tokens = 0.0
    for datum, output in zip(wanted, outputs, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_torch()
        logprobs = output["logprobs"].to_torch().reshape(weights.shape)
        nats += float((weights * (weights.clamp_min(1e-30).log() - logprobs)).sum())
        tokens += float(weights.sum())
    return nats / tokens


asyncio.run(main(*sys.argv[1:]))
