# SPDX-License-Identifier: Apache-2.0
"""Contracts with vLLM: every method that the package wraps or overrides still exists and is still called.

A failure here means that vLLM has changed. The message says what and where; patches/README.md explains the seam. The
file exceeds 300 lines so that a vLLM upgrade finds all contracts in one place.
"""

import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import vllm.engine.arg_utils
import wrapt
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import LoRARequestStates, SchedulerStats
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_parade import compat, plugin
from vllm_parade.config import ServingConfigError
from vllm_parade.plugin import KEYWORD_SEAMS, SEAMS, Seam, register
from vllm_parade.scheduler import ParadeScheduler, ParadeSchedulerMixin
from vllm_parade.worker.cpu import ParadeCPUWorker
from vllm_parade.worker.runner_v1 import ParadeModelRunnerMixin
from vllm_parade.worker.runner_v2 import ParadeModelRunnerV2Mixin
from vllm_parade.worker.worker import ParadeWorkerMixin

LEDGER = Path(__file__).parent.parent / "patches/README.md"
HELP = "vLLM has changed; read the entry of patches/README.md, adapt the code (versions: compat.py), then this test"


def method_name(seam):
    return seam.method.rpartition(".")[2]


def seam_id(seam):
    return seam.method


def version_two_runner():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2

    return GPUModelRunnerV2


class TestSeams:
    @pytest.mark.parametrize("seam", SEAMS, ids=seam_id)
    def test_target_is_the_classs_own(self, seam):
        """A wrapper of an inherited method would sit on the subclass and miss the base class's callers."""
        assert method_name(seam) in vars(seam.owner), f"{seam.module}: {seam.method} is gone or moved. {HELP}"
        module = getattr(seam.owner, "__module__", seam.owner.__name__)
        assert module == seam.module, f"{seam.method} is defined in {module} now. {HELP}"

    @pytest.mark.parametrize("seam", SEAMS, ids=seam_id)
    def test_target_takes_what_the_wrapper_relies_on(self, seam):
        parameters = inspect.signature(getattr(seam.owner, method_name(seam))).parameters
        missing = [name for name in seam.needs if name not in parameters]
        assert not missing, f"{seam.method} no longer takes {missing}; it takes {list(parameters)}. {HELP}"

    @pytest.mark.parametrize("seam", SEAMS, ids=seam_id)
    def test_wrapper_exists_and_says_what_it_wraps(self, seam):
        module, name = seam.wrapper.split(":")
        wrapper = getattr(import_module(module), name)
        assert list(inspect.signature(wrapper).parameters) == ["wrapped", "instance", "args", "kwargs"]
        assert wrapper.__doc__.startswith("Wraps ")

    @pytest.mark.parametrize("seam", SEAMS, ids=seam_id)
    def test_a_coroutine_stays_one(self, seam):
        module, name = seam.wrapper.split(":")
        wrapper = getattr(import_module(module), name)
        target = inspect.unwrap(getattr(seam.owner, method_name(seam)))
        kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        assert [kind(wrapper) for kind in kinds] == [kind(target) for kind in kinds], f"{seam.method}. {HELP}"

    def test_no_target_is_listed_twice(self):
        targets = [(seam.module, seam.method) for seam in SEAMS]
        assert len(set(targets)) == len(targets)


class TestLedger:
    def entries(self):
        """Text of each section, by title."""
        parts = re.split(r"^### `(.+)`$", LEDGER.read_text(), flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    def test_lists_exactly_the_seams(self):
        wrapped = LEDGER.read_text().split("## Wrapped methods")[1].split("\n## ")[0]
        headings = re.findall(r"^### `(.+)`$", wrapped, flags=re.MULTILINE)
        assert headings == [seam.method for seam in SEAMS]

    def test_lists_every_overridden_method(self):
        """Public and private methods of all mixins."""
        mixins = (ParadeSchedulerMixin, ParadeModelRunnerMixin, ParadeModelRunnerV2Mixin, ParadeWorkerMixin)
        entries = self.entries()
        for mixin in mixins:
            (base,) = [cls for cls in BASES[mixin] if cls is not None]
            names = {name for name, value in mixin.__dict__.items() if callable(value) and hasattr(base, name)}
            names -= {"__init__"}
            assert {f"{mixin.__name__}.{name}" for name in names} <= set(entries)

    def test_every_entry_answers_every_question(self):
        for title, text in self.entries().items():
            for question in ("Target", "Why", "How", "Upstream", "Remove when"):
                assert re.search(rf"^- \*\*{question}:\*\* \S", text, flags=re.MULTILINE), f"{title}: {question}?"

    def test_every_wrapped_target_names_its_module(self):
        entries = self.entries()
        for seam in SEAMS:
            assert f"`{seam.module}`" in entries[seam.method]


BASES = {
    ParadeSchedulerMixin: [Scheduler],
    ParadeModelRunnerMixin: [GPUModelRunner],
    ParadeModelRunnerV2Mixin: [version_two_runner()],
    ParadeWorkerMixin: [CPUWorker],
}


class TestOverrides:
    @pytest.mark.parametrize(
        ("cls", "name", "parameters"),
        [
            (Scheduler, "_get_local_prefix_cache_hit", ["request"]),
            (Scheduler, "_reserve_prefill_lookahead", ["request", "num_computed_tokens", "num_new_tokens"]),
            (Scheduler, "_update_after_schedule", ["scheduler_output"]),
            (Scheduler, "_preempt_request", ["request"]),
            (Scheduler, "_free_request", ["request"]),
            (Scheduler, "reset_prefix_cache", ["reset_running_requests", "reset_connector"]),
            (Scheduler, "make_stats", []),
            (GPUModelRunner, "_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"]),
            (GPUModelRunner, "_determine_batch_execution_and_padding", ["force_uniform_decode"]),
            (GPUModelRunner, "_dummy_run", ["num_tokens"]),
            (version_two_runner(), "prepare_inputs", ["scheduler_output"]),
            (version_two_runner(), "execute_model", ["scheduler_output", "dummy_run"]),
            (CPUWorker, "init_device", []),
            (CPUWorker, "load_model", []),
        ],
        ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
    )
    def test_method_exists_with_these_first_parameters(self, cls, name, parameters):
        assert hasattr(cls, name), f"{cls.__module__}: {cls.__name__}.{name} is gone. {HELP}"
        taken = list(inspect.signature(inspect.unwrap(getattr(cls, name))).parameters)
        missing = [parameter for parameter in parameters if parameter not in taken]
        assert not missing, f"{cls.__name__}.{name} no longer takes {missing}; it takes {taken}. {HELP}"

    @pytest.mark.parametrize(
        ("cls", "caller", "call", "times"),
        [
            # Once in the running loop, once in the waiting loop.
            (Scheduler, "schedule", "self._reserve_prefill_lookahead(", 2),
            (Scheduler, "schedule", "self._get_local_prefix_cache_hit(request", 1),
            (Scheduler, "schedule", "self._update_after_schedule(scheduler_output)", 1),
            # Only in the running loop, before the step schedules any waiting request.
            (Scheduler, "schedule", "self._preempt_request(", 1),
            (Scheduler, "schedule", "request.status = RequestStatus.RUNNING", 1),
            (Scheduler, "reset_prefix_cache", "self._preempt_request(", 1),
            (Scheduler, "finish_requests", "self._free_request(request", 1),
            (Scheduler, "update_from_output", "self._free_request(request", 1),
            (Scheduler, "update_from_output", "self.make_stats(", 1),
            (AsyncScheduler, "_update_after_schedule", "super()._update_after_schedule(scheduler_output)", 1),
            (GPUModelRunner, "execute_model", "self._prepare_inputs(", 1),
            (GPUModelRunner, "execute_model", "self._determine_batch_execution_and_padding(", 1),
            (GPUModelRunner, "profile_run", "self._dummy_run(", 1),
            (version_two_runner(), "execute_model", "self.prepare_inputs(", 1),
            (version_two_runner(), "_dummy_run", "self.execute_model(", 1),
        ],
        ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
    )
    def test_vllm_calls_it(self, cls, caller, call, times):
        count = inspect.getsource(inspect.unwrap(getattr(cls, caller))).count(call)
        assert count == times, f"{cls.__name__}.{caller} has {call!r} {count} times, not {times}. {HELP}"

    def test_the_prefix_cache_obeys_the_flag_that_the_scheduler_sets(self):
        from vllm.v1.core import kv_cache_manager

        source = inspect.getsource(kv_cache_manager)
        assert "not request.skip_reading_prefix_cache" in source, f"{kv_cache_manager.__name__}. {HELP}"

    def test_a_request_that_gets_no_tokens_is_not_scheduled(self):
        """`_reserve_prefill_lookahead` returning 0 means "not in this step" in both loops."""
        loops = inspect.getsource(Scheduler.schedule).split("self._reserve_prefill_lookahead(")[1:]
        for loop in loops:
            after = loop.split("if num_new_tokens == 0:")[1]
            assert re.search(r"^\s+(continue|break)$", after, flags=re.MULTILINE), f"Scheduler.schedule. {HELP}"

    def test_batches_are_in_order_when_inputs_are_prepared(self):
        """Metadata is filled in batch order, after `_update_states` and before the forward pass."""
        source = inspect.getsource(inspect.unwrap(GPUModelRunner.execute_model))
        order = [
            source.index(call) for call in ("self._update_states(", "self._prepare_inputs(", "self._model_forward(")
        ]
        assert order == sorted(order), f"GPUModelRunner.execute_model. {HELP}"

    def test_mixins_come_before_vllms_classes(self):
        for cls, mixin in ((ParadeScheduler, ParadeSchedulerMixin), (ParadeCPUWorker, ParadeWorkerMixin)):
            assert cls.__mro__[1] is mixin

    def test_workers_name_their_runner(self):
        source = inspect.getsource(CPUWorker.init_device)
        assert "self.model_runner" in source, f"CPUWorker.init_device. {HELP}"
        assert "self.use_v2_model_runner" in source, f"CPUWorker.init_device. {HELP}"

    def test_the_additional_config_flag_can_be_merged(self):
        """PARADE's flags are stored in this flag's value, so its action is replaced in place."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        register()
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        (action,) = [action for action in parser._actions if "--additional-config" in action.option_strings]
        assert type(action).__name__ == "MergeAdditionalConfig", f"--additional-config. {HELP}"
        assert action.dest == "additional_config"


class TestStats:
    """The path of row counters from the scheduler to /metrics; test_metrics checks the exported values."""

    def test_stats_have_a_field_that_can_carry_counts(self):
        (field,) = [field for field in fields(SchedulerStats) if field.name == "running_lora_adapters"]
        assert field.type == dict[str, int], f"SchedulerStats.running_lora_adapters is {field.type} now. {HELP}"

    def test_only_lora_reads_it(self):
        """PARADE refuses LoRA, so the field is free for its counters."""
        source = inspect.getsource(loggers)
        read = r"if self\.gauge_lora_info is not None:\s+running_lora_adapters = [^=]*stats\.running_lora_adapters"
        assert len(re.findall(read, source)) == 1, f"{loggers.__name__}. {HELP}"
        assert source.count("stats.running_lora_adapters") == 1, f"{loggers.__name__}. {HELP}"

    def test_the_front_end_leaves_what_is_in_it(self):
        """The front end only adds names of LoRA adapters."""
        stats = SchedulerStats(running_lora_adapters={"parade_row_hits": 1})
        states = LoRARequestStates(log_stats=True)
        states.request_running("request", "adapter")
        states.update_scheduler_stats(stats)
        assert stats.running_lora_adapters == {"parade_row_hits": 1, "adapter": 1}, f"LoRARequestStates. {HELP}"

    @pytest.mark.parametrize("engine", ["llm_engine:LLMEngine", "async_llm:AsyncLLM"])
    def test_front_ends_have_a_manager_where_stats_are_on(self, engine):
        module, name = engine.split(":")
        source = inspect.getsource(getattr(import_module(f"vllm.v1.engine.{module}"), name).__init__)
        wanted = r"if self\.log_stats:\n\s+self\.logger_manager = StatLoggerManager\("
        assert len(re.findall(wanted, source)) == 1, f"{name}.__init__. {HELP}"

    def test_the_manager_tells_its_loggers(self):
        source = inspect.getsource(loggers.StatLoggerManager)
        for used in ("self.engine_indexes = ", "stat_logger in self.stat_loggers:", "logger in self.stat_loggers:"):
            assert used in source, f"StatLoggerManager without {used!r}. {HELP}"

    def test_making_vllms_logger_drops_all_counters(self):
        """PARADE's counters are created afterwards, so a second engine in a process registers none twice."""
        source = inspect.getsource(loggers.PrometheusStatLogger.__init__)
        assert "unregister_vllm_metrics()" in source, f"PrometheusStatLogger. {HELP}"


class TestRegister:
    def test_twice_wraps_once(self):
        register()
        proxies = [vars(seam.owner)[method_name(seam)] for seam in SEAMS]
        register()
        for seam, proxy in zip(SEAMS, proxies, strict=True):
            assert vars(seam.owner)[method_name(seam)] is proxy
            assert proxy._self_parade_seam is True
            assert not isinstance(proxy.__wrapped__, wrapt.FunctionWrapper)

    def test_keyword_seams_are_installed_by_the_import_alone(self):
        for seam in KEYWORD_SEAMS:
            assert isinstance(vars(seam.owner)[method_name(seam)], wrapt.FunctionWrapper)

    def test_a_missing_target_says_so(self):
        seam = Seam("vllm.engine.arg_utils", "EngineArgs.gone", "vllm_parade.frontend.startup:create_engine_config")
        with pytest.raises(KeyError, match="gone"):
            seam.install()

    def test_inert_unless_enabled(self, tmp_path):
        from transformers import LlamaConfig

        LlamaConfig(
            hidden_size=64, num_attention_heads=2, num_hidden_layers=1, architectures=["LlamaForCausalLM"]
        ).save_pretrained(tmp_path)
        register()
        config = EngineArgs(str(tmp_path), skip_tokenizer_init=True, dtype="float32").create_engine_config()
        assert config.scheduler_config.scheduler_cls is None
        assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
        assert config.additional_config == {}
        assert not [name for name in vars(config) if "parade" in name]


class TestVersions:
    @pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc2", "0.33.0.dev5+g1234"])
    def test_supported(self, version):
        assert compat.is_supported(version)

    @pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.34.0rc1", "dev", ""])
    def test_unsupported(self, version):
        assert not compat.is_supported(version)

    @pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "dev"])
    def test_unsupported_leaves_vllm_alone(self, monkeypatch, version):
        installed, errors = [], []
        monkeypatch.setattr(compat, "installed_version", lambda: version)
        monkeypatch.setattr(plugin.Seam, "install", lambda seam: installed.append(seam))
        monkeypatch.setattr("vllm.logger.init_logger", lambda name: type("Log", (), {"error": errors.append})())
        register()
        assert installed == []
        (message,) = errors
        assert f"it supports {compat.SUPPORTED}, and this is vLLM {version}" in message
        assert "Install a supported vLLM" in message

    def test_unsupported_refuses_the_keywords_rather_than_serve_the_base_model(self, monkeypatch):
        """EngineArgs takes PARADE's keywords as soon as vllm_parade is imported, before any version check."""
        monkeypatch.setattr(compat, "installed_version", lambda: "0.34.0")
        with pytest.raises(ServingConfigError, match="it supports vLLM >= 0.32, < 0.34, and this is vLLM 0.34.0"):
            vllm.engine.arg_utils.EngineArgs(enable_parade=True)
