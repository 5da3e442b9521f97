"""Tokens in few bits, in exported graphs: as the reference, and as the compiled model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from starkv_compile import CacheError, OptionError, StarKVCache, StarKVConfig
from starkv_compile.export.capture import codes
from starkv_compile.export.capture.capture import capture_decode, export_program
from starkv_compile.export.capture.decoder import Decode, Decoder, describe
from starkv_compile.export.capture.ports import Layer, Port, Shapes, decode_ports
from starkv_compile.export.tensorrt.programs import export_programs
from starkv_compile.kernels.reference.quantization import centre_of, dequantize, quantize
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import slow
from tests.support.same import assert_same_cache
from tests.support.trajectory import steps

HEADS, GROUPS = 6, 2
WIDTHS = [(16, 16), (7, 5), (12, 20), (1, 3)]


def stored(dim, of_values, nbits, coded, newer=9):
    """Ports of a layer, feeds for them, and the keys and values that they stand for."""
    torch.manual_seed(0)
    shapes = Shapes((Layer(GROUPS, dim, of_values),), 1, 1, torch.float32, nbits=nbits)
    ports = [p for p in decode_ports(shapes).inputs if p.name.startswith(("coded.", "past."))]
    ports.append(Port("query", ("batch", HEADS, 1, dim), torch.float32))
    feeds, sides = {"query": torch.randn(2, HEADS, 1, dim)}, []
    for side, width in (("key", dim), ("value", of_values)):
        rows = torch.randn(2, GROUPS, coded + newer, width) + 2
        older, newest = rows.split([coded, newer], 2)
        made = quantize(older, centre_of(older), nbits)
        for part, tensor in made._asdict().items():
            feeds[f"coded.0.{side}_{part}"] = tensor
        feeds[f"past.0.{side}"] = newest
        sides.append(torch.cat([dequantize(*made, torch.float32), newest], 2))
    return ports, feeds, sides


class Attention(torch.nn.Module):
    """The attention of an exported graph, alone."""

    def __init__(self, nbits):
        super().__init__()
        self.body = codes.bodies(nbits)["quantized_attention"]

    def forward(self, ports):
        sides = [
            ports[f"coded.0.{side}_{part}"]
            for side in ("key", "value")
            for part in ("codes", "ranges", "centre")
        ]
        query, key, value = ports["query"], ports["past.0.key"], ports["past.0.value"]
        scale = query.shape[-1] ** -0.5
        return {"found": self.body(query, *sides, key, value, ports.get("mask"), scale)}


@pytest.mark.parametrize("coded", [0, 1, 33])
@pytest.mark.parametrize("masked", [None, "bool", "numbers"])
@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize(("dim", "of_values"), WIDTHS)
def test_attention_as_over_what_the_codes_stand_for(dim, of_values, nbits, masked, coded):
    _, feeds, (keys, values) = stored(dim, of_values, nbits, coded)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, coded + 9) > 0.4
        mask[..., -1] = True
        if masked == "numbers":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        feeds["mask"] = mask
    found = Attention(nbits)(feeds)["found"]
    expected = sdpa(feeds["query"], keys, values, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize(("dim", "of_values"), WIDTHS)
def test_rows_as_the_reference_makes_them_of_codes(dim, of_values, nbits):
    _, feeds, _ = stored(dim, of_values, nbits, 33)
    row = [feeds[f"coded.0.key_{part}"] for part in ("codes", "ranges", "centre")]
    found = codes.bodies(nbits)["dequantize"](*row, torch.float32)
    torch.testing.assert_close(found, dequantize(*row, torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("nbits", "dim", "of_values"),
    [slow(8, 16, 16, ci=True), slow(4, 7, 5, ci=True), (4, 12, 20)],
)
def test_onnx_reads_codes_by_dequantize_linear(nbits, dim, of_values, tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install '.[export]'")
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install '.[export]'")
    from starkv_compile.export.onnx.graphs import Graph
    from starkv_compile.export.onnx.onnx_graph import name_lengths, save, to_onnx
    from starkv_compile.export.onnx.translations import HAS_BLOCKS
    from starkv_compile.export.onnx.weights import Weights

    ports, feeds, (keys, values) = stored(dim, of_values, nbits, 33)
    made = to_onnx(export_program(Attention(nbits), ports), HAS_BLOCKS)
    name_lengths(made, ports)
    file = tmp_path / "graph.onnx"
    save(made, file, Weights(tmp_path))
    graph = Graph(file)
    for coded in (33, 1, 0):
        ports, feeds, (keys, values) = stored(dim, of_values, nbits, coded)
        expected = sdpa(feeds["query"], keys, values, enable_gqa=True)
        torch.testing.assert_close(graph(feeds)["found"], expected, atol=2e-5, rtol=2e-5)
    nodes = onnx.load(file).graph.node
    readers = {node.op_type for node in nodes if any(n.endswith("_codes") for n in node.input)}
    assert readers - {"Shape"} == {"DequantizeLinear"}
    assert Counter(node.op_type for node in nodes)["DequantizeLinear"] == 2


@pytest.mark.parametrize("family", [slow("qwen2_vl", ci=True), slow("qwen3_vl", ci=True)])
def test_a_decoding_program_makes_no_rows_of_codes(family):
    model = tiny_model(family, num_hidden_layers=1)
    decoder = Decoder(model)
    shapes = replace(describe(model, decoder), nbits=4)
    program = capture_decode(Decode(decoder, shapes).eval(), decode_ports(shapes), 4)
    counts = Counter(node.target for node in program.graph.nodes)
    assert counts[torch.ops.starkv_export.dequantize_linear.default] == 2
    assert not counts[torch.ops.aten.scaled_dot_product_attention.default]


def test_what_is_not_exported_in_few_bits_is_refused(tmp_path):
    from starkv_compile.export.onnx.package import ExportOptions, export_model

    model = tiny_model("qwen2_vl", num_hidden_layers=1)
    model.config.save_pretrained(tmp_path)
    config = StarKVConfig(budget=0.3, nbits=4)
    options = ExportOptions(
        checkpoint=tmp_path, out=tmp_path / "out", config=config, max_seq=400, cache="static"
    )
    with pytest.raises(OptionError, match="nbits=4 with cache='static'"):
        export_model(model, options)
    with pytest.raises(OptionError, match="nbits=4: programs for torch-tensorrt"):
        export_programs(model, config, 400)


whole_model = pytest.mark.parametrize("exported", ["4 bits"], indirect=True)


def assert_same_codes(left, right):
    for a, b in zip(left.compressed_layers, right.compressed_layers, strict=True):
        assert (a.coded, a.in_full) == (b.coded, b.in_full)
        assert a.coded > 0
        for mine, theirs in (
            (a.quantized.key, b.quantized.key),
            (a.quantized.value, b.quantized.value),
        ):
            assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(a.quantized.place, b.quantized.place)


@whole_model
def test_replies_and_codes_are_those_of_the_compiled_model(exported):
    prompts = (
        [TinyPrompt(((4, 4), (3, 5)), text=20)],
        [
            TinyPrompt(((4, 4),), text=9),
            TinyPrompt(((3, 4), (5, 5)), text=30),
        ],
    )
    for given in prompts:
        inputs = tiny_inputs(exported.family, *given)
        mine, theirs = (generate(model, inputs, tokens=6) for model in exported.pair)
        assert torch.equal(mine.sequences, theirs.sequences)
        assert_same_codes(mine.past_key_values, theirs.past_key_values)
        for a, b in zip(mine.logits, theirs.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert mine.past_key_values.nbytes == theirs.past_key_values.nbytes


@whole_model
def test_a_prompt_without_tokens_in_codes_is_decoded_too(exported):
    inputs = tiny_inputs(exported.family, TinyPrompt((), text=3))
    mine, theirs = (generate(model, inputs, tokens=4) for model in exported.pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert mine.past_key_values.layers[0].coded == 0


@whole_model
def test_no_token_is_rounded_twice_in_a_session(exported):
    before = None
    for step, (logits, cache) in enumerate(steps(exported.onnx, exported.family, 6)):
        assert logits.isfinite().all()
        layer = cache.compressed_layers[0]
        if before is not None:
            known = dict(zip(before.place[0].tolist(), before.key.codes[0, 0], strict=True))
            places = layer.quantized.place[0].tolist()
            again = [i for i, place in enumerate(places) if place in known]
            assert again, step
            for i in again:
                assert torch.equal(layer.quantized.key.codes[0, 0, i], known[places[i]])
        before = layer.quantized


@whole_model
def test_a_session_that_began_in_other_bits(exported):
    model = tiny_model(exported.family, num_hidden_layers=exported.layers)
    inputs = tiny_inputs(exported.family, TinyPrompt(((4, 4), (3, 5)), text=20))
    import starkv_compile

    starkv_compile.compile(model, budget=0.3, nbits=8, inner="eager")
    cache = StarKVCache(model.config)
    generate(model, inputs, past_key_values=cache)
    word = torch.full((1, 1), 11)
    with pytest.raises(CacheError, match="holds tokens in 8 bits"):
        exported.onnx(input_ids=word, past_key_values=cache, logits_to_keep=1)


@pytest.mark.parametrize("exported", ["novelty"], indirect=True)
def test_graphs_in_the_models_precision_go_on_with_codes_as_rows(exported):
    """They take what the codes stand for, and store that."""
    import starkv_compile

    model = tiny_model(exported.family, num_hidden_layers=exported.layers)
    starkv_compile.compile(model, budget=0.3, nbits=4, inner="eager")
    inputs = tiny_inputs(exported.family, TinyPrompt(((4, 4), (3, 5)), text=20))
    cache = StarKVCache(model.config)
    generate(model, inputs, past_key_values=cache)
    twin = cache.fork()
    word = torch.full((1, 1), 11)
    places = torch.full((3, 1, 1), cache.get_seq_length())
    with torch.no_grad():
        mine = exported.onnx(
            input_ids=word, position_ids=places, past_key_values=cache, logits_to_keep=1
        ).logits
        theirs = model(input_ids=word, position_ids=places, past_key_values=twin).logits
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert {layer.coded for layer in cache.compressed_layers} == {0}
    assert_same_cache(cache, twin, exported.layers)
