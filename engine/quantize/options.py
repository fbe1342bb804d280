"""The options of `text-generation-server quantize`. Those that TGI has keep its names and defaults. No torch."""

from __future__ import annotations

import argparse
import dataclasses

from engine.link.errors import StartError
from engine.quantize.methods import METHODS

METHOD_LINES = "\n".join(f"  {name:<4}  {method.help}" for name, method in METHODS.items())
DESCRIPTION = """\
Quantise a dense model and write it to a new folder, in a format that this and other engines load without a flag.
gptq and awq look at what your own text makes the model compute, and lose the least; int8 and int4 need no text. The
model is gone through layer by layer, so memory for a few layers is enough. The last line of standard output is the
folder; the log, on standard error, tells how far it is and the perplexity before and after.
"""
EPILOG = f"""\
Methods:
{METHOD_LINES}

Data:
  --dataset is a text file, or one in JSON lines with objects that have a "text": 100 to 500 kB of what the model will
  be used for. Its last tokens (--perplexity-tokens) are not quantised with but scored before and after.

Examples:
  text-generation-server quantize Qwen/Qwen2.5-0.5B-Instruct my-gptq --dataset my.txt
  text-generation-server quantize ./my-model ./my-awq --method awq --dataset my.jsonl
  text-generation-server quantize ./my-model ./my-int8 --method int8
  text-generation-launcher --model-id ./my-gptq
"""

MIN_TOKENS = 16
"""A sample of fewer tokens says nothing about a text."""
MIN_GROUP_SIZE = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Options that are checked and have the method's defaults."""

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
    """Add the arguments that `read_options` reads."""
    defaults = QuantizeOptions(model_id="", output_dir="")
    parser.add_argument("model_id", metavar="MODEL_ID", help="id on the Hub, or a local folder; a dense model")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder to write; it must be new or empty")
    parser.add_argument("--method", choices=[*METHODS], default=defaults.method, help="see below (default: gptq)")
    parser.add_argument("--dataset", metavar="FILE", help="text, or JSON lines; gptq and awq need it")
    parser.add_argument("--bits", type=int, help="bits of a weight (default: 4; int8: 8)")
    groups = "inputs that share a scale, -1 for all of them (default: 128; int4: 64, int8: -1)"
    parser.add_argument("--groupsize", type=int, metavar="N", help=groups)
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
    """Fill in the method's defaults. Raises StartError for options that contradict each other."""
    method = METHODS[args.method]
    options = QuantizeOptions(
        model_id=args.model_id,
        output_dir=args.output_dir,
        method=args.method,
        dataset=args.dataset,
        bits=method.bits[0] if args.bits is None else args.bits,
        group_size=method.group_size if args.groupsize is None else args.groupsize,
        percdamp=args.percdamp,
        is_act_order=args.act_order,
        num_samples=args.num_samples,
        sample_tokens=args.sample_tokens,
        perplexity_tokens=args.perplexity_tokens,
        revision=args.revision,
        upload_to=args.upload_to_model_id,
    )
    _check_method(options)
    _check_counts(options)
    return options if options.dataset is not None else dataclasses.replace(options, perplexity_tokens=0)


def _check_method(options: QuantizeOptions) -> None:
    """Raise StartError for what the method can't have."""
    name, method = options.method, METHODS[options.method]
    if options.bits not in method.bits:
        choices = " or ".join(str(bits) for bits in sorted(method.bits))
        raise StartError(f"--method {name} has {choices} bits, not {options.bits}: change --bits or leave it out")
    if options.group_size != -1 and options.group_size < MIN_GROUP_SIZE:
        raise StartError(f"--groupsize {options.group_size} is no size of a group: give -1 (one group), 32, 64 or 128")
    if not 0 < options.percdamp < 1:
        raise StartError(
            f"--percdamp {options.percdamp:g} is not a share: give a number above 0 and below 1, like 0.01"
        )
    if options.is_act_order and not method.has_act_order:
        names = " or ".join(name for name, method in METHODS.items() if method.has_act_order)
        raise StartError(f"--act-order is for --method {names}, not {name}: leave it out")
    if method.needs_data and options.dataset is None:
        names = " or ".join(name for name, method in METHODS.items() if not method.needs_data)
        raise StartError(
            f"--method {name} needs text to calibrate with: give --dataset FILE (text, or JSON lines), or take "
            f"--method {names}, which need none"
        )


def _check_counts(options: QuantizeOptions) -> None:
    """Raise StartError for counts that are too small."""
    for name, value, min_value in (
        ("num-samples", options.num_samples, 1),
        ("sample-tokens", options.sample_tokens, MIN_TOKENS),
        ("perplexity-tokens", options.perplexity_tokens, 0),
    ):
        if value < min_value:
            raise StartError(f"--{name} {value} is too few: give {min_value} or more")
    if options.perplexity_tokens == 1:
        raise StartError("--perplexity-tokens 1 leaves nothing to predict: give 2 or more, or 0 for none")
