"""A converted model trains as its unconverted twin, whoever drives the training."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from twins import MODELS, assert_equal_training, batches, gradients, small, train, twins

import custom_backprop
from custom_backprop.conversions.deferred import Deferred

pytestmark = pytest.mark.usefixtures("fused")
STEPS = 3


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_loop_in_float64(name):
    """Hugging Face's Llama computes its norms in float32 whatever its dtype, its losses of texts
    too; the rest is then equal to the last digits."""
    stock, ours = (m.double() for m in twins(name))
    inputs = batches(name, STEPS)
    if name == "vit":
        inputs = [b | {"pixel_values": b["pixel_values"].double()} for b in inputs]
    rtol = 1e-12 if name in ("bert", "vit") else 1e-6
    assert_equal_training(train(ours, inputs), train(stock, inputs), rtol)


@pytest.mark.parametrize(
    "name",
    [
        *("MistralForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Phi3ForCausalLM"),
        "Gemma2ForCausalLM",  # caps its logits
        "GraniteForCausalLM",  # divides its logits
        "CohereForCausalLM",  # multiplies them
        "MixtralForCausalLM",  # has experts and a loss of its own for them
        "GPTNeoXForCausalLM",
        "ModernBertForMaskedLM",
        "T5ForConditionalGeneration",
    ],
)
def test_other_architectures(name):
    stock, ours = twins(name)
    inputs = batches(name, 2)
    assert_equal_training(train(ours, inputs), train(stock, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ignored_labels_of_another_number(name):
    stock, ours = twins(name)
    (inputs,) = batches(name, 1)
    usual = stock(**inputs).loss
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 2)
    inputs |= {"ignore_index": 2}
    found, expected = (train(m, [inputs]) for m in (ours, stock))
    assert_equal_training(found, expected)
    torch.testing.assert_close(found[0][0], usual)
    assert isinstance(ours(**inputs).logits, Deferred)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MODELS),
        ("llama", {"label_smoothing_factor": 0.1}),  # a loss that it computes of the logits
        ("gpt2", {"eval_strategy": "steps", "eval_steps": 2, "neftune_noise_alpha": 5.0}),
    ],
)
def test_trainer(name, options, tmp_path):
    """Two batches a step, so the loss is a sum divided by the labels of both."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Record(TrainerCallback):
        def __init__(self):
            self.losses, self.gradients = [], {}

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            self.gradients = self.gradients or gradients(model)

        def on_log(self, args, state, control, logs, **_):
            self.losses += [v for k, v in logs.items() if k in ("loss", "eval_loss")]

    def trained(model, folder):
        arguments = TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            **options,
        )
        record = Record()
        rows = [{k: v[0] for k, v in b.items()} for b in batches(name, 4 * STEPS, rows=1, length=7)]
        data = {"train_dataset": rows, "eval_dataset": rows[:3]}
        Trainer(model, arguments, **data, callbacks=[record]).train()
        return record.losses, record.gradients

    stock, ours = twins(name)
    assert_equal_training(trained(ours, "ours"), trained(stock, "stock"))
    assert list(ours.state_dict()) == list(stock.state_dict())


def test_accelerate():
    from accelerate import Accelerator

    def trained(model):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses, first = [], {}
        torch.manual_seed(2)
        for batch in batches("gpt2", 2 * STEPS):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    first = first or gradients(model)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return losses, first

    stock, ours = twins("gpt2")
    assert_equal_training(trained(ours), trained(stock))


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    class Language(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses, self.gradients = model, [], {}

        def training_step(self, batch, _):
            loss = self.model(**batch).loss
            self.losses.append(loss.detach())
            return loss

        def on_after_backward(self):
            self.gradients = self.gradients or gradients(self)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def trained(model):
        module, rows = Language(model), batches("gpt2", STEPS)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        torch.manual_seed(2)
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
        return module.losses, module.gradients

    stock, ours = twins("gpt2")
    assert_equal_training(trained(ours), trained(stock))


def with_adapters(model, *targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules=list(targets),
        init_lora_weights=False,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return peft.get_peft_model(model, config)


def flops(model, batch):
    """Of the products of forward and backward. A loss may make its gradient in forward."""
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("gate_proj", "down_proj", "lm_head")),
        ("gpt2", ("c_attn", "c_proj")),
    ],
)
@pytest.mark.parametrize("first", ["convert", "peft"])
def test_lora(first, name, targets):
    """Converted before or after it gets its adapters, and with these merged into it."""
    stock = with_adapters(small(name), *targets)
    if first == "convert":
        ours = with_adapters(twins(name)[1], *targets)
    else:
        ours = custom_backprop.convert(with_adapters(small(name), *targets))
    inputs = batches(name, STEPS)
    assert_equal_training(train(ours, inputs), train(stock, inputs))
    assert all("lora" in n for n in gradients(ours))
    merged = [m.merge_and_unload() for m in (ours, stock)]
    assert_close(*(m(**inputs[0]).loss for m in merged))
    assert not any("lora" in n for n, _ in merged[0].named_modules())


def products(model, batch):
    """The flops of the matrix products that forward and backward really make, inside our operators
    too: the counter of flops knows these by their formula."""
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        model(**batch).loss.backward()
    made = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    return sum(e.flops or 0 for e in profile.events() if e.name in made)


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj", "lm_head")], ids=" ".join)
def test_frozen_weights_cost_no_gradient(targets):
    """The whole step makes no more products than torch's."""
    (batch,) = batches("llama", 1)
    stock, ours = (with_adapters(m, *targets) for m in twins("llama"))
    least = products(stock, batch)
    assert products(ours, batch) <= least
    ours.requires_grad_()
    assert products(ours, batch) > 1.2 * least


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name, reentrant):
    pair = twins(name)
    for model in pair:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    stock, ours = (train(m, batches(name, STEPS)) for m in pair)
    assert_equal_training(ours, stock)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_makes_the_same_masks(reentrant):
    model = custom_backprop.convert(small("bert", dropout=0.3))
    start = copy.deepcopy(model.state_dict())
    expected = train(model, batches("bert", STEPS))
    model.load_state_dict(start)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_training(train(model, batches("bert", STEPS)), expected)


def test_checkpointing_by_a_list_of_operators():
    """The products of a block are saved, the rest is made again in backward: aten's operators of a
    stock block, ours of a converted one."""
    aten, ours = torch.ops.aten, torch.ops.custom_backprop
    products = [aten.mm.default, aten.addmm.default, ours.linear_forward.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    (batch,) = batches("bert", 1)
    for model, other in zip(twins("bert"), twins("bert"), strict=True):
        expected, least = train(other, [batch]), flops(other, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert flops(model, batch) > least
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        assert flops(model, batch) == least
        assert_equal_training(train(model, [batch]), expected)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    """In bfloat16 both round; the twin's own distance from float32 is the measure."""
    inputs = batches(name, 1)
    exact = train(small(name), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = (train(m, inputs) for m in twins(name))
    assert_close(ours[0], stock[0], rtol=1e-2, atol=0)
    for n, gradient in exact[1].items():
        error = (stock[1][n] - gradient).norm()
        assert (ours[1][n] - gradient).norm() <= 1.5 * error + 1e-3 * gradient.norm(), n


def test_optimizers_of_ours():
    stock, ours = twins("llama")
    inputs = batches("llama", STEPS)
    expected = train(stock, inputs, torch.optim.AdamW(stock.parameters(), 1e-2))
    optimizer = custom_backprop.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=1e-2)
    assert_equal_training(train(ours, inputs, optimizer), expected)


def test_clipped_and_scaled_and_averaged():
    """clip_grad_norm_, GradScaler and AveragedModel see the parameters that they know."""

    def trained(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        losses, norms = [], {}
        for i, batch in enumerate(batches("vit", STEPS)):
            optimizer.zero_grad()
            loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms[str(i)] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            averaged.update_parameters(model)
            losses.append(averaged(**batch).loss.detach())
        return losses, norms

    stock, ours = twins("vit")
    assert_equal_training(trained(ours), trained(stock))


def test_hooks():
    """Each hook of each module runs as often as in the twin, and sees the same gradient."""

    def trained(model):
        calls, seen = [], {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=name: calls.append(f"before {n}"))
            module.register_forward_hook(lambda *_, n=name: calls.append(f"after {n}"))
        for name in ("bert.encoder.layer.0.intermediate.dense", "cls.predictions.decoder"):
            model.get_submodule(name).register_full_backward_hook(
                lambda m, dx, dy, n=name: seen.update({f"{n}.dx": dx[0], f"{n}.dy": dy[0]})
            )
        losses, _ = train(model, batches("bert", STEPS))
        return calls, (losses, seen)

    stock, ours = twins("bert")
    (calls, found), (expected_calls, expected) = trained(ours), trained(stock)
    assert calls == expected_calls
    assert_equal_training(found, expected)


def test_functional_call_and_gradients_of_each_row():
    """torch.func: the gradient of each row on its own, by vmap."""
    from torch.func import functional_call, grad, vmap

    (batch,) = batches("vit", 1)
    eager = {"attn_implementation": "eager"}  # torch has no rule of vmap for the other

    def of_rows(model):
        def loss(parameters, pixels, label):
            inputs = {"pixel_values": pixels[None], "labels": label[None]}
            return functional_call(model, parameters, (), inputs).loss

        parameters = {n: p.detach() for n, p in model.named_parameters()}
        of_one = vmap(grad(loss), in_dims=(None, 0, 0))
        return [], of_one(parameters, batch["pixel_values"], batch["labels"])

    stock, ours = twins("vit", **eager)
    assert_equal_training(of_rows(ours), of_rows(stock))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("first", ["convert", "parametrize"])
def test_parametrized_layers(first, norm):
    """A parametrization gives a layer a class of its own, with its weight as a property."""
    parametrize = getattr(torch.nn.utils.parametrizations, norm)

    def parametrized(model):
        torch.manual_seed(3)  # of the start vectors of spectral_norm
        for layer in (model.model.layers[0].mlp.down_proj, model.lm_head):
            parametrize(layer)
        return model

    inputs = batches("llama", STEPS)
    expected = train(parametrized(small("llama")), inputs)
    if first == "convert":
        ours = parametrized(custom_backprop.convert(small("llama")))
    else:
        ours = custom_backprop.convert(parametrized(small("llama")))
    assert_equal_training(train(ours, inputs), expected)
