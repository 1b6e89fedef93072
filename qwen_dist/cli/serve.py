"""`qwen-dist serve`: answer requests of the OpenAI API over HTTP."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_dist.cli.console import loading
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import DEMO_MODEL, joined
from qwen_dist.config import ServeConfig, parse_bytes
from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.runtime.backend import start_jax

if TYPE_CHECKING:
    from qwen_dist.engine.engine import Engine
    from qwen_dist.engine.request import SamplingParams
    from qwen_dist.runtime.distributed import Processes
    from qwen_dist.server.engine_thread import OpenedModel
    from qwen_dist.server.service import Service
    from qwen_dist.tokenizer import Tokenizer

API_KEY = "QWEN_DIST_API_KEY"
EXAMPLES = """\
examples:
  qwen-dist serve                                     the small demonstration model at http://127.0.0.1:8000/v1
  qwen-dist serve --model DIR --adapter law=run/adapter --adapter poems=other/adapter   requests choose by "model"
  QWEN_DIST_API_KEY=secret qwen-dist serve --model Qwen/Qwen3-8B --mesh tensor=4 --host 0.0.0.0
defaults of the sampling flags come from the checkpoint's generation_config.json; a request can set its own"""


def run(config: ServeConfig, flags: ProcessFlags) -> int:
    """Serve until SIGTERM or Ctrl-C. Of several processes, process 0 has the clients; the others run the same steps."""
    name = _served_name(config)
    config, adapters = _with_adapters(config, name)
    try:
        import qwen_dist.server.http_server  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs {error.name}: pip install 'qwen-dist[serve]'") from None
    # The key stays out of what the processes compare.
    with joined("serve", dataclasses.replace(config, api_key=""), flags, adapters=adapters) as processes:
        if processes.is_main:
            _serve(config, flags, name, adapters, processes)
        else:
            _follow(config, flags, adapters, processes)
    return 0


def _serve(config: ServeConfig, flags: ProcessFlags, name: str, adapters: Mapping[str, str], processes: Processes) -> None:
    import asyncio

    from qwen_dist.server.engine_thread import OpenedModel
    from qwen_dist.server.followers import LeadingEngine, handle_stop_requests, stop_followers
    from qwen_dist.server.http_server import address_of, bind, note, serve

    listening = bind(config.host, config.port)
    start_jax(flags.num_cpu_devices, config.model.dtype)
    processes.check_devices()
    url = address_of(listening)
    api_key = config.api_key or os.environ.get(API_KEY) or None
    if api_key is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        note(f"warning: anybody who reaches {url} can use it: set {API_KEY}")

    def on_ready() -> None:
        note(f"ready: {printable(name)} at {url}/v1")
        if flags.json:
            print(json.dumps({"url": url, "model": name}), flush=True)

    def make(ready: Callable[[], None], failed: Callable[[BaseException], None]) -> tuple[Service, Any]:
        from qwen_dist.server.app import make_app

        def open_model() -> OpenedModel:
            engine, tokenizer, sampling = _open_engine(config, adapters, note, quiet=flags.json)
            return OpenedModel(LeadingEngine(engine, control) if control is not None else engine, tokenizer, sampling)

        service = _make_service(config, name, adapters, open_model, ready, failed)
        return service, make_app(service, api_key)

    def on_start(stop: Callable[[], object]) -> None:
        if control is not None:
            threading.Thread(target=handle_stop_requests, args=(control, stop), daemon=True, name="stop-requests").start()

    control = processes.control
    note(f"loading {printable(config.model.path)}; {url}/health says when it is ready")
    limits = {"header_s": config.header_timeout, "drain_s": config.drain_timeout}
    asyncio.run(serve(make, listening, on_ready, on_start, **limits))
    if control is not None:
        stop_followers(control)
    sys.stdout.flush()
    note("stopped")


def _follow(config: ServeConfig, flags: ProcessFlags, adapters: Mapping[str, str], processes: Processes) -> None:
    from qwen_dist.server.followers import follow

    assert processes.control is not None
    start_jax(flags.num_cpu_devices, config.model.dtype)
    processes.check_devices()
    engine, *_ = _open_engine(config, adapters, lambda text: None, quiet=True)
    follow(engine, processes.control)


def _with_adapters(config: ServeConfig, name: str) -> tuple[ServeConfig, dict[str, str]]:
    """Return the configuration with the adapter that is merged, and the others by their names."""
    merged, named = [config.model.adapter] if config.model.adapter else [], dict[str, str]()
    for text in config.adapters:
        adapter, equals, directory = text.partition("=")
        if not equals or os.path.exists(text):
            merged.append(text)
        elif not adapter or not directory or adapter in named or adapter == name:
            raise UsageError(
                f"--adapter {printable(text, 80)}: give each adapter a different name, and not {printable(name)}"
            )
        else:
            named[adapter] = directory
    if len(merged) > 1:
        raise UsageError(
            f"--adapter {printable(', '.join(merged), 200)}: only one can be merged; give them names to serve all: "
            "--adapter NAME=DIR"
        )
    model = dataclasses.replace(config.model, adapter=merged[0]) if merged else config.model
    return dataclasses.replace(config, model=model), named


def _served_name(config: ServeConfig) -> str:
    """Return the name of the model: that of its directory, or its hub id or address as given."""
    if config.served_name:
        return config.served_name
    if config.model.path == DEMO_MODEL["model.path"]:
        return "demo"
    path = config.model.path
    return os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path


def _open_engine(
    config: ServeConfig, adapters: Mapping[str, str], note: Callable[[str], None], *, quiet: bool
) -> tuple[Engine, Tokenizer, SamplingParams]:
    """Load the model and compile its programs; returns what `open_engine` does."""
    from qwen_dist.engine.open import open_engine

    with loading(quiet=quiet) as progress:
        engine, tokenizer, sampling = open_engine(
            config.model,
            config.mesh,
            config.sampling,
            **config.engine.arguments(),
            adapters=adapters,
            template_variables=config.chat.variables,
            progress=progress,
            announce=note,
        )
    if config.warm_up:
        engine.warm_up(lambda done, total: note(f"compiling: {done} of {total} programs"), for_all=True)
    return engine, tokenizer, sampling


def _make_service(
    config: ServeConfig,
    name: str,
    adapters: Mapping[str, str],
    open_model: Callable[[], OpenedModel],
    on_ready: Callable[[], None],
    on_failure: Callable[[BaseException], None],
) -> Service:
    from qwen_dist.server.service import Service, ServiceLimits

    limits = ServiceLimits(
        max_body_bytes=parse_bytes(config.max_body_size),
        max_open=config.engine.max_batch_size + config.max_waiting,
        request_s=config.request_timeout,
    )
    return Service(
        open_model,
        name=name,
        adapters=list(adapters),
        limits=limits,
        variables=config.chat.variables,
        has_seed=config.sampling.seed is not None,
        on_ready=on_ready,
        on_failure=on_failure,
    )


VERB = Verb("serve", ServeConfig, ProcessFlags, run, EXAMPLES, defaults=DEMO_MODEL)
