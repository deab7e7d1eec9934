"""The `vitfast` command: arguments in, one answer out. The work is done elsewhere, imported on use.

Exit codes: 0 all went well; 1 some images failed, outputs differ, or the operation failed; 2 arguments or inputs that
cannot be used; 128 and the signal's number (130, 143, 129) after SIGINT, SIGTERM or SIGHUP. With --json, stdout holds
exactly one JSON document, an error being {"error": ...}; everything else goes to stderr.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitfast.cli import bench, bench_serve, embed, models, search, serve
from vitfast.cli.answer import command, run
from vitfast.cli.options import AllowPickle, BackendName, Device, DtypeOption, Json, WeightsKey, dtype_name
from vitfast.version import __version__


class App(typer.Typer):
    """A Typer app that ends without a traceback where nothing can be written."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command that the arguments name."""
        return run(lambda: super(App, self).__call__(*args, **kwargs))


app = App(
    help="Vision Transformer inference on fused kernels.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
bench.app.add_typer(bench_serve.app)
app.add_typer(bench.app, name="bench")
app.add_typer(embed.app)
app.add_typer(search.app)
app.add_typer(models.app)
app.add_typer(serve.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitfast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Vision Transformer inference on fused kernels."""
    context.obj = debug


@app.command(epilog="Example: `vitfast doctor --json`")
def doctor(
    context: typer.Context,
    plan: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show which backend runs each part of this model, and why.")
    ] = None,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    as_json: Json = False,
) -> None:
    """Show what would run here, and every reason why not."""
    with command(context, as_json) as answer:
        from vitfast.diagnostics import doctor as module

        if plan is not None:
            options: dict[str, Any] = {"allow_pickle": allow_pickle, "weights_key": weights_key}
            answer.json = module.plan(plan, device=device, dtype=dtype, **options)
            answer.text = module.render_plan(answer.json)
            return
        if device or dtype or allow_pickle or weights_key:
            raise ValueError("--device, --dtype, --allow-pickle and --weights-key go with --plan MODEL")
        answer.json = module.report()
        answer.text = module.render(answer.json)


@app.command(
    epilog="Example: `vitfast inspect --arch sm_90 --kernel linear`, `vitfast inspect -m vit_base_patch16_224`"
)
def inspect(
    context: typer.Context,
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture to compile for, e.g. sm_90; may be repeated.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel to compile, e.g. linear; may be repeated. [default: all]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Predict this model's forward instead of compiling.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="With --model: images.")] = 256,
    chip: Annotated[str, typer.Option(help="With --model: a100, l40s, h100, h200 or b200.")] = "h100",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", parser=dtype_name, metavar="[fp32|fp16|bf16|fp8|int8]", help="With --model: what to compute in."
        ),
    ] = "bf16",
    native: Annotated[
        bool,
        typer.Option(
            help="The CUDA linear and attention for Hopper, compiled by nvcc (from a checkout); with --model: "
            "predict with that linear."
        ),
    ] = False,
    backward: Annotated[
        bool, typer.Option(help="With --model: predict the gradients of its attention instead of its forward.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report registers, spills and shared memory of the compiled kernels; or predict a model's time. Needs no GPU.

    A prediction stands beside what result files of that GPU say, where there are any.
    """
    with command(context, as_json) as answer:
        if native:
            from vitfast.diagnostics import native_attention, native_code

            if arch or kernel or backward:
                raise ValueError("--native has kernels for sm_90: it goes without --arch, --kernel and --backward")
            rows = native_code.inspect_linear()
            if model is None:
                scores = native_attention.inspect_attention()
                answer.json = [*rows, *scores]
                answer.text = [native_code.render(rows), "", native_attention.render(scores)]
                return
        if backward and model is None:
            raise ValueError("--backward goes with --model")
        if model is None:
            from vitfast.diagnostics import compiled as compiled

            options: dict[str, Any] = {"archs": arch} if arch else {}
            answer.json = compiled.inspect(**options, kernels=kernel or None)
            answer.text = compiled.render(answer.json)
            return
        if arch or kernel:
            raise ValueError("--arch and --kernel compile kernels, --model predicts: give one or the other")
        from vitfast.diagnostics import predict
        from vitfast.models.config import NAMED
        from vitfast.ops.names import did_you_mean

        if model not in NAMED:
            near = did_you_mean(model, NAMED)
            raise ValueError(f"--model must be one of {', '.join(NAMED)}, got {model!r}{near}")
        from vitfast.benchmarks import predicted, published_figures

        answer.json = predict.predict(NAMED[model], batch=batch, chip=chip, dtype=dtype, backward=backward)
        predict.add_machine_code(answer.json)
        if native:
            native_code.add_native(answer.json, rows)
        if not backward:
            published_figures.add_errors(answer.json)
            predicted.add_measured(answer.json, NAMED[model], predicted.results_of(chip))
        answer.text = predict.render(answer.json)


@app.command(epilog="Example: `vitfast verify facebook/dinov2-small --dtype bf16 --images photos/`")
def verify(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, model directory or .safetensors file.")],
    against: Annotated[
        str, typer.Option(help="`torch`: plain PyTorch ops in fp32; or another model that should give the same.")
    ] = "torch",
    images: Annotated[
        list[str] | None,
        typer.Option(help="Image file, folder or quoted glob pattern; may be repeated. [default: random images]"),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    backend: Annotated[BackendName, typer.Option(help="What runs MODEL.")] = BackendName.auto,
    as_json: Json = False,
) -> None:
    """Check that a model's outputs are those of plain PyTorch.

    In all but fp32 they may be at most twice as far from fp32 as PyTorch's own in that dtype. Exit code
    0: the same; 1: different; 2: the model or the images cannot be used.
    """
    with command(context, as_json) as answer:
        from vitfast.diagnostics.verify import render, verify_model

        report = verify_model(
            model,
            against=against,
            images=images or (),
            device=device,
            dtype=dtype,
            backend=backend.value,
            allow_pickle=allow_pickle,
            weights_key=weights_key,
        )
        answer.code = 0 if report.ok else 1
        answer.json = report.to_dict()
        answer.text = render(report)
