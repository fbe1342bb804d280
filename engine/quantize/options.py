"""The options of `text-generation-server quantize`. Names and defaults of TGI's own are TGI's. No torch."""

from __future__ import annotations

import argparse
import dataclasses

from engine.link.errors import StartError

DESCRIPTION = """\
Quantise a dense model and write it to a new folder, in a format that this and other engines load without a flag.
gptq and awq look at what your own text makes the model compute, and lose the least; int8 and int4 need no text. The
model is gone through layer by layer, so memory for a few layers is enough. The last line of standard output is the
folder; the log, on standard error, tells how far it is and the perplexity before and after.
"""
EPILOG = """\
Methods:
  gptq  AutoGPTQ's format, symmetric, --bits 2, 3, 4 or 8; TGI's method. For any engine.
  awq   AutoAWQ's format (gemm), 4 bits. For any engine.
  int8  GPTQ's format with 8 bits and a scale for each output: nearly nothing is lost.
  int4  AWQ's format with groups of 64, each weight rounded by itself.

Data:
  --dataset is a text file, or one in JSON lines with objects that have a "text": 100 to 500 kB of what the model will
  be used for. Its last tokens (--perplexity-tokens) are not quantised with but scored before and after.

Examples:
  text-generation-server quantize Qwen/Qwen2.5-0.5B-Instruct my-gptq --dataset my.txt
  text-generation-server quantize ./my-model ./my-awq --method awq --dataset my.jsonl
  text-generation-server quantize ./my-model ./my-int8 --method int8
  text-generation-launcher --model-id ./my-gptq
"""

BITS = {"gptq": (4, 2, 3, 8), "awq": (4,), "int8": (8,), "int4": (4,)}
"""By method, the default first."""
GROUP_SIZES = {"gptq": 128, "awq": 128, "int8": -1, "int4": 64}
"""Default by method."""
WITH_DATA = ("gptq", "awq")
MIN_TOKENS = 16
"""Of a sample: fewer say nothing about a text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Checked and with the method's defaults filled in."""

    model_id: str
    output_dir: str
    method: str = "gptq"
    dataset: str | None = None
    bits: int = 4
    group_size: int = 128
    """-1: one group for each output."""
    percdamp: float = 0.01
    is_act_order: bool = False
    num_samples: int = 32
    sample_tokens: int = 512
    perplexity_tokens: int = 4096
    revision: str | None = None
    upload_to: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `read_options` reads."""
    defaults = QuantizeOptions(model_id="", output_dir="")
    parser.add_argument("model_id", metavar="MODEL_ID", help="id on the Hub, or a local folder; a dense model")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder to write; it must be new or empty")
    parser.add_argument("--method", choices=[*BITS], default=defaults.method, help="see below (default: gptq)")
    parser.add_argument("--dataset", metavar="FILE", help="text, or JSON lines; gptq and awq need it")
    parser.add_argument("--bits", type=int, help="bits of a weight (default: 4; int8: 8)")
    parser.add_argument(
        "--groupsize",
        type=int,
        metavar="N",
        help="inputs that share a scale, -1 for all of them (default: 128; int4: 64, int8: -1)",
    )
    parser.add_argument(
        "--percdamp",
        type=float,
        default=defaults.percdamp,
        metavar="SHARE",
        help="gptq: damping, a share of the mean of the Hessian's diagonal (default: 0.01)",
    )
    parser.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=defaults.is_act_order,
        help="gptq: groups by importance, not by place (desc_act); a little better, slower in most engines",
    )
    for name, default, text in (
        ("num-samples", defaults.num_samples, "samples taken from the dataset"),
        ("sample-tokens", defaults.sample_tokens, "tokens in a sample"),
        ("perplexity-tokens", defaults.perplexity_tokens, "tokens at the dataset's end to score, 0 for none"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/N (default: main)")
    parser.add_argument("--upload-to-model-id", metavar="ID", help="upload the folder to this model of the Hub, too")
    parser.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="accepted, without effect: code of a repository is never run",
    )


def read_options(args: argparse.Namespace) -> QuantizeOptions:
    """Raises StartError for what contradicts."""
    method: str = args.method
    bits = BITS[method][0] if args.bits is None else args.bits
    if bits not in BITS[method]:
        offered = " or ".join(str(value) for value in sorted(BITS[method]))
        raise StartError(f"--method {method} has {offered} bits, not {bits}: change --bits or leave it out")
    group_size = GROUP_SIZES[method] if args.groupsize is None else args.groupsize
    if group_size != -1 and group_size < 8:
        raise StartError(f"--groupsize {group_size} is no size of a group: give -1 (one group), 32, 64 or 128")
    if not 0 < args.percdamp < 1:
        raise StartError(f"--percdamp {args.percdamp:g} is not a share: give a number above 0 and below 1, like 0.01")
    if args.act_order and method != "gptq":
        raise StartError(f"--act-order is for --method gptq, not {method}: leave it out")
    if method in WITH_DATA and args.dataset is None:
        raise StartError(
            f"--method {method} needs text to calibrate with: give --dataset FILE (text, or JSON lines), or take "
            "--method int8 or int4, which need none"
        )
    for name, value, least in (
        ("num-samples", args.num_samples, 1),
        ("sample-tokens", args.sample_tokens, MIN_TOKENS),
        ("perplexity-tokens", args.perplexity_tokens, 0),
    ):
        if value < least:
            raise StartError(f"--{name} {value} is too few: give {least} or more")
    if args.perplexity_tokens == 1:
        raise StartError("--perplexity-tokens 1 leaves nothing to predict: give 2 or more, or 0 for none")
    return QuantizeOptions(
        model_id=args.model_id,
        output_dir=args.output_dir,
        method=method,
        dataset=args.dataset,
        bits=bits,
        group_size=group_size,
        percdamp=args.percdamp,
        is_act_order=args.act_order,
        num_samples=args.num_samples,
        sample_tokens=args.sample_tokens,
        perplexity_tokens=args.perplexity_tokens if args.dataset is not None else 0,
        revision=args.revision,
        upload_to=args.upload_to_model_id,
    )
