"""`starkv export`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import OptionError
from .options import add_method, add_nbits, config_of, importing, share_of


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint as ONNX graphs that compress their cache themselves",
        description="Writes a folder with prefill.onnx, decode.onnx, visual.onnx, their weights, "
        "export.json, and the files of tokenizer and processor. If the export fails, the command "
        "prints one sentence, ends with exit code 2 and leaves no files. If only the engines "
        "fail, the graphs stay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = export.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that save_pretrained wrote")
    add("-o", "--out", type=Path, metavar="DIR", required=True, help="new folder to write")
    add("--budget", default="0.2", help="share of the tokens seen that stays cached: 0.2 or 20%%")
    add(
        "--budget-tokens",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="number of tokens that stay at any length; k is then a constant of the graph",
    )
    add_method(export)
    add_nbits(export)
    add("--max-seq", type=int, metavar="N", default=16384, help="most tokens a session may see")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type of weights and cache; bfloat16 runs on GPUs only",
    )
    add(
        "--select",
        choices=("auto", "topk", "threshold"),
        default="auto",
        help="form of the selection; auto uses threshold if --max-seq is above the limit of "
        "TensorRT's TopK",
    )
    add(
        "--cache",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic: the cache grows; static: buffers of fixed length, with TensorScatter "
        "(opset 24)",
    )
    add(
        "--slots",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="with --cache static: number of tokens that fit in the buffers "
        "(default: what the budget keeps of --max-seq, plus a reply)",
    )
    add(
        "--engine",
        action="store_true",
        help="also build TensorRT engines of the graphs, on this machine's GPU",
    )
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.engine and args.nbits != 16:
        raise OptionError(
            f"--nbits {args.nbits} with --engine: TensorRT takes no codes of few bits as an input; "
            "leave out one of the two"
        )
    importing()
    from ..export.onnx.package import ExportOptions, export_checkpoint

    config = config_of(
        getattr(args, "policy", None),
        args.paper,
        budget=share_of(args.budget),
        budget_tokens=getattr(args, "budget_tokens", None),
        nbits=args.nbits,
    )
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
    # This imports onnx. If onnx were missing, `export_checkpoint` would have raised an error.
    from ..export.tensorrt.trt_rules import refused_lines

    for line in refused_lines(folder, args.max_seq):
        print(line)
    if args.engine:
        from ..export.tensorrt.engine import build_engines

        build_engines(folder)
    return 0
