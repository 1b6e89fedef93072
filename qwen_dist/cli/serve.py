"""`qwen-dist serve`: answer requests of the OpenAI API over HTTP."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_dist.cli.console import loading
from qwen_dist.cli.flags import DeviceFlags, Verb
from qwen_dist.cli.session import DEMO_MODEL
from qwen_dist.config import ServeConfig, parse_bytes
from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.runtime.backend import find_devices, start_jax

if TYPE_CHECKING:
    from qwen_dist.engine.engine import Engine
    from qwen_dist.server.engine_thread import OpenedModel
    from qwen_dist.server.service import Service

API_KEY = "QWEN_DIST_API_KEY"
EXAMPLES = """\
examples:
  qwen-dist serve                                     the small demonstration model at http://127.0.0.1:8000/v1
  qwen-dist serve --config configs/serve.py --model ~/qwen3-0.6b --port 8080
  qwen-dist serve --model DIR --adapter law=run/adapter --adapter poems=other/adapter   requests choose by "model"
  QWEN_DIST_API_KEY=secret qwen-dist serve --model Qwen/Qwen3-8B --mesh tensor=4 --host 0.0.0.0
defaults of the sampling flags come from the checkpoint's generation_config.json; a request can set its own"""


def run(config: ServeConfig, flags: DeviceFlags) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    import asyncio

    _check()
    name = _served_name(config)
    config, adapters = _with_adapters(config, name)
    try:
        from qwen_dist.server.http_server import address_of, bind, note, serve
    except ImportError as error:
        raise UserError(f"serve needs {error.name}: pip install 'qwen-dist[serve]'") from None
    listening = bind(config.host, config.port)
    start_jax(flags.num_cpu_devices, config.model.dtype)
    find_devices()
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

        service = _make_service(config, name, adapters, ready, failed, quiet=flags.json)
        return service, make_app(service, api_key)

    note(f"loading {printable(config.model.path)}; {url}/health says when it is ready")
    asyncio.run(serve(make, listening, on_ready, header_s=config.header_timeout, drain_s=config.drain_timeout))
    sys.stdout.flush()
    note("stopped")
    return 0


def _check() -> None:
    from qwen_dist.runtime.cluster import detect_cluster

    cluster = detect_cluster(None, None, None, os.environ)
    if cluster is not None and cluster.num_processes > 1:
        raise UsageError(
            f"serve runs as one process, and this is one of {cluster.num_processes}: start it on one machine, with --mesh "
            "over its devices"
        )


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


def _make_service(
    config: ServeConfig,
    name: str,
    adapters: Mapping[str, str],
    on_ready: Callable[[], None],
    on_failure: Callable[[BaseException], None],
    *,
    quiet: bool,
) -> Service:
    from qwen_dist.engine.open import open_engine
    from qwen_dist.server.engine_thread import OpenedModel
    from qwen_dist.server.http_server import note
    from qwen_dist.server.service import Service, ServiceLimits

    def open_model() -> OpenedModel:
        with loading(quiet=quiet) as progress:
            opened = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=config.engine.max_batch_size,
                cache_bytes=parse_bytes(config.engine.kv_cache_memory),
                steps_per_dispatch=config.engine.steps_per_dispatch,
                policy=config.engine.policy,
                prefix_cache=config.engine.prefix_cache,
                snapshot_fraction=config.engine.snapshot_fraction,
                adapters=adapters,
                template_variables=config.chat.variables,
                progress=progress,
                announce=note,
            )
        return OpenedModel(*opened)

    def prepare(engine: Engine) -> None:
        if config.warm_up:
            engine.warm_up(lambda done, total: note(f"compiling: {done} of {total} programs"), for_all=True)

    limits = ServiceLimits(
        max_body_bytes=parse_bytes(config.max_body_size),
        max_open=config.engine.max_batch_size + config.max_waiting,
        request_s=config.request_timeout,
    )
    return Service(
        open_model,
        prepare,
        name=name,
        adapters=list(adapters),
        limits=limits,
        variables=config.chat.variables,
        has_seed=config.sampling.seed is not None,
        on_ready=on_ready,
        on_failure=on_failure,
    )


VERB = Verb("serve", ServeConfig, DeviceFlags, run, EXAMPLES, defaults=DEMO_MODEL)
