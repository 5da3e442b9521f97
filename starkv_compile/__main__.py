"""`python -m starkv_compile COMMAND`, also installed as `starkv`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import INNER_BACKENDS
from .errors import StarKVError
from .inspection.arguments import add_inspect
from .method import add_method, config_of
from .quality.arguments import add_bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; exit code 2 and one sentence on stderr where it cannot be done."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except StarKVError as error:
        print(f"starkv: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="starkv", description="KV-cache compression for vision-language models (STaR-KV)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    add_inspect(commands)
    _add_models(commands)
    _add_export(commands)
    add_bench(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the embedded GUI agent with a full and a compressed cache, side by side",
        description="Runs the embedded GUI agent through a session of screenshots three ways: full "
        "cache, the paper's method, and this package's defaults. Prints answers and costs, and "
        "draws what each layer keeps of each screenshot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a screenshot of yours in place of a generated episode; may be given again",
    )
    add(
        "--question",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="what to ask about each --image, in the agent's words "
        "(default: what is in its middle)",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="screenshots of the generated episode (default: 4; the agent knows up to 5)",
    )
    add("--seed", type=int, default=0, help="which episode is generated")
    add("--budget", type=float, default=0.2, help="share of the tokens seen that stays cached")
    add(
        "--inner",
        choices=INNER_BACKENDS,
        default="eager",
        help="backend under starkv; eager because inductor compiles for minutes on few cores",
    )
    add("--out", type=Path, metavar="DIR", default=Path("demo-output"), help="for the pictures")
    add("--agent", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the one shipped)")  # fmt: skip
    add("--runtime", choices=("torch", "onnx"), default="torch",
        help="onnx: exported first, some minutes, then run by ONNX Runtime")  # fmt: skip
    add("--exported", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="with --runtime onnx: keep the graphs there, and use those that are "
        "(default: a temporary folder)")  # fmt: skip
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    # Torch reads these when it is imported; without them its profiler reports on itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from .agent.demo import DemoOptions, run_demo  # imports torch, which --help should not

    run_demo(
        DemoOptions(
            images=tuple(getattr(args, "image", ())),
            question=getattr(args, "question", None),
            frames=getattr(args, "frames", None),
            seed=args.seed,
            budget=args.budget,
            inner=args.inner,
            out=args.out,
            agent=getattr(args, "agent", None),
            runtime=args.runtime,
            exported=getattr(args, "exported", None),
        )
    )
    return 0


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    models = commands.add_parser(
        "models",
        help="try every model family that the installed transformers ships",
        description="Builds a tiny random model of each family and runs it with a full and a "
        "compressed cache. Prints what is compressed, and what is not and why. All of them take "
        "some ten minutes. Exit code 1 if a family is wrong.",
    )
    add = models.add_argument
    add("families", nargs="*", metavar="FAMILY", help="only these, such as qwen2_5_vl")
    add("--out", type=Path, metavar="FILE", help="write the table there, as Markdown")
    add("--exports", action="store_true", help="their export instead, as far as it depends on them")
    models.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> int:
    from .matrix.table import run_models  # imports torch, which --help should not

    return run_models(args.families, args.out, args.exports)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint as ONNX graphs that compress their cache themselves",
        description="Writes a folder with prefill.onnx, decode.onnx, visual.onnx, their weights, "
        "export.json, and the tokenizer's and processor's files. Exit code 2 and one sentence "
        "where it cannot be done; then nothing is left behind (without engines: the graphs are).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = export.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that save_pretrained wrote")
    add("-o", "--out", type=Path, metavar="DIR", required=True, help="folder to write; a new one")
    add("--budget", type=float, default=0.2, help="share of the tokens seen that stays cached")
    add("--budget-tokens", type=int, metavar="N", default=argparse.SUPPRESS,
        help="tokens that stay, whatever the length: k is a constant of the graph")  # fmt: skip
    add_method(export)
    add("--max-seq", type=int, metavar="N", default=16384, help="tokens a session may see")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="of weights and cache; bfloat16 runs on GPUs only")  # fmt: skip
    add(
        "--select",
        choices=("auto", "topk", "threshold"),
        default="auto",
        help="form of the selection; auto: threshold where TensorRT's TopK could not follow",
    )
    add("--cache", choices=("dynamic", "static"), default="dynamic",
        help="static: buffers of fixed length, by TensorScatter (opset 24)")  # fmt: skip
    add("--slots", type=int, metavar="N", default=argparse.SUPPRESS,
        help="with --cache static: tokens that the buffers have room for "
        "(default: what the budget keeps of --max-seq, and a reply)")  # fmt: skip
    add("--engine", action="store_true",
        help="build TensorRT engines of the graphs as well, on this machine's GPU")  # fmt: skip
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from .export.package import ExportOptions, export_checkpoint

    config = config_of(
        getattr(args, "policy", None), args.paper, budget=args.budget,
        budget_tokens=getattr(args, "budget_tokens", None),
    )  # fmt: skip
    folder = export_checkpoint(
        ExportOptions(
            checkpoint=args.checkpoint,
            out=args.out,
            config=config,
            max_seq=args.max_seq,
            dtype=args.dtype,
            select=args.select,
            cache=args.cache,
            slots=getattr(args, "slots", None),
        )
    )
    print(f"written: {folder}")
    from .export.trt_rules import report  # imports onnx: `export_checkpoint` says if it is missing

    for line in report(folder, args.max_seq):
        print(line)
    if args.engine:
        from .export.engine import build_engines

        build_engines(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
