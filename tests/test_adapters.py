"""Adapters of `peft` on an INT4 base: all of attention sees them, gradients pass the packed experts, they load again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor
from kimi_k26.quantization_kimi_k26 import KimiK26Int4Linear
from kimi_k26.tests.test_training import DIALOGUES, arguments, collator, losses
from kimi_k26.tests.tiny_models import ON_EXPANDED, ON_LATENTS, make_model, media_prompt, words

peft = pytest.importorskip("peft", reason="adapters need the extra `train`: pip install 'kimi-k26[train]'")

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# Everything a text layer multiplies by but the routed experts.
TEXT = r"language_model\.model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+_proj(_with_mqa)?"


def adapted(model, targets, **changes):
    """With a random adapter, so that it shows in the logits."""
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **changes)
    return peft.get_peft_model(model, config)


def load(folder, **kwargs):
    return KimiK26ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **kwargs)


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("few_queries", [ON_LATENTS, ON_EXPANDED], ids=["latents", "expanded"])
@pytest.mark.parametrize(
    "targets", [ATTENTION, ["kv_b_proj"], TEXT, "all-linear"], ids=["attention", "kv_b", "text", "all"]
)
def test_merged_weights_give_what_the_adapter_gave(targets, few_queries):
    model, ids = make_model(quantized=True, few_queries=few_queries), words(2, 9)
    plain = logits_of(model, ids)
    wrapped = adapted(model, targets).eval()
    beside = logits_of(wrapped, ids)
    assert not torch.allclose(beside, plain, atol=1e-2)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits_of(wrapped, ids), plain, rtol=0, atol=1e-5)
    continued = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    merged = wrapped.merge_and_unload()
    assert type(merged) is KimiK26ForConditionalGeneration
    assert type(merged.language_model.model.layers[1].self_attn.kv_b_proj) is torch.nn.Linear
    torch.testing.assert_close(logits_of(merged, ids), beside, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=4, do_sample=False), continued)


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"], ids=["attention", "all"])
def test_gradients_reach_the_adapters_alone(targets):
    """Through packed experts and through the expansion that attention reads as a weight."""
    model = make_model(quantized=True)
    wrapped = adapted(model, targets).train()
    ids, pixels, grids = media_prompt()
    wrapped(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=ids).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name
    assert any("kv_b_proj.lora_A" in name for name, _ in wrapped.named_parameters())
    experts = [m for n, m in wrapped.named_modules() if ".experts." in n and n.endswith("_proj")]
    assert len(experts) == 2 * 8 * 3 and all(type(m) is KimiK26Int4Linear for m in experts)


def test_packed_experts_take_no_adapter():
    with pytest.raises(ValueError, match="KimiK26Int4Linear.* is not supported"):
        adapted(make_model(quantized=True), ["gate_proj"])
    plain = adapted(make_model(), ["gate_proj"])  # bfloat16 or float32 experts are ordinary layers
    assert any(".experts.7.gate_proj.lora_A" in name for name, _ in plain.named_parameters())


def test_saved_and_loaded_on_a_fresh_base(tiny_checkpoint, tmp_path):
    processor = KimiK26Processor.from_pretrained(tiny_checkpoint)
    wrapped = adapted(load(tiny_checkpoint), TEXT).eval()
    batch = collator(processor)(DIALOGUES)
    batch.pop("labels")
    with torch.no_grad():
        expected = wrapped(**batch).logits
    wrapped.save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    base = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert size < 0.2 * base
    again = peft.PeftModel.from_pretrained(load(tiny_checkpoint), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    # The library's own way, without a wrapper, and back to the base.
    own = load(tiny_checkpoint)
    with torch.no_grad():
        plain = own(**batch).logits
        own.load_adapter(str(tmp_path))
        assert torch.equal(own(**batch).logits, expected)
        own.disable_adapters()
        torch.testing.assert_close(own(**batch).logits, plain, rtol=0, atol=1e-5)


def test_auto_classes_find_the_base_of_an_adapter(tiny_checkpoint, tmp_path):
    trusted = {"dtype": torch.float32, "trust_remote_code": True}
    base, ids = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, **trusted), words(1, 12)
    wrapped = adapted(base, ATTENTION).eval()
    wrapped.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, **trusted).eval()
    assert torch.equal(logits_of(again, ids), logits_of(wrapped, ids))


def test_merged_and_saved_it_is_a_checkpoint_as_any_other(tiny_checkpoint, tmp_path):
    model, ids = adapted(load(tiny_checkpoint), TEXT).eval(), words(1, 12)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = KimiK26ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, ids), logits_of(merged, ids))
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight_packed"
    assert torch.equal(again.get_parameter(name), load(tiny_checkpoint).get_parameter(name))


def test_prepared_as_peft_prepares_a_quantized_base(tiny_checkpoint, tmp_path):
    """It casts what is not packed to float32, scales among it: the weights they stand for, and what is saved, stay the same."""
    base, ids = load(tiny_checkpoint), words(1, 12)
    before = logits_of(base, ids)
    prepared = peft.prepare_model_for_kbit_training(base)
    assert torch.equal(logits_of(prepared, ids), before)
    adapted(prepared, TEXT).merge_and_unload().bfloat16().save_pretrained(tmp_path)
    again = KimiK26ForConditionalGeneration.from_pretrained(tmp_path)
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight_scale"
    assert torch.equal(again.get_parameter(name), load(tiny_checkpoint).get_parameter(name))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_vision_tower_through_recomputed_layers(reentrant):
    model = make_model(quantized=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wrapped = adapted(model, ["wqkv", "wo", "q_b_proj"]).train()
    ids, pixels, grids = media_prompt()
    wrapped(input_ids=ids, pixel_values=pixels, grid_thws=grids, labels=ids).loss.backward()
    without = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert any("vision_tower" in name for name, _ in wrapped.named_parameters()) and not without
    model.disable_input_require_grads()
    assert not model.vision_tower.patch_embed._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_trainer_teaches_an_adapter(checkpointing, dtype, tiny_checkpoint, tmp_path):
    base = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TEXT, task_type="CAUSAL_LM")
    if checkpointing:  # as the library asks for: reentrant checkpoints need an input that takes a gradient
        base.enable_input_require_grads()
    torch.manual_seed(0)  # an adapter begins with random weights
    wrapped = peft.get_peft_model(base, config)
    saving = {"gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        saving["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    trainer = Trainer(
        wrapped,
        arguments(tmp_path, max_steps=8, learning_rate=5e-3, **saving),
        data_collator=collator(KimiK26Processor.from_pretrained(tiny_checkpoint)),
        train_dataset=DIALOGUES * 4,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    for name, parameter in wrapped.named_parameters():
        inner = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert "lora_" in name or torch.equal(parameter, before[inner]), name


@torch.no_grad()
@pytest.mark.parametrize("targets", [["o_proj"], ["q_a_proj"], ["kv_b_proj"], r".*shared_experts\.(up|down)_proj", ["lm_head"], "all-linear"], ids=str)
def test_a_step_hears_an_adapter(targets, tiny_checkpoint):
    """bfloat16 with a cache, as the native kernels would have it, whose layers are `Linear`, too."""
    base = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    ids = words(1, 6)
    base(ids, use_cache=True)
    wrapped = adapted(base, targets).eval()
    out = wrapped(input_ids=ids[:, :5], use_cache=True)
    step = wrapped(input_ids=ids[:, 5:], past_key_values=out.past_key_values).logits
    exact = logits_of(wrapped.to(torch.float32), ids)[:, -1:]
    assert (step.float() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_the_fast_experts_serve_an_adapter_too(tiny_checkpoint):
    """bfloat16 and few rows: the experts' own CPU layout, beside adapters everywhere else."""
    base = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    wrapped = adapted(base, TEXT).eval()
    ids = words(1, 6)
    fast = logits_of(wrapped, ids)
    assert base.expert_store.misses > 0
    exact = logits_of(wrapped.to(torch.float32), ids)
    assert (fast.float() - exact).abs().max() < 0.05 * exact.abs().max()
