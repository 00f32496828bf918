"""``moe-fused generate``, ``quantize`` and ``merge`` on a tiny model."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Qwen3MoeConfig

import moe_fused
from moe_fused.commands.generate import _new_tokens
from moe_fused.integrations.quantizer.packed_experts import packed_modules
from tests.support import REPOSITORY, python_path

from .adapters import peft_logits, per_expert_adapter
from .cli import Command, save_tokenizer
from .four_bit import build, load, logits, same_state
from .models import QWEN3_MOE, tokens
from .saved import config_of, tensors_of

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense float32 model with a tokenizer, a chat template and a generation config."""
    path = tmp_path_factory.mktemp("cli") / "model"
    built = build(dtype=torch.float32, use_cache=True)
    built.generation_config.update(do_sample=False, eos_token_id=None, max_length=None, pad_token_id=0)
    built.save_pretrained(path)
    save_tokenizer(path)
    (path / "README.md").write_text("about the model")
    (path / "LICENSE").write_text("terms")
    return path


def make_adapter(model: Path, path: Path, **options: object) -> Path:
    """An adapter that stock PEFT makes and saves, with no factor zero."""
    adapted = get_peft_model(load(model), LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of attention only."""
    return make_adapter(model, tmp_path_factory.mktemp("cli") / "adapter", **ATTENTION)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as ``moe-fused quantize`` makes it, with fused experts."""
    path = tmp_path_factory.mktemp("cli") / "quantized"
    with pytest.MonkeyPatch.context() as patch:
        from moe_fused.commands.quantize import Layout, quantize

        patch.setattr(sys, "stdout", io.StringIO())
        quantize(str(model), path, layout=Layout.FUSED)
    moe_fused.disable()
    return path


# generate


def expected_text(model: nn.Module, path: Path, prompt: str, new: int) -> str:
    """What the model says after ``prompt``, by a loop over argmax."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_generates_what_the_model_says(model: Path, command: Command) -> None:
    ended = command("generate", model, "--prompt", "w7 w8", "--no-chat", "--max-new-tokens", 6, "--device", "cpu")
    assert ended.status == 0, ended
    assert ended.stdout.strip() == expected_text(load(model), model, "w7 w8", 6)
    assert "6 tokens in" in ended.stderr


def test_as_a_user_types_it(model: Path) -> None:
    """The command in a process of its own prints nothing but the text on standard output."""
    ended = subprocess.run(
        [sys.executable, "-m", "moe_fused", "generate", model, "--no-chat", "--max-new-tokens", "4", "--device", "cpu"],
        input="w7 w8\n",
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == expected_text(load(model), model, "w7 w8", 4)


def test_the_prompt_is_a_turn_where_there_is_a_template(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w7 w8"))
    ended = command("generate", model, "--max-new-tokens", 5, "--temperature", 0, "--device", "cpu")
    assert ended.status == 0, ended
    assert ended.stdout.strip() == expected_text(load(model), model, "w3 w7 w8 w4", 5)


def test_generates_with_an_adapter(model: Path, adapter: Path, command: Command) -> None:
    options = ("--prompt", "w7 w8", "--no-chat", "--max-new-tokens", 6, "--device", "cpu")
    ended = command("generate", model, "--adapter", adapter, *options)
    assert ended.status == 0, ended
    adapted = expected_text(PeftModel.from_pretrained(load(model), adapter), model, "w7 w8", 6)
    assert ended.stdout.strip() == adapted != expected_text(load(model), model, "w7 w8", 6)


def test_samples_repeat_with_a_seed(model: Path, command: Command) -> None:
    options = ("--prompt", "w7", "--max-new-tokens", 12, "--temperature", 5, "--top-p", 0.9, "--device", "cpu")
    one, same, other = (command("generate", model, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other


def test_generates_in_4bit(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    generate = transformers.Qwen3MoeForCausalLM.generate

    def counting(self: nn.Module, **options: object) -> torch.Tensor:
        packed.append(len(list(packed_modules(self))))
        return generate(self, **options)

    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "generate", counting)
    ended = command("generate", model, "--load-in-4bit", "--prompt", "w7", "--max-new-tokens", 3, "--device", "cpu")
    assert ended.status == 0, ended
    assert packed == [2]
    assert len(ended.stdout.split()) == 3


def test_generates_as_much_as_there_is_room_for(model: Path, command: Command) -> None:
    """By default it generates until the model's 64 positions are full."""
    ended = command("generate", model, "--prompt", "w7", "--device", "cpu")
    assert ended.status == 0, ended
    assert "61 tokens in" in ended.stderr


def test_an_adapter_of_a_run_that_has_not_ended(model: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "finetune.yaml").write_text("model: m")
    ended = command("generate", model, "--adapter", tmp_path, "--prompt", "w7")
    assert ended.status == 1
    assert ended.error.endswith("has no adapter_config.json: its run has not ended, only its checkpoints can be used")


@pytest.mark.parametrize(
    "options, words",
    [
        (["nowhere/at/all", "--prompt", "w7"], "MODEL nowhere/at/all is neither a directory nor a name on the Hub"),
        (["{empty}", "--prompt", "w7"], "has no config.json"),
        (["{model}", "--prompt", " "], "--prompt must not be empty"),
        (["{model}", "--prompt", "w7", "--adapter", "{empty}"], "--adapter {empty} has no adapter_config.json"),
        (["{model}", "--prompt", "w7", "--device", "tpu9"], "--device tpu9 cannot be used here"),
        (
            ["{model}", "--prompt", "w7", "--device", "cpu", "--cuda-graphs"],
            "--cuda-graphs needs a GPU of CUDA or ROCm",
        ),
        (["{model}", "--prompt", "w7", "--max-new-tokens", "99"], "at most 61 after a prompt of 3 tokens"),
        (
            ["{model}", "--prompt", "w7 " * 70],
            "--prompt is too long: it makes 72 tokens, and the model has 64 positions",
        ),
        (["{model}", "--prompt", "w7\udcff"], "--prompt must be text in UTF-8"),
        (["{model}", "--prompt", "w7", "--temperature", "0", "--top-p", "0.5"], "--top-p has no effect with --temp"),
        (["{model}", "--prompt", "w7", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["{model}", "--prompt", "w7", "--temperature", "-1"], "--temperature"),
        (["{model}", "--prompt", "w7", "--dtype", "int8"], "--dtype"),
        (["{quantized}", "--prompt", "w7", "--load-in-4bit"], "is quantized already"),
        (["--prompt", "w7"], "MODEL"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ",
)
def test_generate_refuses(
    options: list[str], words: str, model: Path, quantized: Path, tmp_path: Path, command: Command
) -> None:
    places = {"model": str(model), "empty": str(tmp_path), "quantized": str(quantized)}
    ended = command("generate", *(option.format(**places) for option in options))
    assert ended.status in (1, 2)
    assert words.format(**places) in ended.error
    assert ended.stdout == ""


def test_chat_needs_a_template(model: Path, tmp_path: Path, command: Command) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, template=False)
    options = ("generate", tmp_path, "--prompt", "w7", "--max-new-tokens", 1, "--device", "cpu")
    assert "--chat needs a chat template" in command(*options, "--chat").error
    assert command(*options).status == 0


def test_a_template_that_does_not_take_the_prompt(model: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    options = ("generate", tmp_path, "--prompt", "w7", "--max-new-tokens", 1, "--device", "cpu")
    for template, reason in (
        ("{{ raise_exception('no user') }}", "no user"),
        ("{{ open", "unexpected end of template"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        error = command(*options).error
        assert f"the chat template of MODEL {tmp_path} does not take the prompt: {reason}" in error
        assert error.endswith("--no-chat continues the prompt as it is")
    assert command(*options, "--no-chat").status == 0


def test_a_config_of_a_model_that_transformers_does_not_have(model: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "foo"}')
    error = command("generate", tmp_path, "--prompt", "w7", "--device", "cpu").error
    assert error.startswith(f"error: MODEL {tmp_path}: config.json is not one that can be read here: ")
    assert "model type `foo`" in error
    assert "pip install" not in error  # only the first sentence


def test_generate_needs_a_tokenizer(tmp_path: Path, command: Command) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path)
    ended = command("generate", tmp_path, "--prompt", "w7", "--device", "cpu")
    assert f"MODEL {tmp_path} has no tokenizer: tokenizer.json and the like are missing" in ended.error


def test_no_prompt(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for closed_or_terminal in (terminal, None):
        monkeypatch.setattr(sys, "stdin", closed_or_terminal)
        assert "--prompt is missing" in command("generate", model).error


@pytest.mark.parametrize(
    "given, words", [(b" \n", "must not be empty"), (b"w7 \xff", "must be text in UTF-8")], ids=["empty", "bytes"]
)
def test_standard_input_must_be_text(
    given: bytes, words: str, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python reads bytes that are no text either as an error or as halves of surrogate pairs."""
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        error = command("generate", model, "--device", "cpu").error
        assert error.startswith(f"error: standard input, which is read without --prompt, {words}")


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_model_that_a_stream_does_not_know(
    settings: dict[str, Any], model: Path, tmp_path: Path, command: Command
) -> None:
    """Beam search has no text before its end, and of several sequences one is printed."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    options = ("--prompt", "w7 w8", "--no-chat", "--max-new-tokens", 6, "--device", "cpu")
    ended = command("generate", tmp_path, *options)
    assert (ended.status, ended.stderr.splitlines()[-1][:11]) == (0, "6 tokens in"), ended
    assert 0 < len(ended.stdout.split()) <= 6  # without special tokens, which may be sampled
    if "num_beams" in settings:
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer("w7 w8", return_tensors="pt")["input_ids"]
        found = load(model).generate(ids, num_beams=3, max_new_tokens=6)
        assert ended.stdout.strip() == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        greedy = command("generate", tmp_path, *options, "--temperature", 0)
        assert greedy.stdout.strip() == expected_text(load(model), model, "w7 w8", 6)


def test_a_prompt_without_a_token() -> None:
    config = Qwen3MoeConfig(max_position_embeddings=8)
    with pytest.raises(ValueError, match="--prompt must have a token, and the tokenizer makes none of it"):
        _new_tokens(config, 0, None)


def test_a_model_without_a_limit_of_positions() -> None:
    config = PreTrainedConfig()
    assert [_new_tokens(config, 9, wanted) for wanted in (None, 7, 5000)] == [512, 7, 5000]


def test_a_name_that_the_hub_does_not_have(command: Command) -> None:
    """A name that the Hub does not have, or that is no valid name, is an error in one line, without a traceback."""
    assert "MODEL nobody/nothing cannot be read" in command("generate", "nobody/nothing", "--prompt", "w7").error


def test_an_adapter_that_the_hub_does_not_have(model: Path, command: Command) -> None:
    """What cannot be reached is not called incomplete."""
    ended = command("generate", model, "--adapter", "nobody/nothing", "--prompt", "w7", "--device", "cpu")
    assert ended.error.startswith("error: --adapter nobody/nothing: it cannot be read: ")


@pytest.mark.parametrize(
    "package, arguments",
    [
        ("bitsandbytes", ("generate", "org/m", "--prompt", "w7", "--load-in-4bit")),
        ("peft", ("generate", "org/m", "--prompt", "w7", "--adapter", "a/b")),
        ("bitsandbytes", ("quantize", "org/m", "out")),
        ("accelerate", ("quantize", "org/m", "out")),
        ("peft", ("merge", "org/m", "a/b", "out")),
    ],
)
def test_missing_packages(
    package: str, arguments: tuple[str, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ended = command(*arguments)
    assert ended.status == 1
    assert f"needs {package}, which is not installed: pip install 'moe-fused[" in ended.error


# quantize


@pytest.mark.parametrize("quant_type, double", [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_quantizes(layout: str, quant_type: str, double: bool, model: Path, tmp_path: Path, command: Command) -> None:
    options = ["--format", layout, "--quant-type", quant_type, *([] if double else ["--no-double-quant"])]
    ended = command("quantize", model, tmp_path / "out", *options, "--device", "cpu")
    assert ended.status == 0, ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    saved = config_of(tmp_path / "out")["quantization_config"]
    assert (saved["bnb_4bit_quant_type"], saved["bnb_4bit_use_double_quant"]) == (quant_type, double)
    names = tensors_of(tmp_path / "out")
    assert any(".experts.0.up_proj.weight" in name for name in names) == (layout == "per-expert")
    assert any(name.endswith(".experts.gate_up_proj") for name in names) == (layout == "fused")
    # What Transformers makes of the dense model with the same settings.
    moe_fused.enable()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # On the same device: bitsandbytes quantizes to other bits on a GPU.
    expected = load(model, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu")
    assert same_state(load(tmp_path / "out", device_map="cpu"), expected)
    assert names["model.norm.weight"].dtype == torch.bfloat16


def test_what_stands_beside_the_weights(model: Path, quantized: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"):
        assert (quantized / name).read_bytes() == (model / name).read_bytes()
    assert not (quantized / "README.md").exists()  # which is about the dense model
    before, after = (
        json.loads((path / "generation_config.json").read_text(encoding="utf-8")) for path in (model, quantized)
    )
    assert after == before


def test_dry_run_writes_nothing_and_knows_the_size(
    model: Path, quantized: Path, tmp_path: Path, command: Command
) -> None:
    ended = command("quantize", model, tmp_path / "out", "--dry-run")
    assert ended.status == 0, ended
    assert list(tmp_path.iterdir()) == []
    predicted = float(ended.stdout.splitlines()[1].split(": ")[1].split()[0]) * 1e9
    stored = sum(value.nbytes for value in tensors_of(quantized).values())
    # The code, offset and format of each matrix, which weigh something beside its 2048 weights.
    assert predicted < stored < 1.2 * predicted


def test_overwriting(model: Path, quantized: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "exists: choose another path" in command("quantize", model, target).error
    assert "so that it is no model" in command("quantize", model, target, "--overwrite").error
    (target / "config.json").write_text("{}")
    assert command("quantize", model, target, "--overwrite", "--device", "cpu").status == 0
    assert not (target / "notes.txt").exists()
    assert "source and target must be apart" in command("quantize", model, model, "--overwrite").error
    assert "is quantized already" in command("quantize", quantized, tmp_path / "again").error
    assert "OUTPUT" in command("quantize", model, tmp_path / "no" / "out").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_experts_that_cannot_be_packed(tmp_path: Path, command: Command) -> None:
    build(hidden_size=40, head_dim=8, moe_intermediate_size=12).save_pretrained(tmp_path / "odd")
    ended = command("quantize", tmp_path / "odd", tmp_path / "out")
    assert "the experts of Qwen3MoeForCausalLM cannot be held in 4 bits" in ended.error
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    ).save_pretrained(tmp_path / "llama")
    assert "cannot be held in 4 bits: it has none" in command("quantize", tmp_path / "llama", tmp_path / "out").error


# merge


@pytest.mark.parametrize("options", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_merges_into_a_dense_model(options: dict[str, object], model: Path, tmp_path: Path, command: Command) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    ended = command("merge", model, adapter, tmp_path / "out")
    assert ended.status == 0, ended
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(model), adapter)(tokens()).logits
        merged = load(tmp_path / "out")
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - logits(load(model))).abs().max() > 1e-2
    assert tensors_of(tmp_path / "out").keys() == tensors_of(model).keys()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_merges_an_adapter_of_separate_experts(tmp_path: Path, command: Command) -> None:
    """An adapter with a matrix for each expert, whose names PEFT converts while loading, is merged."""
    QWEN3_MOE.build().save_pretrained(tmp_path / "model")
    adapter = per_expert_adapter(tmp_path / "adapter", shared=True)
    ended = command("merge", tmp_path / "model", adapter, tmp_path / "out")
    assert ended.status == 0, ended
    with torch.no_grad():
        merged = load(tmp_path / "out")(tokens()).logits
    torch.testing.assert_close(merged, peft_logits(adapter), rtol=1e-4, atol=1e-4)


def test_merges_into_what_4_bits_dequantize_to(
    quantized: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    ended = command("merge", quantized, adapter, tmp_path / "out", "--dtype", "float32")
    assert ended.status == 0, ended
    assert "in 4 bits: will be dequantized" in ended.stdout
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert {value.dtype for value in tensors_of(tmp_path / "out").values()} == {torch.float32}
    moe_fused.enable()
    base = load(quantized, device_map="cpu")
    base.dequantize(torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base.float(), adapter)(tokens()).logits
    moe_fused.disable()  # the result needs nothing of ours
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_merge_dry_run(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    ended = command("merge", model, adapter, tmp_path / "out", "--dry-run", "--dtype", "bfloat16")
    assert ended.status == 0, ended
    assert "dense, bfloat16" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_merge_refuses(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    other = tmp_path / "other"
    build(dtype=torch.float32, num_hidden_layers=3).save_pretrained(other)
    target = tmp_path / "out"
    # A merge would leave the layer that the adapter does not know as it was, which nobody asked for.
    ended = command("merge", other, adapter, target)
    assert f"ADAPTER {adapter} does not fit Qwen3MoeForCausalLM" in ended.error
    build(dtype=torch.float32, num_hidden_layers=1).save_pretrained(other)
    assert "layers.1." in command("merge", other, adapter, target).error  # as with a layer too many
    build(dtype=torch.float32, num_attention_heads=2).save_pretrained(other)
    assert "does not fit" in command("merge", other, adapter, target).error
    assert "ADAPTER nowhere is neither" in command("merge", model, "nowhere", target).error
    assert "OUTPUT" in command("merge", model, adapter).error
    assert "exists: choose another path" in command("merge", model, adapter, other).error
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))
