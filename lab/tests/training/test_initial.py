"""Where the agent's weights start: heads that look back do so, screens find their step."""

import torch
from starkv_lab.agent.architecture import build_config
from starkv_lab.agent.vocabulary import ATTRIBUTES, IMAGE, TOKEN_ID
from starkv_lab.training import initial
from starkv_lab.training.train import CellProbe
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration


def attention_of_the_first_layer(grids):
    """[heads, L, L], ids [L]: a new model's attention to `step N` and a screen, for each grid."""
    torch.manual_seed(0)
    config = build_config()
    config._attn_implementation = "eager"
    model = Qwen3VLForConditionalGeneration(config).eval()
    initial.start_attention(model.model.language_model)
    words = []
    for step, (rows, columns) in enumerate(grids, 1):
        words += ["step", str(step), "<|vision_start|>", *[IMAGE] * (rows * columns)]
        words += ["<|vision_end|>"]
    words += ["click", "step", "2", "red", "star", "<|agent|>"]
    ids = torch.tensor([[TOKEN_ID[word] for word in words]])
    is_image = ids == TOKEN_ID[IMAGE]
    positions, _ = model.model.get_rope_index(
        ids, is_image.int(), image_grid_thw=torch.tensor([[1, *grid] for grid in grids])
    )
    embeds = F.normalize(torch.randn(1, ids.shape[1], 128), dim=-1)
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, output_attentions=True, use_cache=False
        )
    return out.attentions[0][0], ids[0]


def test_positional_heads_look_where_they_should():
    attention, ids = attention_of_the_first_layer([(8, 12), (8, 12)])
    end = len(ids) - 1
    for head, distance in enumerate(initial.LOOK_BACK):
        assert attention[head, end].argmax() == end - distance
        assert attention[head, end, end - distance] > 0.8
    screens = attention[len(initial.LOOK_BACK)]
    for place in (ids == TOKEN_ID[IMAGE]).nonzero()[:, 0].tolist():
        step = "1" if place < 8 * 12 + 4 else "2"
        of_step = (ids[:place] == TOKEN_ID[step]).nonzero()[-1]
        assert screens[place, of_step] > 0.5


def test_words_start_where_the_probe_reads_them():
    probe, table = CellProbe(128), torch.zeros(400, 128)
    initial.start_words(table, probe.heads)
    attribute = probe.heads[0].weight.detach()
    for i, word in enumerate(ATTRIBUTES):
        cosine = F.cosine_similarity(table[TOKEN_ID[word]], attribute[i + 1], dim=0)
        torch.testing.assert_close(cosine, torch.tensor(1.0))


def test_features_start_at_norm_one_and_read_the_same():
    torch.manual_seed(0)
    visual = Qwen3VLForConditionalGeneration(build_config()).model.visual
    probe = CellProbe(128)
    pixels, grid = torch.rand(4 * 100, 3 * 32 * 32), torch.tensor([[1, 10, 10]] * 4)
    with torch.no_grad():
        before = visual(pixels, grid_thw=grid)
        logits = [head(before.pooler_output) for head in probe.heads]
        initial.start_features(visual, probe.heads, before)
        after = visual(pixels, grid_thw=grid)
    for features in (after.pooler_output, *after.deepstack_features):
        torch.testing.assert_close(features.norm(dim=-1).mean(), torch.tensor(1.0))
    for head, expected in zip(probe.heads, logits, strict=True):
        torch.testing.assert_close(head(after.pooler_output), expected)
