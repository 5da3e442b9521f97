"""Tiny random Qwen-VL checkpoints on disk, with the files that `AutoProcessor` wants."""

from starkv_compile.testing.models import (
    IMAGE_TOKEN,
    PAD,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VOCABULARY,
    tiny_model,
)

CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_NAMED = {
    "<|endoftext|>": PAD,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<unk>": 3,
    "<|image_pad|>": IMAGE_TOKEN,
    "<|video_pad|>": VIDEO_TOKEN,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
}


def save_random(family, folder):
    """A random model of `family` with tokenizer, image and video processor. Needs torchvision."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tiny_model(family).save_pretrained(folder)
    kinds = {
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }
    processor, video = kinds[family]
    processor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        video_processor=video(patch_size=4, merge_size=2),
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


def image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 64, "longest_edge": 64 * 200}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {number: name for name, number in _NAMED.items()}
    ids = {named.get(number, f"word{number}"): number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[name for name in _NAMED if name not in ("<unk>",)],
    )
