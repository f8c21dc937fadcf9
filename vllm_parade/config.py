# SPDX-License-Identifier: Apache-2.0
"""The options of an engine with PARADE: the flags of the group ParadeConfig, validated in one place."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_parade.adapter.config import DEFAULT_SITES, SITES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Key in EngineArgs.additional_config that holds flags and keywords. In the final VllmConfig, it holds only what enters
# the compile cache key.
CONFIG_KEY = "parade"
# Upper limit of the default for --max-cpu-parades.
MOST_HOST_ADAPTERS = 256


class ServingConfigError(ValueError):
    """An option or a combination that cannot be served. The message names the flag, its value and the remedy."""


@dataclass(frozen=True)
class ParadeModule:
    """An adapter that is served from startup."""

    name: str
    """Name that clients send as `model`."""
    path: str
    """Folder of the adapter."""
    base_model_name: str | None = None
    """Parent shown in /v1/models. Defaults to the served base model."""

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | ParadeModule") -> "ParadeModule":
        """Read `name=path`, a JSON object, or a mapping with "name" and "path"."""
        if isinstance(value, ParadeModule):
            return value
        if isinstance(value, str):
            value = cls._parse_text(value)
        known = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) - known or not value.get("name") or not value.get("path"):
            raise ServingConfigError(
                f"--parade-modules got {value!r}; expected name=path or "
                '{"name": ..., "path": ..., "base_model_name": ...}'
            )
        return cls(**{key: str(entry) for key, entry in value.items() if entry is not None})

    @staticmethod
    def _parse_text(text: str) -> Mapping[str, Any]:
        if not text.lstrip().startswith("{"):
            name, equals, path = text.partition("=")
            return {"name": name.strip(), "path": path.strip()} if equals else {"name": text}
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ServingConfigError(f"--parade-modules got {text!r}, which is not valid JSON: {error}") from None


@dataclass(frozen=True)
class ServingConfig:
    """Options of an engine. Each field is a flag, such as `--enable-parade`; its docstring is the flag's help text."""

    enable_parade: bool = False
    """Serve PARADE adapters."""
    parade_modules: tuple[ParadeModule, ...] = ()
    """Adapters served from startup: NAME=PATH, or JSON {"name": ..., "path": ..., "base_model_name": ...}. Clients
    select one by sending its name as model."""
    max_parades: int = 32
    """Number of adapter slots on the device. An adapter needs a slot only while it reads a prompt, not while its
    requests decode. So a batch may mix any number of adapters."""
    max_cpu_parades: int | None = None
    """Maximum number of adapters in host memory, at least max-parades. By default, as many as fit into an eighth of the
    machine's memory, at most 256, but never fewer than max-parades or the number of parade-modules."""
    max_parade_rank: int = 16
    """Maximum bottleneck size r of an adapter. Device memory for max-parades adapters of this size is allocated at
    startup."""
    parade_vector_cache: int = 64
    """Number of prompts whose vectors stay cached after their requests end. For a cached prompt under the same adapter,
    no generator runs, and the prefix cache works as usual. Each prompt takes one row of the vector tables (1.2 MB for
    LLaMA-2 7B); 0 reserves no rows."""
    parade_sites: tuple[str, ...] | None = None
    """Projections whose outputs adapters may scale, out of q, k, v, gate, up. By default, q, v, up and the sites of all
    parade-modules. In every layer, each site takes device memory for its width times (1 + max-num-seqs +
    parade-vector-cache) numbers."""

    def __post_init__(self) -> None:
        modules = tuple(ParadeModule.parse(module) for module in self.parade_modules)
        object.__setattr__(self, "parade_modules", modules)
        for flag, least, expected in (
            ("max_parades", 1, "a positive whole number"),
            ("max_cpu_parades", 1, "a positive whole number"),
            ("max_parade_rank", 1, "a positive whole number"),
            ("parade_vector_cache", 0, "a whole number, 0 or more"),
        ):
            value = getattr(self, flag)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ServingConfigError(f"{flag_name(flag)} is {value!r}; expected {expected}")
        self._check_sites()
        self._check_combinations()

    def _check_sites(self) -> None:
        sites = self.parade_sites
        if sites is None:
            return
        unknown = [site for site in sites if site not in SITES]
        if unknown or not sites:
            raise ServingConfigError(f"--parade-sites is {list(sites)!r}; expected some of {', '.join(SITES)}")
        object.__setattr__(self, "parade_sites", tuple(site for site in SITES if site in sites))

    def _check_combinations(self) -> None:
        names = [module.name for module in self.parade_modules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ServingConfigError(f"--parade-modules names {twice[0]!r} twice; give every adapter its own name")
        if names and not self.enable_parade:
            raise ServingConfigError("--parade-modules needs --enable-parade; add it, or drop the modules")
        if self.max_cpu_parades is None:
            return
        if self.max_cpu_parades < self.max_parades:
            raise ServingConfigError(
                f"--max-cpu-parades is {self.max_cpu_parades}, less than --max-parades, {self.max_parades}; host "
                "memory also holds the adapters on the device: raise the first or lower the second"
            )
        if self.max_cpu_parades < len(names):
            raise ServingConfigError(
                f"--max-cpu-parades is {self.max_cpu_parades}, but --parade-modules names {len(names)} adapters; "
                "raise it, or leave it out"
            )

    @property
    def least_cpu_parades(self) -> int:
        """Minimum capacity of host memory in adapters: all slots, and all of parade-modules, must fit."""
        return max(self.max_parades, len(self.parade_modules))

    def num_rows(self, max_num_seqs: int) -> int:
        """Rows of the vector tables: the identity row, one per running request, and the cached ones."""
        return 1 + max_num_seqs + self.parade_vector_cache

    @property
    def sites(self) -> tuple[str, ...]:
        """Projections with columns in the vector tables."""
        return self.parade_sites or DEFAULT_SITES

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ServingConfig":
        """Read the options from `additional_config["parade"]`.

        Raises:
            ServingConfigError: names the flag, its value and the remedy.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ServingConfigError(f"unknown PARADE option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        lists = {name: _tuple(values[name]) for name in ("parade_modules", "parade_sites") if values.get(name)}
        return cls(**{**{k: v for k, v in values.items() if v is not None}, **lists})

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "ServingConfig":
        """The options of an engine. If PARADE was not requested, the defaults: disabled."""
        additional = vllm_config.additional_config
        return additional.serving_config if isinstance(additional, AdditionalConfig) else cls()

    def hashed(self, num_rows: int) -> dict[str, Any]:
        """What enters vLLM's compile cache key: all that shapes the compiled model, but no adapter names or paths."""
        digest = hashlib.sha256()
        for path in traced_files():
            digest.update(json.dumps([path.name, path.read_text(encoding="utf-8")]).encode())
        return {"source": digest.hexdigest(), "sites": list(self.sites), "rows": num_rows}


def traced_files() -> list[Path]:
    """Files whose code shapes the compiled model. Only `layers/` hooks modules and defines custom ops."""
    return sorted((Path(__file__).parent / "layers").glob("*.py"))


def drafting_slots(vllm_config: "VllmConfig") -> int:
    """Input tokens that vLLM reserves for drafting, per request and step, in addition to the scheduled tokens."""
    speculative = vllm_config.speculative_config
    return speculative.max_num_new_slots_for_drafting if speculative is not None else 0


def step_tokens(vllm_config: "VllmConfig") -> int:
    """Maximum tokens of an instruction. It runs in one step, which also needs the drafting slots of its request."""
    scheduler = vllm_config.scheduler_config
    room = scheduler.max_num_batched_tokens - drafting_slots(vllm_config)
    return min(scheduler.max_num_scheduled_tokens or room, room)


class AdditionalConfig(dict[str, Any]):
    """An engine's `additional_config`. vLLM hashes the entries; the attribute `serving_config` stays out of the hash.

    Both reach every process. An extra attribute on VllmConfig itself would break vLLM's field-by-field copies of it,
    as for draft models.
    """

    def __init__(self, entries: Mapping[str, Any], serving_config: ServingConfig) -> None:
        super().__init__(entries)
        self.serving_config = serving_config

    def __reduce__(self) -> tuple[Any, ...]:
        """Let pickle call the constructor with both values instead of filling an empty dict."""
        return AdditionalConfig, (dict(self), self.serving_config)


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else (values,)


def flag_name(field_name: str) -> str:
    """The command-line flag of an option."""
    return "--" + field_name.replace("_", "-")


def given_sites(modules_sites: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The default sites and those of the adapters in --parade-modules, in the order of `SITES`."""
    named = {site for sites in (DEFAULT_SITES, *modules_sites) for site in sites}
    return tuple(site for site in SITES if site in named)
