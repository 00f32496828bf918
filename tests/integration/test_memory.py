"""The prediction of memory: its resident parts byte for byte on a model, the rest against what autograd keeps."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3MoeConfig

from benchmarks.rows import OURS, read_rows
from moe_fused import hub, memory
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import PARTS, plan_run
from moe_fused.finetune.resolve import set_up
from moe_fused.memory import GIB, Sizes, Workload, predict, sizes_of, skeleton

from .four_bit import BY_ID, build, config, load, packed
from .models import GPT_OSS, MODELS, ModelCase, experts_modules

ROOT = Path(__file__).parents[2]
# Larger than a block of absmax's absmax, so that the second level counts; 4 bits and 32 for adapters on a CPU.
SHAPES = {"hidden_size": 128, "moe_intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2}
WORK = Workload(
    length=48,
    itemsize=4,
    adapter_itemsize=4,
    attention_rank=4,
    expert_rank=2,
    optimizer="adamw_torch",
    fused_norms=False,
    gpu=False,
)
MIMO = ModelCase(
    "mimo_v2_flash", "another without SDPA", "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", {"n_routed_experts": 6}
)
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def nbytes(tensors: Any) -> int:
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def adapted(model: nn.Module, work: Workload) -> Any:
    ranks = dict.fromkeys(TARGETS, work.expert_rank)
    lora = LoraConfig(
        r=work.attention_rank,
        target_modules=list(work.attention_modules),
        target_parameters=TARGETS,
        rank_pattern=ranks,
        lora_dropout=0.1 if work.dropout else 0.0,
    )
    return get_peft_model(model, lora)


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("quantized", [True, False])
def test_weights_and_adapters(quantized: bool, tmp_path: Path) -> None:
    build(**SHAPES).save_pretrained(tmp_path)
    options = {"quantization_config": config()} if quantized else {"experts_implementation": "moe_fused"}
    model = load(tmp_path, dtype=torch.float32, **options)
    sizes = sizes_of(skeleton(Qwen3MoeConfig.from_pretrained(tmp_path)))
    assert sizes == sizes_of(build(**SHAPES))
    parts = predict(sizes, replace(WORK, quantized=quantized)).parts

    experts = nbytes(parameter for module in experts_modules(model) for parameter in module.parameters())
    assert parts["experts"] == experts
    in_experts = {tensor.data_ptr() for module in experts_modules(model) for tensor in module.parameters()}
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    others = [tensor for tensor in model.parameters() if tensor.data_ptr() not in in_experts]
    for state in states:
        others += [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    assert parts["other weights"] == pytest.approx(nbytes(others), rel=0.01)
    if quantized:
        assert packed(model)

    model = adapted(model, WORK)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parts["adapters"] == nbytes(trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert parts["optimizer state"] == nbytes(kept)


def kept_for_backward(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that autograd keeps of a forward, without parameters."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # or another tensor would get the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens)
    assert output is not None
    return sum(kept.values())


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("dropout", [False, True])
def test_what_a_layer_keeps(dropout: bool) -> None:
    """A layer keeps as much as predicted. The difference between two layers and one leaves out embeddings and loss."""
    kept, predicted = {}, {}
    work = replace(WORK, dropout=dropout)
    for layers in (1, 2):
        model = build(**{**SHAPES, "num_hidden_layers": layers}, dtype=torch.float32)
        model.set_experts_implementation("moe_fused")
        sizes = sizes_of(model)
        model = adapted(model, work).train()
        model.enable_input_require_grads()
        tokens = torch.randint(3, 90, (1, WORK.length), generator=torch.Generator().manual_seed(0))
        kept[layers] = kept_for_backward(model.base_model.model.model, tokens)
        parts = predict(sizes, replace(work, checkpointing=False, quantized=False)).parts
        predicted[layers] = parts["activations"]
    assert predicted[2] - predicted[1] == pytest.approx(kept[2] - kept[1], rel=0.07)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash", "granitemoe"])
def test_eager_attention_keeps_a_number_for_each_pair_and_head(name: str) -> None:
    """Eager attention keeps as much as predicted.

    In the difference between two lengths, what grows with tokens alone counts little.
    """
    case = MIMO if name == "mimo_v2_flash" else BY_ID[name]
    kept, predicted = {}, {}
    for length in (96, 192):
        model = build(case, dtype=torch.float32, max_position_embeddings=256)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("moe_fused")
        sizes = sizes_of(model)
        config = LoraConfig(r=WORK.attention_rank, target_modules=list(WORK.attention_modules))
        model = get_peft_model(model, config).train()
        model.enable_input_require_grads()
        tokens = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
        kept[length] = kept_for_backward(model.base_model.model.model, tokens)
        work = replace(WORK, length=length, eager=True, checkpointing=False, quantized=False, expert_rank=0)
        predicted[length] = predict(sizes, work).parts["activations"]
    assert predicted[192] - predicted[96] == pytest.approx(kept[192] - kept[96], rel=0.25)
    without = replace(work, eager=False)
    assert predict(sizes, work).total - predict(sizes, without).total > 2 * sizes.heads * 192**2 * 4


def test_eager_attention_is_planned_for() -> None:
    config = GPT_OSS.build(max_position_embeddings=4096).config
    totals = {}
    for attn in ("auto", "eager"):
        options = Options(model="m", attn=attn, sequence_length=2048)
        setup = set_up(options, config, torch.device("cpu"))
        totals[attn] = plan_run(setup, plain_text=False).prediction.total
    assert totals["auto"] == totals["eager"] > 4 * 2048**2 * 4


def test_names_are_matched_as_peft_matches_them() -> None:
    sizes = sizes_of(BY_ID["qwen3_next"].build())
    trainable = {}
    for names in (("out_proj",), ("linear_attn.out_proj",), ("attn.out_proj",), ("proj",), ("q_proj", "out_proj")):
        model = (
            get_peft_model(BY_ID["qwen3_next"].build(), LoraConfig(r=4, target_modules=list(names)))
            if (names not in (("attn.out_proj",), ("proj",)))
            else None
        )
        work = replace(WORK, attention_modules=names, expert_rank=0)
        trainable[names] = predict(sizes, work).trainable
        assert trainable[names] == (0 if model is None else model.get_nb_trainable_parameters()[0])
    assert trainable[("out_proj",)] == trainable[("linear_attn.out_proj",)] > 0


def test_sizes_of_other_configs() -> None:
    """Latent attention has a key for each head, and experts to a token may differ by layer."""
    latent = sizes_of(BY_ID["deepseek_v3"].build())
    assert (latent.queries, latent.keys) == (4 * 16, 4 * 16)
    assert sizes_of(BY_ID["hunyuan_v1_moe"].build(moe_topk=[2, 3])).top_k == 3
    assert sizes_of(BY_ID["ernie4_5_moe"].build()).top_k == 3


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_every_parameter_counts_once(case: ModelCase) -> None:
    model = case.build()
    sizes = sizes_of(model)
    counted = sum(weight.numel for weight in (*sizes.stacks, *sizes.linears)) + sizes.others
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert len(sizes.stacks) == 2 * case.moe_layers
    in_stacks = sum(stack.numel for stack in sizes.stacks)
    assert predict(sizes, replace(WORK, quantized=False)).parts["experts"] == 4 * in_stacks


def test_a_model_without_experts() -> None:
    sizes = sizes_of(skeleton(Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=100)))
    assert (sizes.experts, sizes.top_k, sizes.mlp) == (0, 0, 2 * 96 + 64)
    assert "experts" not in predict(sizes, WORK).parts


# --- of Qwen3-30B-A3B, whose numbers are known


@pytest.fixture(scope="module")
def qwen3_30b() -> Sizes:
    return sizes_of(
        skeleton(
            Qwen3MoeConfig(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=6144,
                num_hidden_layers=48,
                num_attention_heads=32,
                num_key_value_heads=4,
                head_dim=128,
                moe_intermediate_size=768,
                num_experts=128,
                num_experts_per_tok=8,
            )
        )
    )


def test_full_size(qwen3_30b: Sizes) -> None:
    prediction = predict(qwen3_30b, Workload())
    assert prediction.parts["experts"] + prediction.parts["other weights"] == pytest.approx(15.55 * GIB, rel=0.01)
    assert prediction.trainable == 327_942_144
    assert prediction.parts["adapters"] == 2 * prediction.trainable
    assert prediction.moment == "layer"
    assert prediction.parts["expert workspace"] == 256 * 2**20
    assert prediction.total == sum(prediction.parts.values())
    assert prediction.total - prediction.allocated == sum(prediction.parts[part] for part in prediction.outside)


@pytest.mark.parametrize(
    "more",
    [
        {"length": 8192},
        {"batch": 2},
        {"accumulation": 4},
        {"quantized": False},
        {"adapter_itemsize": 4},
        {"attention_rank": 64},
        {"expert_rank": 16},
        {"checkpointing": False},
        {"masked": True},
        {"fused_norms": False},
        {"optimizer": "adamw_torch"},
        {"optimizer": "paged_adamw_32bit"},
    ],
    ids=str,
)
def test_more_takes_more(more: dict[str, Any], qwen3_30b: Sizes) -> None:
    assert predict(qwen3_30b, replace(Workload(), **more)).total > predict(qwen3_30b, Workload()).total


def test_checkpointing_keeps_one_hidden_state_to_a_layer(qwen3_30b: Sizes) -> None:
    parts = predict(qwen3_30b, Workload(length=8192)).parts
    assert parts["activations"] == 48 * 8192 * 2048 * 2


def test_a_single_layer_needs_the_same_with_checkpointing(qwen3_30b: Sizes) -> None:
    """For a single layer, checkpointing saves nothing. It is recomputed at once, and its input counts once."""
    for work in (Workload(), Workload(length=512), Workload(length=16384)):
        again, kept = (
            predict(replace(qwen3_30b, layers=1), replace(work, checkpointing=checkpointing)).parts
            for checkpointing in (True, False)
        )
        assert again["activations"] + again["layer"] == kept["activations"] + kept["layer"]


def test_gradients_of_a_layer_come_beside_those_of_batches_before(qwen3_30b: Sizes) -> None:
    once, twice = (predict(qwen3_30b, Workload(accumulation=number)) for number in (1, 2))
    gradients = 2 * once.trainable
    assert once.parts["gradients"] == gradients // 48
    assert twice.parts["gradients"] == gradients + gradients // 48


# Eager layers at 30B with gradients of a single batch: what a step of ``finetune`` allocated at most on an H100, without
# packing.
def test_as_measured(qwen3_30b: Sizes) -> None:
    prediction = predict(qwen3_30b, Workload(length=4096, optimizer="adamw_8bit"))
    assert prediction.allocated / memory.MIB == pytest.approx(18776.34, rel=0.01)


def test_as_measured_with_graphs(qwen3_30b: Sizes) -> None:
    """The prediction with graphs is what torch's allocator held in the rows of ``benchmarks.finetune_30b``."""
    rows = read_rows(ROOT / "benchmarks/results/finetune-30b_h200.json")
    measured = {row.tokens: row.details["reserved_mib"] for row in rows if row.implementation == OURS}
    assert set(measured) == {1024, 2048, 4096, 8192, 16384}
    work = Workload(optimizer="adamw_8bit", flash=True, documents=True, graphs=True)
    predicted = {tokens: predict(qwen3_30b, replace(work, length=tokens)).allocated / memory.MIB for tokens in measured}
    assert predicted == pytest.approx(measured, rel=0.005)


def test_workspace_is_the_kernels() -> None:
    pytest.importorskip("triton")
    assert memory.EXPERT_WORKSPACE == hub.submodule(hub.get_kernel(), "stages.triton.dequantize").WORKSPACE_BYTES


def test_transposed_experts_always_need_the_workspace(qwen3_30b: Sizes) -> None:
    """No kernel dequantizes stacks of gpt-oss in the up projection, however few rows there are."""
    work = Workload(length=512)
    transposed = replace(qwen3_30b, stacks=tuple(replace(stack, transposed=True) for stack in qwen3_30b.stacks))
    assert memory._experts(qwen3_30b, work)[2] == 0
    assert memory._experts(transposed, work)[2] == memory.EXPERT_WORKSPACE
    assert all(stack.transposed for stack in sizes_of(GPT_OSS.build()).stacks)
    pytest.importorskip("triton")
    assert hub.submodule(hub.get_kernel(), "stages.triton.paths")._PACKED_FAMILIES["up"] == ("up_4bit", None)


def test_paged_state_is_outside_of_the_allocator(qwen3_30b: Sizes) -> None:
    paged, plain = (predict(qwen3_30b, Workload(optimizer=name)) for name in ("paged_adamw_8bit", "adamw_8bit"))
    assert paged.total == plain.total
    assert plain.allocated - paged.allocated == paged.parts["optimizer state, paged"] > 0.5 * GIB
    assert paged.total - paged.allocated - paged.parts["optimizer state, paged"] == memory.CONTEXT


def test_every_part_has_words() -> None:
    """The names of the parts are the keys of the dictionaries in the code that predicts."""
    tree = ast.parse(Path(memory.__file__).read_text(encoding="utf-8"))
    keys = [key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys]
    named = {key.value for key in keys if isinstance(key, ast.Constant)}
    assert named - {"loss", "layer", "optimizer", "reference"} == PARTS.keys() - {"loss", "layer"}


def test_graphs_keep_what_others_would_use_again(qwen3_30b: Sizes) -> None:
    """With graphs, the loss and accumulated gradients add to the layers' worst moment instead of reusing its memory."""
    work = Workload(length=4096)
    eager, graphs = predict(qwen3_30b, work), predict(qwen3_30b, replace(work, graphs=True))
    assert eager.moment == "layer"
    loss, gradients = graphs.parts["loss"], graphs.parts["gradients"]
    activations = eager.parts["activations"] + 2 * work.tokens * qwen3_30b.hidden * work.itemsize
    others = {"activations": activations, "gradients": gradients, "cuBLAS": 3 * memory.CUBLAS_WORKSPACE}
    assert graphs.parts == eager.parts | {"loss": loss} | others
    # The gradients of attention's adapters, which are small, lie apart.
    attention = predict(qwen3_30b, replace(work, expert_rank=0)).trainable
    assert gradients == attention * work.adapter_itemsize > eager.parts["gradients"]
    assert 2 * 2048 * 8192 < loss < predict(qwen3_30b, replace(work, length=8192, graphs=True)).parts["loss"]
    two = predict(qwen3_30b, replace(work, graphs=True, accumulation=2))
    assert two.parts["gradients"] - graphs.parts["gradients"] == graphs.trainable * work.adapter_itemsize


def test_documents_take_attention_more(qwen3_30b: Sizes) -> None:
    """Each document adds a block of queries in fp32.

    Gradients of keys and values are made for each head, then for each group.
    """
    work = Workload(length=4096)
    whole, packed = (
        memory._attention_made(qwen3_30b, replace(work, flash=documents, documents=documents))
        for documents in (False, True)
    )
    blocks = 4096 // 32 * 128 * 4 * qwen3_30b.queries
    assert packed - whole == blocks + 4096 * 2 * (qwen3_30b.queries - qwen3_30b.keys) * work.itemsize


# --- of processes that share the weights


def sharded(work: Workload, processes: int) -> Workload:
    return replace(work, processes=processes, sharded=True)


def test_a_process_that_is_alone_shares_nothing(qwen3_30b: Sizes) -> None:
    for work in (Workload(), Workload(graphs=True), Workload(accumulation=4), Workload(checkpointing=False)):
        assert predict(qwen3_30b, sharded(work, 1)) == predict(qwen3_30b, work)
    # Replicated on several GPUs, weights are as large as on one.
    one, two = predict(qwen3_30b, Workload()), predict(qwen3_30b, Workload(processes=2))
    assert {part: size for part, size in two.parts.items() if part not in ("NCCL", "gradient buckets")} == one.parts


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_shares_of_weights_and_training(processes: int, qwen3_30b: Sizes) -> None:
    """Experts, adapters and optimizer state are 1/N, and linear layers, norms, routers and the head as large as before."""
    work = Workload(processes=processes)
    whole, shared = predict(qwen3_30b, work), predict(qwen3_30b, sharded(work, processes))
    for part in ("experts", "adapters"):
        assert shared.parts[part] * processes == whole.parts[part]
    states = [
        sum(size for part, size in each.parts.items() if part.startswith("optimizer state")) for each in (whole, shared)
    ]
    # Shares are rounded up to whole blocks of the state.
    assert states[0] <= states[1] * processes <= 1.01 * states[0]
    embedding = 151936 * 2048 * 2
    assert whole.parts["other weights"] - shared.parts["other weights"] == embedding - embedding // processes
    assert shared.trainable == whole.trainable
    assert "gradient buckets" not in shared.parts


def test_two_layers_are_whole_at_once(qwen3_30b: Sizes) -> None:
    work = sharded(Workload(), 4)
    whole, shared = predict(qwen3_30b, replace(work, sharded=False)), predict(qwen3_30b, work)
    layer = (whole.parts["experts"] + whole.parts["adapters"]) // 48
    assert shared.moment == "layer"
    assert memory.gathered_layer(qwen3_30b, work) == pytest.approx(layer)
    # The gradient of a layer is whole, beside the buffer from which it is scattered to the gradients of earlier batches.
    one = whole.parts["adapters"] // 48
    assert shared.parts["gradients"] == shared.parts["adapters"] + 2 * one
    more = predict(qwen3_30b, replace(work, accumulation=2))
    assert more.parts["gradients"] == shared.parts["gradients"]


def test_more_processes_need_less_each_but_the_gathered_layers(qwen3_30b: Sizes) -> None:
    totals = [predict(qwen3_30b, sharded(Workload(), processes)) for processes in (2, 4, 8, 16)]
    assert sorted((each.total for each in totals), reverse=True) == [each.total for each in totals]
    assert len({each.parts["gathered weights"] for each in totals}) == 1
    # Three quarters are gone between 2 and 8, whose shares are a half and an eighth.
    assert totals[2].parts["experts"] * 4 == totals[0].parts["experts"]


def test_an_uneven_number_of_experts_counts_the_largest_share() -> None:
    """Seven of 8 processes have 8 of 60 experts, and the last one has 4. A gathered layer is padded to 64."""
    config = Qwen3MoeConfig(
        **SHAPES, num_experts=60, num_experts_per_tok=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    sizes = sizes_of(skeleton(config))
    work = replace(WORK, processes=8)
    of_one = predict(sizes, replace(work, processes=1)).parts["experts"] // 60
    assert predict(sizes, sharded(work, 8)).parts["experts"] == 8 * of_one
    assert predict(sizes, sharded(work, 7)).parts["experts"] == 9 * of_one
    adapters = memory.gathered_layer(sizes, sharded(work, 8)) - 64 * of_one // 2
    assert adapters == predict(sizes, work).parts["adapters"] // 2


def test_the_embedding_is_shared_unless_it_is_trained_or_tied() -> None:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    untied, tied = (
        sizes_of(skeleton(Qwen3MoeConfig(**SHAPES, **shape, tie_word_embeddings=value))) for value in (False, True)
    )
    assert (untied.embedding, tied.embedding) == (96 * 128, 0)
    work = replace(WORK, processes=4)
    saved = {
        name: predict(sizes, each).parts["other weights"] - predict(sizes, sharded(each, 4)).parts["other weights"]
        for name, sizes, each in (
            ("frozen", untied, work),
            ("tied", tied, work),
            ("trained", untied, replace(work, whole=(memory.Whole(96 * 128, embeds=True),))),
        )
    }
    assert saved == {"frozen": 3 * 24 * 128 * 4, "tied": 0, "trained": 0}


def test_what_is_gathered(qwen3_30b: Sizes) -> None:
    """A layer is whole while the next one arrives in one of two buffers. With graphs, the memory is the same."""
    work = sharded(Workload(), 2)
    layer = memory.gathered_layer(qwen3_30b, work)
    assert [predict(qwen3_30b, replace(work, graphs=graphs)).parts["gathered weights"] for graphs in (False, True)] == (
        [3 * layer] * 2
    )
