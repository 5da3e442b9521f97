"""`StarKVCache`: logical against physical length, batch operations, refusals. No model."""

import pytest
import torch

from starkv_compile import CacheError, StarKVCache
from starkv_compile.cache.reading import WatchedLayer
from starkv_compile.testing import LAYERS, tiny_model
from starkv_compile.vision.layout import VisionLayout

G, D = 2, 16


@pytest.fixture(name="cache")
def _cache():
    return StarKVCache(tiny_model("qwen2_5_vl").config)


def feed(cache, tokens, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        key = torch.randn(batch, G, tokens, D, generator=generator)
        cache.update(key, key + 1, layer)


def compact(cache, kept):
    """What the graph pass does, by hand: keep places `kept` of every layer."""
    for layer in cache.compressed_layers:
        layer.hold(layer.keys[:, :, kept], layer.values[:, :, kept])
        layer.kept = layer.kept[:, kept]


def test_left_in_place_the_marker_changes_nothing(cache):
    feed(cache, 10)
    layer = cache.layers[0]
    assert layer.kept.tolist() == [list(range(10))] * 2
    assert cache.get_seq_length() == layer.stored == 10
    assert cache.get_mask_sizes(1, 0) == (11, 0)


def test_a_first_prompt_sets_no_property(cache, monkeypatch):
    """Dynamo of torch 2.11 puts a value beside a property and does not call its setter."""
    for name in ("keys", "values"):
        read_only = property(getattr(WatchedLayer, name).fget)
        monkeypatch.setattr(WatchedLayer, name, read_only)
    feed(cache, 10)
    assert cache.get_seq_length() == 10


def test_logical_and_physical_length(cache):
    feed(cache, 20)
    compact(cache, [0, 5, 18, 19])
    feed(cache, 1)
    assert cache.get_seq_length() == 21
    assert cache.layers[0].stored == 5
    assert cache.get_mask_sizes(3, 0) == (8, 16)


def test_places_go_on_after_compaction_and_decoding(cache):
    feed(cache, 20)
    compact(cache, [0, 5, 18, 19])
    feed(cache, 1)
    feed(cache, 1)
    feed(cache, 3)
    assert cache.layers[0].kept[0].tolist() == [0, 5, 18, 19, 20, 21, 22, 23, 24]


def test_reset_is_a_new_session(cache):
    feed(cache, 20)
    cache.shared.layout = VisionLayout.empty(2, torch.device("cpu"))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.shared.layout is None
    feed(cache, 4)
    assert cache.layers[0].kept.tolist() == [[0, 1, 2, 3]] * 2
    assert cache.layers[0].state[1].tolist() == [0, 0]


def test_crop_only_since_the_last_compaction(cache):
    feed(cache, 20)
    compact(cache, [0, 5, 18, 19])
    feed(cache, 1)
    feed(cache, 1)
    cache.crop(-1)
    assert (cache.get_seq_length(), cache.layers[0].stored) == (21, 5)
    before = [(layer.seen, layer.keys.clone()) for layer in cache.compressed_layers]
    with pytest.raises(CacheError, match="only 1 tokens came after the last compaction"):
        cache.crop(-2)
    for layer, (seen, keys) in zip(cache.compressed_layers, before, strict=True):
        assert layer.seen == seen
        assert torch.equal(layer.keys, keys), "a refused crop changes nothing"
    with pytest.raises(CacheError, match="as a negative"):
        cache.crop(5)
    cache.crop(0)


def test_crop_of_an_uncompressed_cache_works(cache):
    feed(cache, 10)
    cache.crop(-4)
    assert (cache.get_seq_length(), cache.layers[0].kept.shape[1]) == (6, 6)
    feed(cache, 2)
    assert cache.layers[0].kept[0].tolist() == list(range(8))


def test_a_crop_of_more_than_there_is_leaves_nothing(cache):
    """As of a `DynamicCache`."""
    feed(cache, 10)
    cache.crop(-100)
    assert (cache.get_seq_length(), cache.layers[0].stored) == (0, 0)
    assert cache.get_mask_sizes(3, 0) == (3, 0)


def test_a_crop_into_the_padding_can_be_saved(cache):
    feed(cache, 5)
    cache.shared.padding = torch.tensor([3, 0])
    cache.crop(-4)
    assert cache.shared.padding.tolist() == [1, 0]
    StarKVCache(tiny_model("qwen2_5_vl").config).load_state_dict(cache.state_dict())


def test_keys_and_values_of_two_dtypes_are_loaded(cache):
    """As autocast makes them: rotary embeddings give float32."""
    for layer in range(LAYERS):
        key = torch.randn(1, G, 6, D)
        cache.update(key, key.bfloat16(), layer)
    again = StarKVCache(tiny_model("qwen2_5_vl").config)
    again.load_state_dict(cache.state_dict())
    layer = again.layers[0]
    assert (layer.keys.dtype, layer.values.dtype) == (torch.float32, torch.bfloat16)


def test_codes_of_narrower_tokens_are_loaded(cache):
    """Later tokens of a wider dtype widen what is stored, and codes keep their ranges."""
    for layer in range(LAYERS):
        key = torch.randn(1, G, 6, D, dtype=torch.float16)
        cache.update(key, key, layer)
    cache.quantize(8, in_full=2)
    feed(cache, 1, batch=1)
    keys = cache.layers[0].keys
    assert keys.dtype == torch.float32
    again = StarKVCache(tiny_model("qwen2_5_vl").config)
    again.load_state_dict(cache.state_dict())
    assert torch.equal(again.layers[0].keys, keys)


@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
def test_batch_operations_move_everything_together(cache, operation):
    feed(cache, 10)
    frame = torch.arange(2)[:, None].expand(2, 10).clone()
    cache.shared.layout = VisionLayout(frame, frame, frame, frame[:, :2], frame > 0)
    for layer in cache.compressed_layers:
        layer.kept = layer.kept + 100 * torch.arange(2)[:, None]
    before = cache.layers[0].keys.clone()
    if operation == "reorder":
        rows = torch.tensor([1, 0])
        cache.reorder_cache(rows)
    elif operation == "select":
        rows = torch.tensor([1])
        cache.batch_select_indices(rows)
    else:
        rows = torch.tensor([0, 0, 1, 1])
        cache.batch_repeat_interleave(2)
    for layer in cache.compressed_layers:
        assert layer.kept[:, 0].tolist() == (100 * rows).tolist()
        assert layer.state[0].shape[0] == len(rows)
    assert torch.equal(cache.layers[0].keys, before[rows])
    assert cache.shared.layout.frame[:, 0].tolist() == rows.tolist()
    assert cache.shared.layout.counts.tolist() == [[0, 10 * row] for row in rows.tolist()]


def test_bytes_are_of_storages(cache):
    feed(cache, 20)
    full = cache.nbytes
    assert full == LAYERS * 2 * 2 * G * 20 * D * 4
    compact(cache, slice(0, 4))  # a view keeps the whole storage: the count must not be fooled
    assert cache.nbytes == full


def test_sliding_window_layers_stay_the_librarys_own():
    from transformers import Gemma3TextConfig
    from transformers.cache_utils import DynamicSlidingWindowLayer

    config = Gemma3TextConfig(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    )
    cache = StarKVCache(config)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds[0] is kinds[2] is DynamicSlidingWindowLayer
    assert len(cache.compressed_layers) == 2


def test_somebody_who_cuts_keys_by_hand_is_told_to_crop(cache):
    feed(cache, 10)
    layer = cache.layers[0]
    with pytest.raises(CacheError, match=r"of 7 tokens were put into a layer that stores 10.*crop"):
        layer.keys = layer.keys[:, :, :7]
    with pytest.raises(CacheError, match="of 11 tokens"):
        layer.values = torch.cat([layer.values, layer.values[:, :, :1]], 2)
    assert layer.stored == 10
    layer.keys = layer.keys.double()
    assert layer.keys.dtype == torch.float64
    cache.crop(-3)  # the way out
    assert [layer.stored for layer in cache.layers] == [7] * LAYERS
