"""``moe-fused finetune`` as typed on every family: with its default options in 4 bits, or refused before loading."""

from __future__ import annotations

import functools
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe_fused
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.commands import loading
from moe_fused.commands.loading import load_adapter, load_model
from moe_fused.finetune import attention
from moe_fused.finetune import run as run_module
from moe_fused.finetune.adapters import lora_config
from moe_fused.finetune.model import apply_liger
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import ResolvedRun, candidates, set_up
from moe_fused.integrations.quantizer.packed_experts import four_bit_config, packed_modules
from tests.support import REPOSITORY

from .cli import Command
from .conftest import DEVICE
from .families import CHOICES, CHOICES_ON_GPU, NAMES, save_family
from .finetuning import chats, losses, save_tokenizer, write_jsonl
from .four_bit import BY_ID, FOUR_BIT, NEMOTRON_H, SIZES, build
from .lora import plain, randomize, run
from .models import EXPERTS, GPT_OSS, MODELS, QWEN3_MOE, STACKED, VOCABULARY, ModelCase, experts_modules
from .test_convert_models import CASES as CONVERTED

by_family = pytest.mark.parametrize("case", FOUR_BIT, ids=lambda case: case.id)
# The dtype in which the base is loaded again: fp32 is for a CPU only.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", chats(6))


# What docs/models.md says.


def table(name: str) -> list[list[str]]:
    """The rows of a table of docs/models.md, without its head."""
    text = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    lines = text.partition(f"<!-- {name} begin -->\n")[2].partition(f"<!-- {name} end -->")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_cell_is_what_the_tests_run() -> None:
    """Each column of the table is what the tests run on, the tests of refusals included."""
    columns = [dense_cases(), FOUR_BIT, MODELS, MODELS, CONVERTED, FOUR_BIT]
    ids = [{case.id for case in cases} for cases in columns]
    rows = table("families")
    assert [row[0] for row in rows] == list(NAMES)
    assert {case_id for names in NAMES.values() for case_id in names} == {case.id for case in MODELS}
    for name, *cells in rows:
        for case_id in NAMES[name]:
            by_expert = "✓⁴" if case_id in BY_EXPERT_REFUSED else "✓"
            stacked = "no⁶" if case_id == "gpt_oss" else "no⁵"
            wanted = ["✓" if case_id in column else stacked for column in ids]
            wanted[3] = stacked if case_id in STACKED else by_expert
            assert cells == wanted, name


def dense_cases() -> list[ModelCase]:
    from .test_models import by_model

    cases: list[ModelCase] = list(by_model.args[1])
    return cases


def test_choices_are_what_the_tests_run() -> None:
    said = {}
    for names, attn, packing, modules in table("choices"):
        for name in names.split(", "):
            said[name] = (attn, packing, sorted(modules.split(", ")))
    assert said.keys() == NAMES.keys()
    for name, ids in NAMES.items():
        choice = CHOICES[ids[0]]
        assert said[name] == (choice.attn, choice.packing, sorted(choice.modules)), name


# As typed.


@by_family
def test_finetunes_as_typed(case: ModelCase, command: Command, rows: Path, tmp_path: Path) -> None:
    model, output = save_family(case, tmp_path / "model"), tmp_path / "adapter"
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", output, "--max-steps", "2")
    assert ended.status == 0, ended
    assert len(losses(output)) == 2
    assert all(math.isfinite(loss) for loss in losses(output).values())

    choice = (CHOICES_ON_GPU if torch.cuda.is_available() else CHOICES)[case.id]
    settled = {"attn": "auto", **yaml.safe_load((output / "finetune.yaml").read_text())}
    assert (settled["attn"], settled["packing"]) == (choice.attn, choice.packing)
    assert sorted(settled["attention_modules"]) == sorted(choice.modules)
    trained = load_file(output / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in trained.values())
    untrained = [name for name, value in trained.items() if ".lora_B." in name and not value.any()]
    assert not untrained
    adapted = {name.partition(".lora_")[0] for name in trained}
    assert sum(name.endswith((".experts", ".experts.base_layer")) for name in adapted) == 2 * case.moe_layers
    for name in choice.modules:
        assert any(module_name.endswith(f".{name}") for module_name in adapted), name

    base = load_model(str(model), DTYPE, torch.device(DEVICE), four_bit_config(DTYPE))
    assert len(list(packed_modules(base))) == case.moe_layers
    loaded = load_adapter(base, str(output))  # an error if anything is missing, or has no place
    ids = AutoTokenizer.from_pretrained(output)("1 + 1?", return_tensors="pt").input_ids.to(DEVICE)
    with torch.no_grad():
        used = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            unused = loaded(input_ids=ids).logits
    assert used.isfinite().all()
    assert not torch.equal(used, unused)


def stock_logits(model: Path, adapter: Path, quantize: bool, ids: Tensor) -> Tensor:
    """Logits of an adapter as PEFT and Transformers compute them without this package, over the dequantized base."""
    moe_fused.enable()  # for the weights in 4 bits
    quantization = {"quantization_config": four_bit_config(DTYPE)} if quantize else {}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE, device_map={"": DEVICE}, **quantization)
    if next(packed_modules(base), None) is not None:
        base.dequantize(DTYPE)
    moe_fused.disable()
    base = base.to(DTYPE)
    base.set_experts_implementation("eager")
    with torch.no_grad():
        result: Tensor = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("in_4bit", [False, True], ids=["dense", "nf4"])
@by_family
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of linear layers of the same names beside experts
def test_what_is_trained_is_what_others_read(
    case: ModelCase, in_4bit: bool, command: Command, rows: Path, tmp_path: Path
) -> None:
    """The adapter, its export by expert and the merged model give the logits of stock PEFT over the dequantized base."""
    model, output = save_family(case, tmp_path / "model"), tmp_path / "adapter"
    export = () if case.id in BY_EXPERT_REFUSED else ("--export", "per-expert")
    arguments = ("--model", model, "--dataset", rows, "--output", output, "--max-steps", "3", "--learning-rate", "0.01")
    ended = command("finetune", *arguments, "--quantization", "nf4" if in_4bit else "none", *export)
    assert ended.status == 0, ended
    ids = AutoTokenizer.from_pretrained(output)("1 + 1?", return_tensors="pt").input_ids.to(DEVICE)
    expected = stock_logits(model, output, in_4bit, ids)
    close = functools.partial(torch.testing.assert_close, atol=2e-3, rtol=2e-3)

    # Stock PEFT reads adapters by expert for some families only. It leaves out those of the experts of others, silently.
    for adapter in (output, output / "per-expert") if export else (output,):
        base = load_model(str(model), DTYPE, torch.device(DEVICE), four_bit_config(DTYPE) if in_4bit else None)
        with torch.no_grad():
            loaded = load_adapter(base, str(adapter)).eval()
            close(loaded(input_ids=ids).logits, expected)
            with loaded.disable_adapter():
                assert float((loaded(input_ids=ids).logits - expected).abs().max()) > 2e-2

    source = model
    if in_4bit:  # what the command writes dequantizes to bf16, the dtype of the model
        source = tmp_path / "quantized"
        ended = command("quantize", model, source, "--format", "fused")
        assert ended.status == 0, ended
        expected = stock_logits(source, output, False, ids)
    arguments = ("merge", source, output, tmp_path / "merged", "--dtype", "float32")
    ended = command(*arguments, *(("--allow-other-base",) if in_4bit else ()))
    assert ended.status == 0, ended
    moe_fused.disable()  # the result needs nothing of ours
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=DTYPE).to(DEVICE)
    with torch.no_grad():
        close(merged(input_ids=ids).logits, expected)


def test_finetunes_the_language_model_of_a_vision_language_model(command: Command, rows: Path, tmp_path: Path) -> None:
    """A vision-language model, as Qwen3.5-MoE is published, is fine-tuned in its language model alone."""
    model, output = tmp_path / "model", tmp_path / "adapter"
    text = build(BY_ID["qwen3_5_moe_linear"], vocab_size=272, max_position_embeddings=128).config.to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision | {"patch_size": 4})
    torch.manual_seed(0)
    transformers.Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(model)
    save_tokenizer(model)
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", output, "--max-steps", "2")
    assert ended.status == 0, ended
    trained = load_file(output / "adapter_model.safetensors")
    assert any(".linear_attn.in_proj_qkv." in name for name in trained)
    assert not [name for name in trained if "visual" in name]
    ended = command("generate", model, "--adapter", output, "--load-in-4bit", "--prompt", "1?", "--max-new-tokens", "2")
    assert ended.status == 0, ended


@pytest.mark.parametrize("case", [BY_ID["qwen3_next"], BY_ID["deepseek_v3"], GPT_OSS], ids=lambda case: case.id)
def test_generates_in_4_bits(case: ModelCase, command: Command, tmp_path: Path) -> None:
    model = save_family(case, tmp_path / "model")
    ended = command("generate", model, "--load-in-4bit", "--prompt", "1 + 1?", "--max-new-tokens", "2")
    assert ended.status == 0, ended


# What is chosen.


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (11, 17, 9)]


def side_by_side(sequences: list[Tensor]) -> dict[str, Any]:
    """The batch that TRL makes of these documents, without padding."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    row = {"input_ids": torch.cat(sequences).tolist(), "seq_lengths": [len(document) for document in sequences]}
    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    return {name: value for name, value in batch.items() if name != "labels"}


def mix(model: Any, batch: dict[str, Any], apart: Tensor) -> bool:
    """Whether documents side by side give other logits than by themselves; a model may refuse them."""
    try:
        with torch.no_grad():
            together = model(**batch).logits[0]
    except ValueError as error:
        if "packed sequences" not in str(error):
            raise
        return True
    return float((together - apart).abs().max()) > 1e-4


def resolved(config: Any, *, plain_text: bool = False, rows: int = 0) -> ResolvedRun:
    """What a run on a CPU decides by itself."""
    setup = set_up(Options(model="m"), config, torch.device("cpu"))
    return next(candidates(setup, plain_text=plain_text, rows=rows))


def lora_of(options: Options, model: Any) -> Any:
    """PEFT's config for the adapters of a run with this model."""
    return lora_config(set_up(options, model.config, torch.device("cpu")), model)


@by_family
def test_rows_side_by_side_are_apart_wherever_they_are_packed(case: ModelCase) -> None:
    model, sequences = case.build(**SIZES | dict(case.options)), documents()
    packing = resolved(model.config).batching.packing
    assert packing == CHOICES[case.id].packing
    with torch.no_grad():
        apart = torch.cat([model(document[None]).logits[0] for document in sequences])
    batch = side_by_side(sequences)
    assert mix(model, batch, apart) == (packing == "none")
    cuda = torch.device("cuda", 0)
    if packing == "bfd" and attention.serves("auto", model, cuda, torch.float16, packed=False):
        # On a GPU, this attention takes the place of SDPA. It reads the boundaries alone.
        attention.use(model)
        assert not mix(model, {name: batch[name] for name in batch if name != "seq_idx"}, apart)


@pytest.mark.parametrize(
    "case, plain_text, rows, packing",
    [
        (QWEN3_MOE, True, 1, "bfd_split"),
        (QWEN3_MOE, True, 9, "bfd_split"),
        (BY_ID["qwen3_next"], True, 1, "wrapped"),  # nothing to be apart from, and nothing is left out
        (BY_ID["qwen3_next"], True, 9, "none"),
        (BY_ID["qwen3_next"], False, 1, "none"),
        (GPT_OSS, True, 9, "none"),
    ],
)
def test_packing_of_text(case: ModelCase, plain_text: bool, rows: int, packing: str) -> None:
    config = case.build().config
    assert resolved(config, plain_text=plain_text, rows=rows).batching.packing == packing


@pytest.mark.parametrize(
    "model_type", ["bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "minimax", "nemotron_h", "zaya"]
)
def test_recurrent_layers_are_never_packed(model_type: str) -> None:
    """Models with recurrent layers are never packed, whatever Transformers calls these layers."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {model_type}")
    run = resolved(AutoConfig.for_model(model_type))
    assert experts_modules(run.skeleton)
    assert run.batching.packing == "none"


def test_attention_of_one_name_with_experts_is_left_alone() -> None:
    """Attention layers that share a name with experts' layers, such as AFMoE's ``gate_proj``, get no adapter."""
    modules = {}
    for name in ("afmoe", "jamba", "deepseek_v32"):
        modules[name] = set_up(Options(model="m"), AutoConfig.for_model(name), torch.device("cpu")).attention_modules
    assert modules["afmoe"] == modules["jamba"] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert modules["deepseek_v32"]
    assert not [name for name in modules["deepseek_v32"] if name.startswith(("indexer", "w"))]


WITHOUT_ROPE = ("deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_linear")


@by_family
def test_liger_turns_positions_only_where_it_can(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's rope is used only where it fits.

    Qwen3-Next turns a part of the features, and for Qwen3.5-MoE Liger has none.
    """
    patching = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    known, model = patching.MODEL_TYPE_TO_APPLY_LIGER_FN, case.build()
    if model.config.model_type not in known:
        pytest.skip("Liger does not know the model")
    original, used = known[model.config.model_type], {}

    @functools.wraps(original)
    def note(**given: Any) -> None:
        used.update(given)

    monkeypatch.setitem(known, model.config.model_type, note)
    apply_liger(model)
    default = inspect.signature(original).parameters["rope"].default
    assert used.get("rope", default) == (case.id not in WITHOUT_ROPE)
    assert (used["rms_norm"], used["swiglu"]) == (True, False)


def test_experts_that_cannot_be_adapted() -> None:
    model = build()
    for module in experts_modules(model):
        module.has_post_expert_norm = True  # type: ignore[assignment]  # a flag of Transformers'
    with pytest.raises(
        ValueError, match="--expert-rank: the experts of Qwen3MoeForCausalLM cannot be adapted, set it to 0"
    ):
        lora_of(Options(), model)
    assert not lora_of(Options(expert_rank=0), model).target_parameters


# Adapters by expert.

BY_EXPERT_REFUSED = {
    "gpt_oss": "the gate and up features of gpt-oss alternate",
    "nemotron_h": "not gate_up_proj and down_proj of one",
    **dict.fromkeys(("mixtral", "minimax_m2", "phimoe", "lfm2_moe"), "have w1, w3, w2 instead of gate_proj"),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), "have the stacks of all experts"),
}


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of linear layers of the same names beside experts
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_adapters_become_those_of_each_expert_or_are_refused(case: ModelCase, tmp_path: Path) -> None:
    """An adapter as ``finetune`` writes it becomes one with a matrix for each expert, or is refused."""
    case.build().save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", experts_implementation="moe_fused").to(DEVICE)
    model = get_peft_model(base, lora_of(Options(attention_rank=2, expert_rank=2), base)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "fused")
    options = {"to": Layout.PER_EXPERT, "given": Layout.PEFT_FUSED}
    if words := BY_EXPERT_REFUSED.get(case.id):
        with pytest.raises(ValueError, match=words):
            convert_adapter(tmp_path / "fused", tmp_path / "apart", **options)
        assert not (tmp_path / "apart").exists()
        return
    convert_adapter(tmp_path / "fused", tmp_path / "apart", **options)
    names = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    assert any(f".experts.{EXPERTS - 1}.gate_proj.lora_A" in name for name in names)
    loaded = PeftModel.from_pretrained(plain(case), tmp_path / "apart")
    torch.testing.assert_close(run(loaded).logits, run(model).logits, atol=1e-4, rtol=1e-4)
    # The commands accept this adapter, although it lacks shared experts and dense layers of the same names.
    path, adapter = str(tmp_path / "model"), str(tmp_path / "apart")
    loading.check_fits(path, loading.read_config(path), adapter, allow_other_base=False)
    ours = load_adapter(load_model(path, torch.float32, torch.device(DEVICE)), adapter)
    torch.testing.assert_close(run(ours).logits, run(model).logits, atol=1e-4, rtol=1e-4)


# What is refused before loading.


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whatever loads weights."""

    def load(*_: object, **__: object) -> None:
        raise RuntimeError("the model was loaded")

    monkeypatch.setattr(run_module, "load_model", load)
    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.parametrize(
    "case, options, words",
    [
        (BY_ID["qwen3_next"], ("--packing", "bfd"), ["--packing bfd", "linear_attention", "use --packing none"]),
        (BY_ID["qwen3_5_moe_linear"], ("--packing", "bfd_split"), ["--packing bfd_split", "use --packing none"]),
        (BY_ID["lfm2_moe"], ("--packing", "bfd"), ["--packing bfd", "conv", "use --packing none"]),
        (GPT_OSS, ("--packing", "bfd", "--attn", "eager"), ["--packing bfd", "eager", "use --packing none"]),
        (GPT_OSS, ("--attn", "sdpa"), ["--attn sdpa is not possible for GptOssForCausalLM", "use --attn eager"]),
        (QWEN3_MOE, ("--attn", "flash"), ["--attn flash is not possible", "must be one of torch, cudnn"]),
        (QWEN3_MOE, ("--attn", "paged|eager"), ["--attn paged|eager is not possible", "must be one of torch, cudnn"]),
        (QWEN3_MOE, ("--attn", "flex_attention"), ["--attn flex_attention is not", "it has no backward pass on a CPU"]),
        (
            QWEN3_MOE,
            ("--attn", "torch"),
            ["--attn torch is not possible", "leave it out or use --attn sdpa: it needs a GPU"],
        ),
        (BY_ID["deepseek_v3"], ("--attention-modules", "v_proj"), ["no linear layer v_proj", "kv_b_proj"]),
        (BY_ID["mixtral"], ("--export", "per-expert"), ["--export per-expert", "w1, w3, w2", "moe-fused merge"]),
        (BY_ID["granitemoe"], ("--export", "per-expert"), ["--export per-expert", "stacks", "moe-fused merge"]),
    ],
    ids=lambda value: value.id if isinstance(value, ModelCase) else "",
)
@pytest.mark.usefixtures("unloaded")
def test_refuses_what_the_model_cannot_have(
    case: ModelCase, options: tuple[str, ...], words: list[str], command: Command, rows: Path, tmp_path: Path
) -> None:
    model, output = save_family(case, tmp_path / "model"), tmp_path / "adapter"
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", output, *options)
    assert ended.status == 1
    assert all(word in ended.error for word in words), ended.error
    assert not output.exists()


@pytest.mark.parametrize(
    "case, options",
    [
        (BY_ID["qwen3_next"], ("--packing", "wrapped")),
        (BY_ID["qwen3_next"], ("--packing", "none")),
        (GPT_OSS, ("--attn", "eager", "--packing", "none")),
        (BY_ID["deepseek_v3"], ("--attention-modules", "self_attn.o_proj")),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_plans_what_it_advises(
    case: ModelCase, options: tuple[str, ...], command: Command, rows: Path, tmp_path: Path
) -> None:
    model = save_family(case, tmp_path / "model")
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", tmp_path / "o", "--dry-run", *options)
    assert ended.status == 0, ended


@pytest.mark.usefixtures("unloaded")
def test_a_model_without_a_causal_language_model(command: Command, rows: Path, tmp_path: Path) -> None:
    model = save_family(QWEN3_MOE, tmp_path / "model")
    transformers.Qwen3VLMoeConfig().save_pretrained(model)
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", tmp_path / "adapter")
    assert ended.status == 1
    assert "Transformers has no causal language model of type qwen3_vl_moe" in ended.error


# Checkpoints in other formats.


def edit_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def save_fp8(path: Path) -> Path:
    """A Qwen3-MoE as Qwen publishes it in FP8."""
    save_family(QWEN3_MOE, path)
    tensors = {}
    for name, value in load_file(path / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            rows, columns = value.shape
            tensors[name] = (value.float() * 8).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 32), -(-columns // 32)), 1 / 8)
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    edit_config(path, quantization_config=quantization)
    return path


def test_the_way_over_bf16(command: Command, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the error says to do does it, weights included."""
    model = save_fp8(tmp_path / "model")
    ended = command("finetune", "--model", model, "--dataset", rows, "--output", tmp_path / "adapter")
    assert ended.status == 1
    way = ended.error.partition("make it bf16 first, by ")[2].partition(", and save its tokenizer there")[0]
    monkeypatch.chdir(tmp_path)
    exec(f"from transformers import AutoModelForCausalLM, FineGrainedFP8Config\n{way}", {})
    AutoTokenizer.from_pretrained(model).save_pretrained("bf16-model")
    dequantizer = transformers.FineGrainedFP8Config
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=dequantizer(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained("bf16-model", dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    ended = command(
        "finetune", "--model", "bf16-model", "--dataset", rows, "--output", tmp_path / "adapter", "--max-steps", "1"
    )
    assert ended.status == 0, ended


OTHERS = {
    "fp8": ({"quant_method": "fp8"}, "FineGrainedFP8Config(dequantize=True)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "give the bf16 or fp16 checkpoint that it was made from"),
    "awq": ({"quant_method": "awq", "bits": 4}, "give the bf16 or fp16 checkpoint that it was made from"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "give the bf16 or fp16 checkpoint"),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "make a checkpoint of compressed-tensors of it first",
    ),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "give the bf16 or fp16 checkpoint"),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("program", ["finetune", "generate", "quantize", "merge", "convert"])
def test_other_quantizations_are_named_before_loading(
    program: str, name: str, command: Command, rows: Path, tmp_path: Path
) -> None:
    model, output = save_family(QWEN3_MOE, tmp_path / "model"), tmp_path / "output"
    quantization, advice = OTHERS[name]
    edit_config(model, quantization_config=quantization)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "finetune": ("--model", model, "--dataset", rows, "--output", output),
        "generate": (model, "--prompt", "1 + 1?"),
        "quantize": (model, output),
        "merge": (model, adapter, output),
        "convert": ("model", model, output, "--to", "fused"),
    }
    ended = command(program, *arguments[program])
    assert ended.status == 1
    if (program, name) == ("convert", "modelopt"):  # it makes another checkpoint of that one
        assert "the checkpoint has no weight_scale_2" in ended.error
        return
    kind = {"8 bits": "bitsandbytes' 8 bits", "modelopt": "modelopt (NVFP4)"}.get(name, name)
    assert f"{model} is quantized to {kind}, which moe_fused does not read yet" in ended.error, ended
    assert advice in ended.error
    assert not output.exists()


def test_nemotron_without_attention_adapts_experts_alone() -> None:
    model = NEMOTRON_H.build(layers_block_type=["moe", "moe"])
    config = lora_of(Options(), model)
    assert (config.target_modules, config.target_parameters) == (
        [],
        ["mixer.experts.up_proj", "mixer.experts.down_proj"],
    )
