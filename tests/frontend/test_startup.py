# SPDX-License-Identifier: Apache-2.0
"""From PARADE's options to an engine's config, or to one clear error."""

import json
import pickle
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config.utils import replace as vllm_replace
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_parade.adapter import AdapterError
from vllm_parade.config import CONFIG_KEY, ServingConfig, ServingConfigError
from vllm_parade.frontend import startup
from vllm_parade.plugin import register


@pytest.fixture(autouse=True)
def _plugin():
    register()


def modules(adapters, *names):
    return [f"{name}={adapters[name].path}" for name in names]


class TestEnabled:
    def test_brings_its_scheduler_and_worker(self, engine_config):
        config = engine_config(enable_parade=True)
        assert config.scheduler_config.get_scheduler_cls().__name__ == "ParadeScheduler"
        assert config.parallel_config.worker_cls == "vllm_parade.worker.cpu.ParadeCPUWorker"

    def test_brings_its_asynchronous_scheduler(self, engine_config):
        config = engine_config()
        # vLLM disables asynchronous scheduling on CPUs.
        config.scheduler_config.async_scheduling = True
        startup._enable(config, ServingConfig(True), None)
        assert config.scheduler_config.get_scheduler_cls().__name__ == "ParadeAsyncScheduler"

    def test_carries_the_knobs(self, engine_config, adapters):
        config = engine_config(enable_parade=True, max_parades=3, parade_modules=modules(adapters, "a"))
        carried = ServingConfig.from_vllm_config(config)
        assert carried.enable_parade
        assert carried.max_parades == 3
        assert [module.name for module in carried.parade_modules] == ["a"]

    def test_tables_have_the_sites_that_static_adapters_name(self, engine_config, adapters):
        assert ServingConfig.from_vllm_config(engine_config(enable_parade=True)).sites == ("q", "v", "up")
        config = engine_config(enable_parade=True, parade_modules=modules(adapters, "a", "five"))
        assert ServingConfig.from_vllm_config(config).sites == ("q", "k", "v", "gate", "up")

    @pytest.mark.parametrize(
        ("memory", "options", "capacity"),
        [
            (1 << 40, {}, 256),
            # An adapter takes 2 layers * (16 * (128 + 384 + 16 + 16) + 384) numbers of 4 bytes.
            (8 * 100 * 72_704, {}, 100),
            (8 * 100 * 72_704, {"max_cpu_parades": 300}, 300),
            (8 * 100 * 72_704, {"max_parades": 120}, 120),
            (1 << 20, {}, 32),
        ],
    )
    def test_host_memory_holds_a_share_of_the_machines(self, engine_config, monkeypatch, memory, options, capacity):
        monkeypatch.setattr(startup.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
        config = ServingConfig.from_vllm_config(engine_config(enable_parade=True, dtype="float32", **options))
        assert config.max_cpu_parades == capacity

    def test_keeps_others_additional_config(self, engine_config):
        config = engine_config(enable_parade=True, additional_config={"mine": 1})
        assert config.additional_config["mine"] == 1


class TestDisabled:
    @pytest.mark.parametrize("options", [{}, {"enable_parade": False}, {"max_parades": 3}])
    def test_leaves_no_trace(self, engine_config, options):
        plain = engine_config(additional_config={"mine": 1})
        config = engine_config(additional_config={"mine": 1}, **options)
        assert config.additional_config == {"mine": 1}
        assert type(config.additional_config) is dict
        assert not ServingConfig.from_vllm_config(config).enable_parade
        assert config.scheduler_config.scheduler_cls is None
        assert config.parallel_config.worker_cls == plain.parallel_config.worker_cls
        assert config.compute_hash() == plain.compute_hash()

    def test_modules_need_it(self, engine_config, adapters):
        with pytest.raises(ServingConfigError, match="--parade-modules needs --enable-parade"):
            engine_config(parade_modules=modules(adapters, "a"))


class TestCompileCache:
    def test_names_and_paths_of_adapters_stay_out(self, engine_config, adapters):
        hashes = {
            engine_config(enable_parade=True, **options).compute_hash()
            for options in (
                {},
                {"parade_modules": modules(adapters, "a")},
                {"parade_modules": modules(adapters, "a", "b")},
                {"max_parades": 2, "max_cpu_parades": 5, "max_parade_rank": 128},
            )
        }
        assert len(hashes) == 1

    def test_what_shapes_the_model_goes_in(self, engine_config):
        variants = [
            {},
            {"enable_parade": True},
            {"enable_parade": True, "parade_sites": ["q"]},
            {"enable_parade": True, "max_num_seqs": 7},
        ]
        assert len({engine_config(**options).compute_hash() for options in variants}) == len(variants)

    def test_what_goes_in_survives_json(self, engine_config):
        entry = engine_config(enable_parade=True, max_num_seqs=7).additional_config[CONFIG_KEY]
        assert json.loads(json.dumps(entry)) == entry
        assert entry["rows"] == 8 + 64


class TestBadAdapters:
    def test_missing_folder(self, engine_config):
        with pytest.raises(AdapterError, match="/nowhere: no such folder"):
            engine_config(enable_parade=True, parade_modules=["a=/nowhere"])

    def test_rank_over_the_limit(self, engine_config, adapters):
        with pytest.raises(AdapterError, match="r is 12.*8"):
            engine_config(enable_parade=True, max_parade_rank=8, parade_modules=modules(adapters, "a"))

    def test_sites_that_have_no_table(self, engine_config, adapters):
        with pytest.raises(AdapterError, match="sites"):
            engine_config(enable_parade=True, parade_sites=["q"], parade_modules=modules(adapters, "a"))

    def test_another_base_model(self, model, engine_config, adapters, hf_config, tmp_path):
        wider = hf_config.__class__(**{**hf_config.to_dict(), "intermediate_size": 256})
        wider.save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="up.weight"):
            engine_config(enable_parade=True, parade_modules=modules(adapters, "a"), hf_config_path=str(tmp_path))

    @pytest.mark.parametrize("served", [None, ["x", "a"]])
    def test_name_of_the_base_model(self, engine_config, adapters, model, served):
        name = "a" if served else model
        with pytest.raises(ServingConfigError, match="is the base model's name; rename one of them"):
            engine_config(
                enable_parade=True,
                served_model_name=served,
                parade_modules=[{"name": name, "path": adapters["a"].path}],
            )


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}}, "--speculative-config"),
        ({"long_prefill_token_threshold": 8}, "--long-prefill-token-threshold"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls mine.Worker"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}, "pipeline_parallel_size": 2},
            "--speculative-config with --pipeline-parallel-size",
        ),
        ({"runner": "pooling"}, "--runner pooling"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refuses_what_it_cannot_serve_rightly(engine_config, options, flag):
    with pytest.raises(ServingConfigError, match=f"^{flag} cannot be used with --enable-parade: "):
        engine_config(enable_parade=True, **options)


@pytest.mark.parametrize("name", ["VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_refuses_environment(engine_config, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ServingConfigError, match=f"^{name} cannot be used with --enable-parade: "):
        engine_config(enable_parade=True)
    monkeypatch.setenv(name, "0")
    engine_config(enable_parade=True)


def test_refuses_other_architectures(engine_config, hf_config, tmp_path):
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ServingConfigError, match="^model architecture GPT2LMHeadModel .*supported are Llama"):
        engine_config(enable_parade=True, model=str(tmp_path))


def test_refuses_the_transformers_implementation(engine_config):
    """The model's config names LlamaForCausalLM, but vLLM's class lacks the modules that PARADE hooks."""
    with pytest.raises(ServingConfigError, match="^model architecture TransformersForCausalLM .*own implementation"):
        engine_config(enable_parade=True, model_impl="transformers")


@pytest.mark.parametrize(
    ("section", "field", "value", "flag"),
    [
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "ubatch_size", 2, "--ubatch-size 2"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config", "_api_process_count", 2, "--api-server-count"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        ("model_config", "is_encoder_decoder", True, "model architecture LlamaForCausalLM"),
        ("compilation_config", "pass_config", SimpleNamespace(enable_sp=True), "sequence parallelism"),
    ],
)
def test_refuses_what_vllm_takes_on_gpus_only(engine_config, section, field, value, flag):
    config = engine_config()
    startup.refuse_unsupported(config)
    part = copy(getattr(config, section))
    # Set on a copy of the section, so that its properties use the value too.
    object.__setattr__(part, field, value)
    changed = _Changed(config, section, part)
    with pytest.raises(ServingConfigError, match=f"^{flag}"):
        startup.refuse_unsupported(changed)


class _Changed:
    """A config with one value replaced."""

    def __init__(self, config, field, value):
        self._config = config
        setattr(self, field, value)

    def __getattr__(self, name):
        return getattr(self._config, name)


class TestErrorsOfACommandLine:
    """A bad flag gives one line and exit code 1. The same mistake in a keyword raises (tests above)."""

    @pytest.fixture
    def exit_line(self, model, monkeypatch):
        lines = []
        monkeypatch.setattr(startup.logger, "error", lambda text, *values: lines.append(text % values))

        def run(*arguments):
            parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
            args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))
            with pytest.raises(SystemExit) as exit_info:
                args.create_engine_config()
            assert exit_info.value.code == 1
            (line,) = lines
            assert "\n" not in line
            return line

        return run

    def test_bad_combination(self, exit_line):
        assert exit_line("--parade-modules", "a=/x").startswith("PARADE: --parade-modules needs --enable-parade")

    def test_bad_module(self, exit_line):
        assert "expected name=path" in exit_line("--enable-parade", "--parade-modules", "a")

    def test_bad_adapter(self, exit_line):
        assert "/nowhere: no such folder" in exit_line("--enable-parade", "--parade-modules", "a=/nowhere")

    def test_damaged_adapter(self, exit_line, adapters, tmp_path):
        for file in Path(adapters["a"].path).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[:-7])
        assert str(tmp_path) in exit_line("--enable-parade", "--parade-modules", f"a={tmp_path}")

    def test_unsupported(self, exit_line):
        assert exit_line("--enable-parade", "--enable-lora").startswith("PARADE: --enable-lora cannot be used")


def test_the_knobs_cross_to_other_processes(engine_config):
    """The config is pickled for an engine core, and vLLM copies it for a draft model."""
    config = engine_config(enable_parade=True, max_parades=3)
    copied = pickle.loads(pickle.dumps(config))
    assert ServingConfig.from_vllm_config(copied) == ServingConfig.from_vllm_config(config)
    assert ServingConfig.from_vllm_config(copied).max_parades == 3
    assert copied.additional_config == config.additional_config
    vllm_replace(config, quant_config=None)
