"""A checkpoint folder of a tiny random Llava that transformers loads whole, processor included."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from starkv_compile.testing import IMAGE_TOKEN, VOCABULARY, tiny_model

TEMPLATE = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}w3 <image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def save_llava(folder: Path) -> Path:
    """Writes the checkpoint. Its words are w0, w1, ...; a picture becomes 4 x 4 tokens."""
    names = {f"w{i}": i for i in range(VOCABULARY) if i != IMAGE_TOKEN}
    words = Tokenizer(WordLevel({**names, "<image>": IMAGE_TOKEN}, "w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="w0",
        unk_token="w1",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tiny_model("llava").save_pretrained(folder)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        chat_template=TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
