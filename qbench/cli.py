"""The console command `qbench`: parsing, messages and exit codes; what it does is in `qbench.job`.

Exit codes: 0 done; 1 verified, and a promised zero is not zero; 2 refused, with one line on stderr that says why and
what would work; 130 interrupted or terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbench import targets
from qbench.errors import ConfigError, QBenchError, QBenchWarning
from qbench.export.runtimes import RUNTIMES
from qbench.fake_quantize import METHODS
from qbench.fake_quantize.bias import BIAS_SCALES
from qbench.job import (
    FAST_PATHS,
    FLOAT_TRAINING,
    QAT_TRAINING,
    REPORT_FILE,
    WORTH_COMPILING,
    Job,
    run,
    versions,
)
from qbench.past_runs import verify_again
from qbench.profiling.command import AUTOCAST, DEVICES, profile_named
from qbench.report.profile import MOST, ORDERS
from qbench.report.targets import target_details, target_table
from qbench.report.text import run_table, verification_table
from qbench.training import Settings

_EPILOG = """\
examples:
  qbench train --model resnet18 --data digits --target onnxruntime --out runs/demo
  qbench train --model nets.py:tiny --data imagefolder:photos --image-size 96 --out runs/tiny
"""
_VERIFY_EPILOG = """\
exit codes:
  0  every promised zero is zero
  1  one is not
  2  the folder cannot be verified; one line says why

example:
  qbench verify runs/demo
"""


_PROFILE_EPILOG = """\
examples:
  qbench profile --model mobilenet_v2 --batch-size 16
  qbench profile --model nets.py:tiny --image-size 96 --low-memory --order model --top 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), _termination_as_interrupt():
            _show_warnings_in_one_line()
            return int(arguments.do(arguments))
    except QBenchError as error:
        print(f"qbench: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qbench: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a reader, `head` say, that has seen enough; what is left unwritten must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(arguments: argparse.Namespace) -> int:
    summary = run(job_of(arguments), say=_say)
    print(run_table(summary, folder=str(arguments.out)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found, _ = verify_again(arguments.folder, data=arguments.data, images=arguments.verify_images, say=_say)
    print(verification_table(found))
    verdict = "every promised 0 is 0" if found.kept else "a promised 0 is not 0"
    print(f"{verdict}; report: {arguments.folder / REPORT_FILE}")
    return 0 if found.kept else 1


def _targets(arguments: argparse.Namespace) -> int:
    name = arguments.name
    print(target_table(targets.TARGETS) if name is None else target_details(targets.get(name)), flush=True)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    _say("measure steps of the float model and of its QAT form, in turns")
    own = ("command", "do", "order", "top", "json")
    found = profile_named(**{name: value for name, value in vars(arguments).items() if name not in own})
    if arguments.json is not None:
        arguments.json.write_text(found.to_json(), encoding="utf-8")
    print(found.table(arguments.order, arguments.top or None))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every `qbench` command."""
    parser = argparse.ArgumentParser(
        prog="qbench", description="What you train is what you deploy: bias-aware quantization-aware training."
    )
    parser.add_argument("--version", action="version", version=f"qbench {versions().get('qbench', '(not installed)')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model, quantize it while training, deploy it and compare every code",
        description="Train float, then quantization-aware; convert, export, verify every code, score the files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(train)
    _add_quantization(train)
    _add_training(train)
    _add_run(train)
    train.set_defaults(do=_train)
    again = commands.add_parser(
        "verify",
        help="compare every code of an earlier run again, and write its report anew",
        description="Compare the files of a run with each other, with its QAT model and with the integer programs.",
        epilog=_VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    again.add_argument("folder", type=Path, metavar="DIR", help="what --out of qbench train named")
    again.add_argument("--data", help="digits, or imagefolder:DIR (default: the data of the run)")
    again.add_argument("--verify-images", type=_positive, metavar="N", help="at most so many (default: as the run)")
    again.set_defaults(do=_verify)
    costs = commands.add_parser(
        "profile",
        help="show where the time and the memory of QAT training go, layer by layer, against float training",
        description="Measure a training step of a model in float and in its QAT form on random images, in turns.",
        epilog=_PROFILE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_measured(costs)
    _add_quantization(costs)
    _add_measuring(costs)
    costs.set_defaults(do=_profile)
    known = commands.add_parser(
        "targets",
        help="list the targets: their grids, their rules, where each is from, what was verified",
        description="Without a name: a table of all targets. With one: everything of that target.",
    )
    known.add_argument("name", nargs="?", metavar="NAME", help=", ".join(targets.names()))
    known.set_defaults(do=_targets)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 1 on")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _bits(text: str) -> int | str:
    return text if text == "target" else int(text)


def job_of(arguments: argparse.Namespace) -> Job:
    """The `Job` that the options of `qbench train` stand for.

    Raises:
        ConfigError: an option outside its range.
    """
    common = {"batch_size": arguments.batch_size, "seed": arguments.seed, "workers": arguments.workers}
    plain = {field.name for field in dataclasses.fields(Job)} & set(vars(arguments))
    return Job(
        **{name: getattr(arguments, name) for name in plain},
        float_training=_replace(FLOAT_TRAINING, epochs=arguments.epochs, lr=arguments.lr, **common),
        qat_training=_replace(
            QAT_TRAINING,
            epochs=arguments.qat_epochs,
            lr=arguments.qat_lr,
            freeze_observers_at=arguments.freeze_observers_at,
            freeze_bn_at=arguments.freeze_bn_at,
            **common,
        ),
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--model", default="resnet18", help="torchvision classification model, or file.py:function")
    group.add_argument("--data", default="digits", help="digits, or imagefolder:DIR (default: %(default)s)")
    group.add_argument("--target", default="onnxruntime", help=f"{', '.join(targets.names())} (default: %(default)s)")
    group.add_argument("--out", type=Path, required=True, help="folder for the files; appears when all are there")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    group.add_argument("--image-size", type=int, metavar="PX", help="height and width (default: the data's own)")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    for role in ("weight", "activation", "bias"):
        group.add_argument(
            f"--{role}-bits", type=_bits, default="target", metavar="N", help="default: the target's own"
        )
    group.add_argument("--bias-scale", default="target", help=f"{', '.join(BIAS_SCALES)} (default: the target's own)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=FLOAT_TRAINING.epochs, help="float (default: %(default)s)")
    group.add_argument("--lr", type=float, default=FLOAT_TRAINING.lr, help="float (default: %(default)s)")
    group.add_argument("--qat-epochs", type=float, default=QAT_TRAINING.epochs, help="default: %(default)s")
    group.add_argument("--qat-lr", type=float, default=QAT_TRAINING.lr, help="default: %(default)s")
    group.add_argument(
        "--freeze-observers-at",
        type=float,
        default=QAT_TRAINING.freeze_observers_at,
        metavar="SHARE",
        help="share of the QAT steps after which ranges stand still (default: %(default)s)",
    )
    group.add_argument(
        "--freeze-bn-at",
        type=float,
        default=QAT_TRAINING.freeze_bn_at,
        metavar="SHARE",
        help="share of the QAT steps after which BN statistics stand still (default: %(default)s)",
    )
    group.add_argument("--batch-size", type=int, default=FLOAT_TRAINING.batch_size, help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running and deploying")
    group.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    group.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    group.add_argument(
        "--fast-path",
        choices=FAST_PATHS,
        default="auto",
        help=f"QAT by generated code; auto: from {WORTH_COMPILING} steps on (default: %(default)s)",
    )
    group.add_argument("--max-batch", type=int, default=64, help="largest batch that the files take (default: 64)")
    group.add_argument("--verify-images", type=int, default=512, help="compare on at most so many (default: 512)")
    group.add_argument(
        "--runtimes",
        type=lambda text: tuple(text.split(",")),
        default=tuple(RUNTIMES),
        help=f"comma-separated (default: {','.join(RUNTIMES)})",
    )


def _add_measured(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--model", default="resnet18", help="torchvision classification model, or file.py:function")
    group.add_argument("--target", default="onnxruntime", help=f"{', '.join(targets.names())} (default: %(default)s)")
    methods = ", ".join(method.name for method in METHODS)
    group.add_argument("--method", default="fixed", help=f"{methods} (default: %(default)s)")
    group.add_argument("--low-memory", action="store_true", help="save codes for backward: qbench.enable_low_memory")
    group.add_argument("--fast-path", action="store_true", help="train by generated code: qbench.enable_fast_path")
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: %(default)s")
    group.add_argument("--image-size", type=_positive, default=224, metavar="PX", help="default: %(default)s")
    group.add_argument("--channels-last", action="store_true", help="the memory format of images and weights")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring and showing")
    group.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    group.add_argument("--autocast", choices=list(AUTOCAST), default="no", help="default: %(default)s")
    group.add_argument("--rounds", type=_positive, default=11, metavar="N", help="default: %(default)s")
    group.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: its own choice)")
    group.add_argument("--order", choices=ORDERS, default="overhead", help="of the layers (default: %(default)s)")
    group.add_argument("--top", type=_count, default=MOST, metavar="N", help="layers to show; 0 for all (default: 20)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the profile there too")


def _replace(settings: Settings, **changes: object) -> Settings:
    return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]


def _message(error: QBenchError) -> str:
    """What an error says; one raised in a process that reads images arrives with that process's traceback around it."""
    text = str(error)
    if "DataLoader worker process" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _say(doing: str) -> None:
    """What starts, for a person who waits; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"qbench: {doing} …", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that what was written aside is removed; by default it would stay."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warnings_in_one_line() -> None:
    """Print warnings of qbench as one line each; other libraries' stay as Python shows them."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if issubclass(category, QBenchWarning):
            print(f"qbench: note: {message}", file=sys.stderr)
        else:
            show(message, category, *rest)  # type: ignore[arg-type]

    warnings.showwarning = showwarning  # type: ignore[assignment]
