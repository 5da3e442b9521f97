"""Asks a model in vLLM about screenshots, with a budget for each request.

    vllm serve MODEL --additional-config '{"starkv": {"budget": 0.2}}'
    python examples/vllm_client.py MODEL screenshot1.png screenshot2.png

Needs the package `openai`. docs/guides/vllm.md describes the plugin.
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def picture(path: Path) -> dict:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("screenshots", type=Path, nargs="+")
    parser.add_argument("--question", default="What should be clicked next?")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--budget", default="20%", help="share of the prompt that stays")
    args = parser.parse_args()
    content = [*map(picture, args.screenshots), {"type": "text", "text": args.question}]
    answer = OpenAI(base_url=args.url, api_key="none").chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=64,
        extra_body={"vllm_xargs": {"starkv_budget": args.budget}},
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
