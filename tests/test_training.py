"""Training: labels, Trainer and plain loops, precision, packing, balance of the experts, adapters on an INT4 base."""

import copy
import itertools
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, KimiK26Processor
from kimi_k26.tests.tiny_models import make_model, words

IGNORED = -100
FROZEN = ("weight_packed", "weight_scale", "weight_shape", "e_score_correction_bias")


@pytest.fixture(autouse=True)
def precision_of_one_test():
    """accelerate keeps the precision of a process, and transformers 4 hands it on in the environment."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return KimiK26Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def model(tiny_checkpoint):
    """INT4 experts; everything else in float32."""
    return KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def dialogue(colour: str, size: tuple[int, int], more: str = "") -> list[dict]:
    picture = {"type": "image", "image": Image.new("RGB", size, colour)}
    content = [picture, {"type": "text", "text": f"Which colour is it?{more}"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {colour}."}]


DIALOGUES = [
    dialogue("red", (56, 56)),
    dialogue("green", (28, 84), " Please say it."),
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help you today?"}],
    dialogue("blue", (30, 30)),
]


def collator(processor, padding_side: str = "right"):
    def collate(dialogues: list) -> dict:
        inputs = processor.apply_chat_template(
            dialogues,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            padding=True,
            padding_side=padding_side,
        )
        spoken = inputs.pop("assistant_masks")
        return {**inputs, "labels": inputs["input_ids"].masked_fill(spoken == 0, IGNORED)}

    return collate


def arguments(folder, **changes) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 0,
    }
    return TrainingArguments(**{**given, **changes})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model, *endings) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not endings or n.endswith(endings)}


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_the_assistants_words_alone(processor):
    """Several pictures, a video, thinking, a tool call: what is learnt is exactly what the assistant wrote."""
    frames = [Image.new("RGB", (40, 40), (10 * k, 0, 0)) for k in range(12)]
    picture = {"type": "image", "image": Image.new("RGB", (100, 60), "red")}
    seen = [picture, {"type": "text", "text": "一 two"}, {"type": "video", "video": frames, "fps": 4}, picture]
    call = {"id": "functions.look:0", "type": "function", "function": {"name": "look", "arguments": '{"at": "图"}'}}
    talk = [
        {"role": "system", "content": "You are Kimi."},
        {"role": "user", "content": seen},
        {"role": "assistant", "content": "I look…", "reasoning": "Hm 图.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.look:0", "content": [picture, {"type": "text", "text": "red"}]},
        {"role": "assistant", "content": "红色 red.", "reasoning": "It is red."},
    ]
    called = (
        "I look…<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"at": "图"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    )
    spoken = [
        f"Hm 图.</think>{called}It is red.</think>红色 red.<|im_end|>",
        "Hello! How can I help you today?<|im_end|>",
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    for side in ("left", "right"):
        batch = processor.apply_chat_template(
            [talk, DIALOGUES[2]],
            tools=[tool],
            preserve_thinking=True,  # without it the template drops the reasoning of what is already answered
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            padding=True,
            padding_side=side,
        )
        assert batch["input_ids"].shape == batch["assistant_masks"].shape
        pads = processor.image_token_id
        merged = int(batch["grid_thws"][:, 1:].prod(-1).sum()) // 4
        assert int((batch["input_ids"] == pads).sum()) == merged and len(batch["grid_thws"]) == 5
        for ids, mask, attended, expected in zip(
            batch["input_ids"], batch["assistant_masks"], batch["attention_mask"], spoken
        ):
            assert processor.decode(ids[mask == 1]) == expected
            assert not (mask.bool() & ~attended.bool()).any() and pads not in ids[mask == 1]


def test_only_labelled_words_count(processor, model):
    batch = collator(processor)(DIALOGUES)
    loss = model(**batch).loss
    changed = {**batch, "labels": batch["labels"].clone()}
    row, column = (changed["labels"] >= 0).nonzero()[-1]
    changed["labels"][row, column] = IGNORED
    logits = model(**batch).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    count = int((batch["labels"] >= 0).sum())
    torch.testing.assert_close(loss, each.sum() / count)
    torch.testing.assert_close(model(**changed).loss, (each.sum() - each[row, column - 1]) / (count - 1))


# -- Trainer -----------------------------------------------------------------------------------------------------------


def test_trainer_on_padded_batches_with_pictures(processor, model, tmp_path):
    before = weights(model)
    evaluated = DIALOGUES[:2] + DIALOGUES[2:3]
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=1),
        data_collator=collator(processor),
        train_dataset=DIALOGUES * 8,
        eval_dataset=evaluated,
        compute_metrics=lambda found: {"rows": len(found.label_ids)},
    )
    at_first = trainer.evaluate()
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
    after = weights(model)
    for name, value in after.items():
        frozen = name.endswith(FROZEN) or ".experts." in name
        unseen = "embed_tokens" in name
        assert torch.equal(value, before[name]) == frozen or unseen, name
    found = trainer.evaluate()
    assert found["eval_loss"] < at_first["eval_loss"] and found["eval_rows"] == len(evaluated)
    # Rows with pictures and without, of several lengths, one batch each.
    predicted = trainer.predict(evaluated).predictions
    longest = collator(processor)(evaluated)["input_ids"].shape[1]
    assert predicted.shape == (len(evaluated), longest, model.vocab_size)

    trainer.save_model(str(tmp_path / "saved"))
    again = KimiK26ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, value in weights(again).items():
        assert torch.equal(value, after[name]) and value.dtype == after[name].dtype, name


def test_trainer_saves_the_processor_too(processor, model, tmp_path):
    """The library adds the tokenizer's end of text to the ids that end an answer; the end of a turn stays one."""
    turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1),
        data_collator=collator(processor),
        train_dataset=DIALOGUES,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, beside = (one.from_pretrained(tmp_path / "saved") for one in (type(model), KimiK26Processor))
    ends = again.generation_config.eos_token_id
    assert turn in (ends if isinstance(ends, list) else [ends])
    batch, expected = (collator(one)(DIALOGUES) for one in (beside, processor))
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**expected).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "way",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["checkpointing", "reentrant", "bf16", "both"],
)
def test_trainer_saves_memory(way, processor, model, tmp_path):
    plain, plans = copy.deepcopy(model), ({}, way)
    runs = []
    for one, plan in zip((plain, model), plans):
        trainer = Trainer(
            one,
            arguments(tmp_path, max_steps=4, **plan),
            data_collator=collator(processor),
            train_dataset=DIALOGUES * 4,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1][-1] < runs[1][0]
    close = {"rel": 0.05} if "bf16" in way else {"rel": 1e-3}
    assert runs[1] == pytest.approx(runs[0], **close)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if not n.endswith(FROZEN))


def test_accumulated_steps_are_one_of_the_whole_batch(processor, model, tmp_path):
    """The mean is over the words of all parts, however unevenly they are spread."""
    results = []
    for rows, parts in ((4, 1), (2, 2), (1, 4)):
        one = copy.deepcopy(model)
        plan = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer = Trainer(one, plan, data_collator=collator(processor), train_dataset=DIALOGUES)
        trainer.train()
        results.append((losses(trainer)[0], weights(one)))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        torch.testing.assert_close(found, results[0][1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(results[0][1]["mm_projector.proj.0.weight"], weights(model)["mm_projector.proj.0.weight"])


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_stopped_run_goes_on_the_same(processor, model, tmp_path):
    def trainer(folder, one, *callbacks):
        plan = arguments(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3)
        collate = collator(processor)
        return Trainer(one, plan, data_collator=collate, train_dataset=DIALOGUES * 4, callbacks=list(callbacks))

    fresh = [copy.deepcopy(model) for _ in range(2)]
    whole = trainer("whole", model)
    whole.train()
    trainer("stopped", fresh[0], StopAt(3)).train()
    resumed = trainer("stopped", fresh[1])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and losses(resumed)[3:] == losses(whole)[3:]
    torch.testing.assert_close(weights(fresh[1]), weights(model), rtol=0, atol=0)


# -- plain loops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plain_loop_with_accelerate(precision, processor, model):
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(DIALOGUES * 4, batch_size=2, collate_fn=collator(processor))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared.train()
    seen = []
    for batch in itertools.chain(loader, loader):
        with accelerator.accumulate(prepared):
            loss = prepared(**batch, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(float(loss.detach()))
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    restored = accelerator.unwrap_model(prepared)
    assert restored is model and all(p.isfinite().all() for p in model.parameters() if p.is_floating_point())


def test_autocast_gradients_are_near_the_exact_ones(processor, tiny_checkpoint):
    config = KimiK26Config.from_pretrained(tiny_checkpoint)
    config.text_config.num_experts_per_tok = config.text_config.n_routed_experts  # no choice hangs on a rounding
    model = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, config=config, dtype=torch.float32)
    batch = collator(processor)(DIALOGUES)

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact, found = gradients(False), gradients(True)
    assert exact.keys() == found.keys()
    alike = {
        name: float(F.cosine_similarity(exact[name].flatten(), found[name].flatten(), dim=0))
        for name in exact
        if exact[name].norm() > 1e-4
    }
    assert len(alike) > 50 and min(alike.values()) > 0.999, min(alike.items(), key=lambda item: item[1])


def test_packed_rows_learn_what_padded_ones_do(processor, model):
    """Dialogues one behind the other in a single row, told apart by their positions."""
    collate = collator(processor)
    padded = collate(DIALOGUES)
    each = [collate([one]) for one in DIALOGUES]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in each], dim=1),
        "labels": torch.cat([one["labels"] for one in each], dim=1),
        "position_ids": torch.cat([torch.arange(one["input_ids"].shape[1]) for one in each]).unsqueeze(0),
        "pixel_values": padded["pixel_values"],
        "grid_thws": padded["grid_thws"],
    }

    def gradients(batch):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(padded)
    torch.testing.assert_close(gradients(packed), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients(collator(processor, "left")(DIALOGUES)), expected, rtol=1e-4, atol=1e-6)


def test_the_librarys_collator_of_packed_rows():
    model = make_model(attn="sdpa")
    texts = [words(1, length, seed=length)[0].tolist() for length in (5, 9, 2)]
    packed = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    packed = {name: packed[name] for name in ("input_ids", "labels", "position_ids")}
    alone = [model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss for text in texts]
    counts = [len(text) - 1 for text in texts]
    mean = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    torch.testing.assert_close(model(**packed).loss, mean)


# -- experts -----------------------------------------------------------------------------------------------------------


def loads(model, ids) -> torch.Tensor:
    """Tokens of each expert, `(layers, experts)`."""
    routers = [layer.mlp.gate for layer in model.language_model.model.layers if hasattr(layer.mlp, "gate")]
    chosen = []
    hooks = [router.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for router in routers]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.bincount(one.flatten(), minlength=8) for one in chosen]).float()


def test_the_correction_bias_moved_by_hand_balances_the_load():
    """By the sign of the load error after each step, as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2)."""
    model, ids = make_model(), words(4, 50)
    routers = [layer.mlp.gate for layer in model.language_model.model.layers[1:]]
    for router in routers:
        router.e_score_correction_bias.data.copy_(torch.linspace(-0.3, 0.3, 8))
    at_first = loads(model, ids)
    for step in range(60):
        for router, load in zip(routers, loads(model, ids)):
            router.e_score_correction_bias.data += 0.01 * torch.sign(load.mean() - load)
    at_last, fair = loads(model, ids), ids.numel() * 3 / 8
    assert at_first.min() < 0.3 * fair and at_last.min() > 0.8 * fair and at_last.max() < 1.2 * fair


def balance_loss(router_logits, top_k: int) -> torch.Tensor:
    """DeepSeek-V3, equations 17 to 20: experts · Σ share of tokens · mean normalised score."""
    total = 0.0
    for logits in router_logits:
        scores = logits.sigmoid()
        share = F.one_hot(scores.topk(top_k).indices, logits.shape[1]).sum((0, 1)) / (len(logits) * top_k)
        total = total + logits.shape[1] * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    return total / len(router_logits)


def test_a_balancing_loss_from_the_router_logits():
    model, ids = make_model().train(), words(4, 50)
    optimizer = torch.optim.Adam([layer.mlp.gate.weight for layer in model.language_model.model.layers[1:]], lr=0.01)
    for layer in model.language_model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data.zero_()
        layer.mlp.gate.weight.data *= 3
    at_first, seen = loads(model, ids), []
    for _ in range(20):
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        assert len(out.router_logits) == 2 and out.router_logits[0].shape == (200, 8)
        balance = balance_loss(out.router_logits, top_k=3)
        (0.0 * out.loss + balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(balance.detach()))
    assert seen[-1] < seen[0] and loads(model, ids).var() < 0.7 * at_first.var()


def test_recomputed_layers_take_no_tokens_from_a_cache(model):
    """They write none, so what comes next would see nothing of it, or too much."""
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
    model.train()
    model.gradient_checkpointing_enable()
    try:
        with pytest.raises(ValueError, match="gradient checkpointing .* past_key_values"):
            model(ids, past_key_values=cache)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
