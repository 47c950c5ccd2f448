"""The `tandem` command. Each subcommand loads what it needs when it runs."""

import os
import sys
from typing import Annotated, cast

import typer

from runtime.errors import StartupError, TandemError

# The class of a wrong command line; typer has carried its own copy of click since 0.26.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

app = typer.Typer(
    name="tandem",
    help="A server for large language models that runs prefill and decode on separate workers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings and where they come from.")
app.add_typer(config_app, name="config")

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
"""The flags of a process are the fields of its settings; `tandem up --help` lists them."""

Grpc = Annotated[
    str, typer.Option("--grpc", "--url", metavar="HOST:PORT", help="The gateway's gRPC address.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; unset: the model's own.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling, in (0, 1].")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any other sampling field, for example -o n=2 -o top_k=40; may be given again.",
    ),
]
DEFAULT_GRPC = "127.0.0.1:50051"
DEFAULT_HTTP = "http://127.0.0.1:8000"


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def up(context: typer.Context) -> None:
    """Start a gateway and workers on this machine (`tandem up --help` lists the flags)."""
    from tandem.launcher import up

    raise typer.Exit(up(context.args))


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def gateway(context: typer.Context) -> None:
    """Start one gateway."""
    _become("gateway", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def prefill(context: typer.Context) -> None:
    """Start one prefill worker."""
    _become("prefill", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def decode(context: typer.Context) -> None:
    """Start one decode worker."""
    _become("decode", context.args)


def _become(role: str, argv: list[str]) -> None:
    from tandem.launcher import child_env, program

    command = program(role) + argv
    os.execve(command[0], command, child_env(os.environ))


@app.command()
def complete(
    prompt: str,
    grpc: Grpc = DEFAULT_GRPC,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    option: Option = None,
) -> None:
    """Continue PROMPT, streamed to stdout."""
    from tandem import terminal

    sampling = terminal.sampling(max_tokens, temperature, top_p, seed, stop, option or ())
    terminal.complete(prompt, grpc, sampling)


@app.command()
def chat(
    grpc: Grpc = DEFAULT_GRPC,
    quick: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Say this, print the answer, leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    option: Option = None,
) -> None:
    """Talk with the model; Ctrl-C ends an answer, Ctrl-D the conversation."""
    from tandem import terminal

    conversation = terminal.Conversation(
        grpc, terminal.sampling(max_tokens, temperature, top_p, seed, stop, option or ()), system
    )
    if quick is None:
        conversation.repl()
    else:
        conversation.turn(quick)


@app.command()
def status(
    grpc: Grpc = DEFAULT_GRPC,
    http: Annotated[str, typer.Option(metavar="URL", help="The gateway's HTTP address.")] = DEFAULT_HTTP,
) -> None:
    """Show the gateway, its workers and their load."""
    from tandem import inspection

    inspection.status(grpc, http)


@app.command()
def health(
    http: Annotated[str | None, typer.Option(metavar="URL", help="Ask GET /ready here.")] = None,
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask the gRPC health service.")
    ] = None,
) -> None:
    """Exit with code 0 if requests can be served, else 1."""
    from tandem import inspection

    problem = inspection.health(http or (None if grpc else DEFAULT_HTTP), grpc)
    typer.echo(problem or "ready")
    raise typer.Exit(1 if problem else 0)


@app.command()
def bench(
    objectives: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    backend: Annotated[str, typer.Option(help="grpc, or http for any OpenAI-compatible server.")] = "grpc",
    grpc: Grpc = DEFAULT_GRPC,
    http: Annotated[str, typer.Option(metavar="URL", help="HTTP address for --backend http.")] = DEFAULT_HTTP,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to measure.")] = 100,
    request_rate: Annotated[
        float, typer.Option(help="Poisson arrivals per second; inf: all at once.")
    ] = float("inf"),
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests in flight.")] = None,
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Unset: from the served checkpoint.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts and arrivals.")] = 0,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before the measurement.")] = 1,
    goodput: Annotated[list[str] | None, typer.Option(metavar="ttft:MS tpot:MS", help="Objectives.")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all numbers here.")] = None,
) -> None:
    """Measure latency and throughput with random prompts."""
    from tandem import bench_command
    from tandem.bench import Workload

    workload = Workload(
        num_prompts=num_prompts,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        input_len=random_input_len,
        output_len=random_output_len,
        temperature=temperature,
        seed=seed,
        num_warmups=num_warmups,
    )
    options = bench_command.Options(
        backend=backend, address=http if backend == "http" else grpc, vocab_size=vocab_size, json_file=json
    )
    words = [*(goodput or []), *(objectives or [])]
    raise typer.Exit(bench_command.run(workload, options, words))


@config_app.command(context_settings=PASS_THROUGH, add_help_option=False)
def show(context: typer.Context) -> None:
    """Print every setting of `tandem [up|gateway|prefill|decode] [FLAGS]`, its value and its origin."""
    from tandem import settings_view

    settings_view.show(context.args)


@app.command()
def version() -> None:
    """Print the version."""
    from runtime.version import VERSION

    typer.echo(VERSION)


def main() -> None:
    """Run the command line; every error is one line on stderr.

    Exit codes: 2 for a wrong command line or a process that cannot start, 1 for a failed request, 130 after
    Ctrl-C.
    """
    sys.exit(_run(sys.argv[1:]))


def _run(argv: list[str]) -> int:
    try:
        code = app(argv or ["--help"], prog_name="tandem", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _fail(error.format_message(), 2)
    except StartupError as error:
        return _fail(error.message, 2)
    except TandemError as error:
        return _fail(error.message, 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our stdout has left; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(message: str, code: int) -> int:
    typer.echo(f"error: {message}", err=True)
    return code
